"""Rows as Parquet files, a folder at a time; a folder that was not finished is never taken for one that was."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet

from dataset_builders.schema import FEATURES, Row
from dataset_builders.splits import SPLITS

TABLE = "build.json"
_GROUP_ROWS, _GROUP_CHARACTERS = 1000, 1_000_000
SHARD_BYTES = 500_000_000


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
