"""A build: sources or the mix as a folder of Parquet files, with a card and the table of what was read and dropped.

DIR/README.md             the card; its header names the configurations
DIR/build.json            the table
DIR/SOURCE/SPLIT-00000.parquet
DIR/mix/SPLIT-00000.parquet
DIR/tasks/train-00000.parquet   an example of a task for each training row of the mix

A folder that was not finished is never taken for one that was.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from dataset_builders.card import render_card
from dataset_builders.features import FEATURES
from dataset_builders.fields import Settings
from dataset_builders.files import file_records
from dataset_builders.mix import HELD_OUT, Mix, choose_sources
from dataset_builders.reading import read_source
from dataset_builders.schema import Report, Row, validate_row
from dataset_builders.sources import get_source, terms
from dataset_builders.splits import SPLITS
from dataset_builders.tasks import TASK_WEIGHTS, make_examples
from xcllama.provenance import provenance

MIX, TASKS = "mix", "tasks"
TABLE = "build.json"
_GROUP_ROWS, _GROUP_CHARACTERS = 1000, 1_000_000
SHARD_BYTES = 500_000_000
MEASURED = ("dataset_builders",)


def build_source(
    name: str,
    output: str,
    path: str | None = None,
    settings: Settings | None = None,
    on_error: str = "limit",
    num_proc: int = 1,
) -> dict[str, Any]:
    """Build one source into the new folder `output` and return the build table; arguments as for `read_source`."""
    get_source(name)
    settings = settings or Settings()
    with finished_folder(output) as folder:
        configs = {name: _write_source(name, folder, path, settings, on_error, num_proc)}
        return finish(folder, {"name": name, "default": name, "seed": settings.seed, "configs": configs})


def build_mix_folder(
    output: str,
    names: list[str] | None = None,
    paths: dict[str, str] | None = None,
    benchmarks: list[str] | None = None,
    settings: Settings | None = None,
    commercial_only: bool = False,
    on_error: str = "limit",
    num_proc: int = 1,
    task_weights: Mapping[str, float] = TASK_WEIGHTS,
) -> dict[str, Any]:
    """Build every source, the mix (the default configuration) and its tasks into the new folder `output`.

    Args:
        task_weights: task -> weight, as for `make_examples`; {}: no tasks.
        names, paths, benchmarks, settings, commercial_only, on_error, num_proc: as for `build_mix` and `read_source`.

    Returns:
        The build table.
    """
    settings, paths = settings or Settings(), paths or {}
    names, benchmarks = choose_sources(names, benchmarks, commercial_only)
    with finished_folder(output) as folder:
        configs = {}
        for name in names + benchmarks:
            configs[name] = _write_source(name, folder, paths.get(name), settings, on_error, num_proc)

        def read(name: str, split: str, report: Report | None) -> Iterator[Row]:
            return built_rows(f"{folder}/{name}", split, configs[name]["splits"])

        mix = Mix(names, benchmarks, settings.seed, read)
        splits = {}
        # training last, when what it must not hold is known; its writers are closed one split at a time
        for split in reversed(HELD_OUT):
            with split_writers(f"{folder}/{MIX}") as writers:
                for row in _progress(mix.rows(split), f"{MIX} {split}"):
                    writers[split].write(row)
            if writers[split].rows:
                splits[split] = writers[split].table()
        report = mix.report()
        splits = {split: splits[split] for split in SPLITS if split in splits}
        configs[MIX] = {"splits": splits, "removal": report["mix"], "sources": names}
        if task_weights and "train" in splits:
            configs[TASKS] = _write_tasks(folder, splits, dict(task_weights), settings.seed)
        table = {"name": MIX, "default": MIX, "seed": settings.seed, "configs": configs}
        return finish(folder, table | {"contexts_found_in_training": report["contexts_found_in_training"]})


def _write_source(
    name: str, folder: str, path: str | None, settings: Settings, on_error: str, num_proc: int
) -> dict[str, Any]:
    report, source = Report(), get_source(name)
    rows = read_source(name, path, "all", settings.seed, on_error, report, settings, num_proc)
    with split_writers(f"{folder}/{name}") as writers:
        for row in _progress(rows, name):
            writers[source.split(row)].write(row)
    splits = {split: writer.table() for split, writer in writers.items() if writer.rows}
    if not splits:
        raise ValueError(f"source {name!r} gave no row to write; dropped: {report.dropped}.")
    return report.as_dict() | {"path": path or "default", "splits": splits} | terms(name)


def _write_tasks(folder: str, splits: dict[str, Any], weights: dict[str, float], seed: int) -> dict[str, Any]:
    examples = make_examples(built_rows(f"{folder}/{MIX}", "train", splits), weights, seed)
    with split_writers(f"{folder}/{TASKS}") as writers:
        for row in _progress(examples, TASKS):
            writers["train"].write(validate_row(row))
    return {"splits": {"train": writers["train"].table()}, "weights": weights}


def built_rows(folder: str, split: str, splits: dict[str, Any]) -> Iterator[Row]:
    """The rows of a split ("all": of all) that a build has written."""
    for name in SPLITS:
        if name in splits and split in ("all", name):
            for record in file_records(f"{folder}/{name}-*.parquet"):
                yield record.value()


def _progress(rows: Iterator[Row], name: str) -> Iterator[Row]:
    # where there is no terminal a line every ten seconds
    return iter(tqdm(rows, desc=name, unit=" rows", mininterval=0.1 if sys.stderr.isatty() else 10.0))


def finish(folder: str, table: dict[str, Any]) -> dict[str, Any]:
    """Write the card and then the table, which makes the folder a finished one."""
    table = table | {"provenance": provenance(MEASURED)}
    write_text(f"{folder}/README.md", render_card(table))
    write_text(f"{folder}/{TABLE}", json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    return table


def row_digest(row: Row) -> bytes:
    """128-bit digest of a row."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class SplitWriter:
    """Writes the rows of one split to `{folder}/{split}-00000.parquet` and so on, and keeps count.

    `table()` has the number of rows, the digest of the rows in their order (`fingerprint`), and one that does not
    depend on the order (`content`).
    """

    def __init__(self, folder: str, split: str):
        self.folder, self.split = folder, split
        self.rows, self._shard, self._size = 0, 0, 0
        self._buffer: list[Row] = []
        self._stream = self._writer = None
        self._ordered, self._sum = hashlib.blake2b(digest_size=16), 0

    def write(self, row: Row) -> None:
        identity = row_digest(row)
        self._ordered.update(identity)
        self._sum = (self._sum + int.from_bytes(identity, "big")) % 2**128
        self.rows += 1
        self._buffer.append(row)
        self._size += sum(map(len, row["contexts_list"]))
        if len(self._buffer) >= _GROUP_ROWS or self._size >= _GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            path = f"{self.folder}/{self.split}-{self._shard:05}.parquet"
            self._stream = fsspec.open(path, "wb", auto_mkdir=True).open()
            self._writer = pyarrow.parquet.ParquetWriter(self._stream, FEATURES.arrow_schema, compression="zstd")
        self._writer.write_batch(pyarrow.RecordBatch.from_pylist(self._buffer, FEATURES.arrow_schema))
        self._buffer, self._size = [], 0
        if self._stream.tell() >= SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        self._writer.close()
        self._stream.close()
        self._writer, self._shard = None, self._shard + 1

    def close(self) -> None:
        if self._buffer:
            self._flush()
        if self._writer is not None:
            self._close_shard()

    def table(self) -> dict[str, Any]:
        return {"rows": self.rows, "fingerprint": self._ordered.hexdigest(), "content": f"{self._sum:032x}"}


