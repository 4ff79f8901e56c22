"""Bulk encoding of a corpus into a snapshot: a plan of shards, each made by whoever takes it, and a manifest.

The plan depends on the input alone, and a shard on its part of the plan alone: any number of workers make the same
states, and a run that was cut off goes on with the shards that are missing. A shard is done when its Parquet part is
there; it names the task that made it.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import fsspec
import pyarrow.parquet

from modeling_xcllama.context_cache import ContextCache

from .documents import Document, read_parquet
from .encoding import convert, encode, groups, tokenize
from .manifest import Folder, Manifest, PartEntry, ShardEntry, sha256_of, write_part
from .pending import PendingShard, split_documents
from .shards import write_shard
from .snapshot import commit_manifest

PLAN_NAME = "plan.json"
CHARACTERS_PER_SHARD = 200_000


@dataclass(frozen=True)
class Task:
    """One shard to make: rows `start` to `stop` of an input file without the rows `skip` (repeated documents)."""

    number: int
    file: str
    start: int
    stop: int
    skip: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What every worker of a run needs to know.

    Attributes:
        output: local path or fsspec URL of the snapshot.
        dtype: "auto" (the model's), "float32", "bfloat16", "float16", "int8" or "int4".
        storage_options: of the output's file system.
    """

    output: str
    dtype: str = "auto"
    id_column: str = "id"
    text_column: str = "text"
    namespace: str = "default"
    model_name: str = ""
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


def make_plan(files: Sequence[str], settings: Settings, characters: int = CHARACTERS_PER_SHARD) -> list[Task]:
    """Cut the input into shards of about `characters`; of equal documents with one id the first counts.

    Raises:
        ValueError: no documents, or one id with different texts.
    """
    seen: dict[bytes, bytes] = {}
    tasks: list[Task] = []
    for file in files:
        start = row = size = 0
        skip: list[int] = []
        for document in _rows(file, settings, 0, None):
            key = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
            content = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
            if seen.get(key, content) != content:
                raise ValueError(f"the input has different texts with the id {document.id!r}; ids must be unique.")
            if key in seen:
                skip.append(row)
            else:
                seen[key] = content
                size += len(document.text) + 1
            row += 1
            if size >= characters:
                tasks.append(Task(len(tasks), file, start, row, tuple(skip)))
                start, size, skip = row, 0, []
        if row - start > len(skip):
            tasks.append(Task(len(tasks), file, start, row, tuple(skip)))
    if not seen:
        raise ValueError(f"no documents in {', '.join(files[:4])}.")
    return tasks


def load_plan(source: str, settings: Settings, characters: int = CHARACTERS_PER_SHARD) -> list[Task]:
    """The plan in the output folder, made and written there by the first call.

    Raises:
        ValueError: the output holds a run over another input.
    """
    files = input_files(source)
    sizes = [fsspec.core.url_to_fs(file)[0].size(fsspec.core.url_to_fs(file)[1]) for file in files]
    key = {"files": files, "sizes": sizes, "characters": characters}
    key |= {"id_column": settings.id_column, "text_column": settings.text_column}
    folder = settings.folder
    if folder.exists(PLAN_NAME):
        saved = json.loads(folder.read(PLAN_NAME))
        if saved["key"] != key:
            raise ValueError(
                f"{settings.output} holds a run over another input ({saved['key']['files'][:2]}, ...); "
                "give another --output."
            )
        return [Task(**task | {"skip": tuple(task["skip"])}) for task in saved["tasks"]]
    tasks = make_plan(files, settings, characters)
    content = json.dumps({"key": key, "tasks": [asdict(task) for task in tasks]}, indent=1)
    folder.write(PLAN_NAME, content.encode())
    return tasks


def _rows(file: str, settings: Settings, start: int, stop: int | None) -> Iterator[Document]:
    with fsspec.open(file) as source:
        yield from read_parquet(source, settings.id_column, settings.text_column, start, stop)


