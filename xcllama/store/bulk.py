"""Bulk encoding of a corpus into a snapshot: a plan of shards, each made by whoever takes it, and a manifest.

The plan copies the input into one small file a shard, so that a worker reads what it encodes and no more. It depends
on the input alone, and a shard on its part of the plan alone: any number of workers make the same states, and a run
that was cut off goes on with the shards that are missing. A shard is done when its Parquet part is there; it names the
task that made it.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet

from modeling_xcllama.passages import PASSAGE_TOKENS
from xcllama.documents import Document, read_parquet
from xcllama.progress import tracked

from .adding import cut, new_states
from .catalogue import NewPassage, NewState
from .encoding import contexts_of, encode, groups, tokens_per_call
from .manifest import FileEntry, Folder, Manifest, render_card, sha256_of, write_part
from .shards import describe, dtype_of, write_shard

PLAN_NAME = "plan.json"
CHARACTERS_PER_SHARD = 200_000


@dataclass(frozen=True)
class Task:
    """One shard to make; `digest` is that of its documents."""

    number: int
    digest: str

    @property
    def input_name(self) -> str:
        """The file of its documents."""
        return f"plan/task-{self.number:06d}.parquet"


@dataclass(frozen=True)
class Settings:
    """What every worker of a run needs to know.

    Attributes:
        output: local path or fsspec URL of the snapshot.
        dtype: "auto" (the model's), "float32", "bfloat16", "float16", "int8" or "int4".
        passage_tokens: sizes of passages (`split_passages`); None: a document is one.
        storage_options: of the output's file system.
    """

    output: str
    dtype: str = "auto"
    id_column: str = "id"
    text_column: str = "text"
    namespace: str = "default"
    model_name: str = ""
    passage_tokens: tuple[int, int, int] | None = PASSAGE_TOKENS
    storage_options: dict | None = None

    @cached_property
    def folder(self) -> Folder:
        """The output."""
        return Folder(self.output, self.storage_options)


def input_files(source: str) -> list[str]:
    """The Parquet files of a file, folder, glob, fsspec URL or Hub data set id ("org/name").

    Raises:
        ValueError: none found.
    """
    if "://" not in source and not Path(source).exists() and "*" not in source and source.count("/") == 1:
        source = f"hf://datasets/{source}"
    filesystem, root = fsspec.core.url_to_fs(source)
    found = [root] if filesystem.isfile(root) else filesystem.glob(root if "*" in root else f"{root}/**/*.parquet")
    if not found:
        raise ValueError(f"no Parquet file at {source}.")
    return [filesystem.unstrip_protocol(path) for path in sorted(found)]


def load_plan(source: str, settings: Settings, characters: int = CHARACTERS_PER_SHARD) -> list[Task]:
    """The plan in the output folder, made and written there by the first call.

    Args:
        characters: of the documents of a shard, about.

    Raises:
        ValueError: no documents, one id with different texts, or the output holds a run over another input.
    """
    files, folder = input_files(source), settings.folder
    sizes = [fsspec.core.url_to_fs(file)[0].size(fsspec.core.url_to_fs(file)[1]) for file in files]
    key = {"files": files, "sizes": sizes, "characters": characters}
    key |= {"id_column": settings.id_column, "text_column": settings.text_column}
    if folder.exists(PLAN_NAME):
        saved = json.loads(folder.read(PLAN_NAME))
        if saved["key"] != key:
            raise ValueError(
                f"{settings.output} holds a run over another input ({saved['key']['files'][:2]}, ...); "
                "give another output."
            )
        tasks = [Task(**task) for task in saved["tasks"]]
        names = [(task.input_name, f"catalogue/part-{task.number:06d}.parquet") for task in tasks]
        if all(folder.exists(copy) or folder.exists(part) for copy, part in names):
            return tasks
    tasks = []
    for documents in _distinct(files, settings, characters):
        rows = [(document.id, document.text, json.dumps(document.metadata)) for document in documents]
        task = Task(len(tasks), hashlib.sha256(json.dumps(rows).encode()).hexdigest())
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(list(zip(*rows, strict=True)), ["id", "text", "metadata"]), buffer)
        folder.write(task.input_name, buffer.getvalue())
        tasks.append(task)
    if not tasks:
        raise ValueError(f"no documents in {', '.join(files[:4])}.")
    folder.write(PLAN_NAME, json.dumps({"key": key, "tasks": [asdict(task) for task in tasks]}, indent=1).encode())
    return tasks


def _distinct(files: Sequence[str], settings: Settings, characters: int) -> Iterator[list[Document]]:
    """The documents of the input in groups of about `characters`; of equal ones with one id the first counts."""
    seen: dict[bytes, bytes] = {}
    group, size = [], 0
    for document in chain.from_iterable(_rows(file, settings) for file in files):
        key = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
        content = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        if seen.get(key, content) != content:
            raise ValueError(f"the input has different texts with the id {document.id!r}; ids must be unique.")
        if key in seen:
            continue
        seen[key] = content
        group.append(document)
        size += len(document.text) + 1
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _rows(file: str, settings: Settings) -> Iterator[Document]:
    with fsspec.open(file) as source:
        yield from read_parquet(source, settings.id_column, settings.text_column)


def task_digest(task: Task, settings: Settings, fingerprint: str) -> str:
    """Names a task and what encodes it."""
    fields = [asdict(task), fingerprint, settings.dtype, settings.passage_tokens]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def finished_part(task: Task, settings: Settings, fingerprint: str) -> tuple[FileEntry, FileEntry, dict] | None:
    """The part, the shard and the notes of a task that is done; None if it is not.

    Raises:
        ValueError: it was made by another model or with other settings.
    """
    folder, name = settings.folder, f"catalogue/part-{task.number:06d}.parquet"
    if not folder.exists(name):
        return None
    content = folder.read(name)
    notes = {
        key.decode(): value.decode()
        for key, value in pyarrow.parquet.read_schema(io.BytesIO(content)).metadata.items()
    }
    if notes.get("task") != task_digest(task, settings, fingerprint):
        raise ValueError(f"{folder.url}/{name} was made by another model or with other settings; use another output.")
    part = FileEntry(name, len(content), hashlib.sha256(content).hexdigest())
    return part, FileEntry(**json.loads(notes["shard"])), notes


def encode_task(task: Task, model, processor, settings: Settings) -> bool:
    """Make one shard and its part, unless they are there; returns whether it did."""
    fingerprint = model.model.context_fingerprint()
    if finished_part(task, settings, fingerprint) is not None:
        return False
    rows = pyarrow.parquet.read_table(io.BytesIO(settings.folder.read(task.input_name))).to_pylist()
    contexts: dict[bytes, list[int]] = {}
    for row in rows:
        row["digest"] = hashlib.sha256(row["text"].encode()).hexdigest()
        row["passages"], sequences = cut(row["id"], row["text"], processor, settings.passage_tokens)
        contexts |= dict(zip([passage.content for passage in row["passages"]], sequences, strict=True))
    parts: list[dict] = []
    sequences = list(contexts.values())
    for group in groups([len(sequence) for sequence in sequences], tokens_per_call(model)):
        parts += contexts_of(encode(model, [sequences[index] for index in group], settings.dtype))
    name = f"shards/shard-{task.number:06d}.safetensors"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "shard.safetensors")
        nbytes, header = write_shard(path, parts, fingerprint)
        shard = FileEntry(name, nbytes, sha256_of(path), header.hex())
        settings.folder.upload(path, name)
    entries = {entry.content: entry for entry in new_states(dict(zip(contexts, parts, strict=True)))}
    for row in rows:
        row["passages"] = [passage_row(passage, name, entries[passage.content]) for passage in row["passages"]]
    notes = {"task": task_digest(task, settings, fingerprint), "shard": json.dumps(asdict(shard))}
    notes |= {"documents": str(len(rows)), "tokens": str(sum(map(len, sequences))), "kind": describe(parts[0])}
    notes["dtype"] = dtype_of(notes["kind"])
    notes["template_version"] = str(processor.template_version)
    write_part(settings.folder, rows, f"part-{task.number:06d}", notes)
    return True


def passage_row(passage: NewPassage, shard: str, states: NewState) -> dict:
    """A passage as a row of a part has it."""
    place = {"shard": shard, "first": states.start, "tokens": states.tokens, "nbytes": states.nbytes}
    place |= {"content": states.content, "checksum": states.checksum}
    return {"start": passage.start, "stop": passage.stop, **place}


def finish(tasks: Sequence[Task], settings: Settings, fingerprint: str, **card: str) -> Manifest:
    """Commit the snapshot; the plan's copies of the input go.

    Args:
        card: `title` and `license_id`.

    Raises:
        ValueError: shards are missing.
    """
    found = [finished_part(task, settings, fingerprint) for task in tasks]
    missing = [str(task.number) for task, done in zip(tasks, found, strict=True) if done is None]
    if missing:
        raise ValueError(f"{len(missing)} shards are missing ({', '.join(missing[:8])}); run the command again.")
    parts, shards, notes = zip(*found, strict=True)
    manifest = Manifest(
        fingerprint=fingerprint,
        **{name: notes[0][name] for name in ("kind", "dtype", "template_version")},
        namespace=settings.namespace,
        model=settings.model_name,
        documents=sum(int(own["documents"]) for own in notes),
        tokens=sum(int(own["tokens"]) for own in notes),
        shards=list(shards),
        catalogue=list(parts),
    )
    folder = settings.folder
    folder.commit(manifest, render_card(manifest, folder.url, **card))
    for task in tasks:
        if folder.exists(task.input_name):
            folder.fs.rm_file(folder.path(task.input_name))
    return manifest


def encode_here(
    plan: Callable[[], list[Task]], load: Callable[[], tuple], settings: Settings, cpu: bool
) -> tuple[list[Task], str | None]:
    """Encode in this process; of several processes of `accelerate launch`, i takes the shards i, i + n, ...

    Returns:
        The tasks, and the model's fingerprint in the process that is to `finish`, once all are done.
    """
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    with state.main_process_first():
        tasks = plan()
    model, processor = load()
    model.to(state.device)
    own = tasks[state.process_index :: state.num_processes]
    for task in tracked(own, "shards") if state.is_main_process else own:
        encode_task(task, model, processor, settings)
    state.wait_for_everyone()
    return tasks, model.model.context_fingerprint() if state.is_main_process else None


def run_on_ray(
    tasks: Sequence[Task],
    load: Callable[[], tuple],
    settings: Settings,
    *,
    concurrency: int | tuple[int, int] = 1,
    num_gpus: float = 0,
) -> str:
    """Encode with Ray Data: actors that each load the model once; what a lost node did not finish is done elsewhere.

    Args:
        load: returns model and processor; pickled by Ray.
        concurrency: actors, or the least and the most.
        num_gpus: of each actor.

    Returns:
        The model's fingerprint.

    Raises:
        RuntimeError: actors disagree about the fingerprint: they loaded different weights.
    """
    import ray

    class Encoder:
        """An actor: a model, and the tasks that it is handed."""

        def __init__(self):
            self.model, self.processor = load()
            if num_gpus:
                self.model.to("cuda")

        def __call__(self, batch: dict) -> dict:
            for task in batch["task"]:
                encode_task(Task(**json.loads(str(task))), self.model, self.processor, settings)
            return {"fingerprint": [self.model.model.context_fingerprint()] * len(batch["task"])}

    items = [{"task": json.dumps(asdict(task))} for task in tasks]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    done = data.map_batches(Encoder, batch_size=1, concurrency=concurrency, num_cpus=1, num_gpus=num_gpus).take_all()
    fingerprints = {row["fingerprint"] for row in done}
    if len(fingerprints) != 1:
        raise RuntimeError(f"the actors loaded different weights: fingerprints {sorted(fingerprints)}.")
    return fingerprints.pop()