@contextmanager
def split_writers(folder: str) -> Iterator[dict[str, SplitWriter]]:
    """A writer for each split; a split without rows leaves no file."""
    writers = {split: SplitWriter(folder, split) for split in SPLITS}
    yield writers
    for writer in writers.values():
        writer.close()


def is_local(path: str) -> bool:
    """Whether `path` is on this machine's file system."""
    return "://" not in path


def check_output(output: str) -> None:
    """Raise unless `output` can become a new folder."""
    filesystem, _, (path,) = fsspec.get_fs_token_paths(output)
    if filesystem.exists(path) and (not filesystem.isdir(path) or filesystem.ls(path)):
        raise ValueError(f"`output` must be a new or empty folder, got {output!r}; remove it or name another.")


@contextmanager
def finished_folder(output: str) -> Iterator[str]:
    """A folder to write in, which becomes `output` only when all went well.

    On this machine: a temporary folder beside it, renamed at the end. Elsewhere there is no such rename: what is
        written there counts as finished once it holds its table, which is written last.
    """
    check_output(output)
    if not is_local(output):
        yield output.rstrip("/")
        return
    target = Path(output).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent)
    try:
        yield partial
        os.chmod(partial, 0o755)
        # replaces an empty folder of that name
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: str, text: str) -> None:
    """Write a small file in one go."""
    with fsspec.open(path, "w", encoding="utf-8", auto_mkdir=True) as stream:
        stream.write(text)


def read_table(folder: str) -> dict[str, Any]:
    """The build table of a finished folder.

    Raises:
        ValueError: there is none, so the folder is not finished, or not made by a build.
    """
    filesystem, _, (path,) = fsspec.get_fs_token_paths(f"{folder.rstrip('/')}/{TABLE}")
    if not filesystem.exists(path):
        raise ValueError(f"{folder} holds no {TABLE}: it is not a finished build; run scripts/build_dataset.py.")
    return json.loads(filesystem.cat_file(path))