def task_digest(task: Task, settings: Settings, fingerprint: str) -> str:
    """Names a task and what encodes it."""
    fields = asdict(task) | {"fingerprint": fingerprint, "dtype": settings.dtype}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def finished_part(task: Task, settings: Settings, fingerprint: str) -> dict | None:
    """What a part says that is there already; None if it is not.

    Raises:
        ValueError: it was made by another model or with other settings.
    """
    folder, name = settings.folder, f"catalogue/part-{task.number:06d}.parquet"
    if not folder.exists(name):
        return None
    content = folder.read(name)
    fields = pyarrow.parquet.read_schema(io.BytesIO(content)).metadata or {}
    if fields.get(b"task", b"").decode() != task_digest(task, settings, fingerprint):
        raise ValueError(f"{folder.url}/{name} was made by another model or with other settings; use another output.")
    part = PartEntry(name, len(content), hashlib.sha256(content).hexdigest(), int(fields[b"documents"]))
    return {"part": part, "shard": ShardEntry(**json.loads(fields[b"shard"])), "fields": fields}


def encode_task(task: Task, model, processor, settings: Settings) -> bool:
    """Make one shard and its part, unless they are there; returns whether it did."""
    fingerprint = model.model.context_fingerprint()
    if finished_part(task, settings, fingerprint) is not None:
        return False
    skip = set(task.skip)
    rows = _rows(task.file, settings, task.start, task.stop)
    documents = [row for position, row in enumerate(rows, task.start) if position not in skip]
    dtype = str(model.dtype).removeprefix("torch.") if settings.dtype == "auto" else settings.dtype
    pending = PendingShard()
    sequences = tokenize(processor, [document.id for document in documents], [d.text for d in documents])
    for group in groups([len(sequence) for sequence in sequences]):
        cache: ContextCache = convert(encode(model, [sequences[index] for index in group]), dtype)
        chosen = [documents[index] for index in group]
        hashes = [hashlib.sha256(document.text.encode()).hexdigest() for document in chosen]
        for new, parts in split_documents([tuple(d) for d in chosen], hashes, cache, float("inf")):
            pending.append(new, parts)
    name = f"shards/shard-{task.number:06d}.safetensors"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "shard.safetensors")
        nbytes, header = write_shard(path, pending.parts(), fingerprint)
        shard = ShardEntry(name, nbytes, sha256_of(path), header.hex())
        settings.folder.upload(path, name)
    fields = {
        "task": task_digest(task, settings, fingerprint),
        "shard": json.dumps(asdict(shard)),
        "documents": str(len(documents)),
        "tokens": str(pending.tokens),
        "dtype": dtype,
        "template_version": str(processor.template_version),
    }
    names = ("id", "text", "content_hash", "start", "tokens", "nbytes", "checksum")
    records = [
        {field: getattr(row, field) for field in names}
        | {"metadata": json.dumps(row.metadata, ensure_ascii=False), "shard": name}
        for row in pending.rows
    ]
    write_part(settings.folder, task.number, records, fields)
    return True


def finish(tasks: Sequence[Task], settings: Settings, fingerprint: str, **card) -> Manifest:
    """Commit the snapshot.

    Args:
        card: `title` and `license_id`.

    Raises:
        ValueError: shards are missing.
    """
    parts = [finished_part(task, settings, fingerprint) for task in tasks]
    missing = [str(task.number) for task, part in zip(tasks, parts, strict=True) if part is None]
    if missing:
        raise ValueError(f"{len(missing)} shards are missing ({', '.join(missing[:8])}); run the command again.")
    manifest = Manifest(
        fingerprint=fingerprint,
        dtype=parts[0]["fields"][b"dtype"].decode(),
        template_version=parts[0]["fields"][b"template_version"].decode(),
        namespace=settings.namespace,
        model=settings.model_name,
        documents=sum(part["part"].documents for part in parts),
        tokens=sum(int(part["fields"][b"tokens"]) for part in parts),
        shards=[part["shard"] for part in parts],
        catalogue=[part["part"] for part in parts],
    )
    return commit_manifest(settings.folder, manifest, **card)


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
                fields = json.loads(str(task))
                encode_task(Task(**fields | {"skip": tuple(fields["skip"])}), self.model, self.processor, settings)
            return {"fingerprint": [self.model.model.context_fingerprint()] * len(batch["task"])}

    items = [{"task": json.dumps(asdict(task))} for task in tasks]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    done = data.map_batches(Encoder, batch_size=1, concurrency=concurrency, num_cpus=1, num_gpus=num_gpus).take_all()
    fingerprints = {row["fingerprint"] for row in done}
    if len(fingerprints) != 1:
        raise RuntimeError(f"the actors loaded different weights: fingerprints {sorted(fingerprints)}.")
    return fingerprints.pop()
