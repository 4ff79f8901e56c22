"""Source files as streams of records, through fsspec (local, http, s3, hf), plain or compressed; data sets on the Hub.

On the Hub a source is `organisation/name`, with `:configuration` and `@split` where they matter.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import datasets
import fsspec
import ijson
import pyarrow
import pyarrow.parquet

from dataset_builders.json_position import BLOCK, record_line, syntax_error_position
from dataset_builders.schema import RecordError

_PARQUET_BATCH = 64
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.+-]+))?")
_FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".gz", ".whl")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# in JSON: a surrogate pair, half of one, or another escape
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
# a noncharacter that stands for half a surrogate pair while a document is parsed
_HALF_PAIR = "\ufdd0"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class SourceError(ValueError):
    """A file, or a record in it, that cannot be read: names file, place (line or record) and field."""

    def __init__(self, file: str, place: str, problem: str, field: str = ""):
        super().__init__(f"{file}{', ' + place if place else ''}: {problem}")
        self.file, self.place, self.problem, self.field = file, place, problem, field

    def __reduce__(self) -> tuple:
        # errors travel from worker processes
        return SourceError, (self.file, self.place, self.problem, self.field)


@dataclass(frozen=True)
class Record:
    """One record of a file and where it stands; JSON lines are parsed on demand, in the process that needs them."""

    file: str
    place: str
    content: Any
    # where the records of a JSON document are, and which of them this is
    prefix: str = ""
    number: int = 0

    def located(self) -> str:
        """The place with its line, which costs reading a JSON document once more."""
        if not self.prefix:
            return self.place
        return f"{self.place} (line {record_line(partial(open_json, self.file), self.prefix, self.number)})"

    def without_content(self) -> "Record":
        """The place alone."""
        return replace(self, content=None)

    def value(self) -> Any:
        """The parsed record.

        Raises:
            RecordError: not UTF-8, or not JSON.
        """
        if not isinstance(self.content, bytes):
            return self.content
        try:
            return json.loads(self.content)
        except UnicodeDecodeError as error:
            raise RecordError(
                "line", f"is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
            ) from None
        except json.JSONDecodeError as error:
            raise RecordError("line", f"is not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise RecordError("line", f"is not JSON that can be read: {error}") from None


def file_records(path: str, read_json: Callable[[str], Iterator[Record]] | None = None) -> Iterator[Record]:
    """The records of all files that `path` names: Parquet, JSON lines, or a JSON document read by `read_json`.

    Raises:
        SourceError: nothing to read there, or a suffix that says something else.
    """
    for file in expand_paths(path):
        name = file.split("?")[0].removesuffix(".gz")
        if name.endswith(".parquet"):
            yield from parquet_rows(file)
        elif name.endswith((".jsonl", ".ndjson")):
            with open_stream(file) as stream:
                yield from json_lines(stream, file)
        elif name.endswith(".json") and read_json is not None:
            yield from read_json(file)
        else:
            kinds = ".jsonl, .parquet" + (", .json" if read_json else "")
            raise SourceError(file, "", f"has none of the expected suffixes ({kinds}; .gz may follow)")


def parquet_rows(path: str) -> Iterator[Record]:
    """The rows of a Parquet file, a small batch in memory at a time.

    Raises:
        SourceError: not a Parquet file, truncated, or without rows.
    """
    count = 0
    with open_stream(path) as stream:
        try:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    count += 1
                    yield Record(path, f"row {count}", row)
        except (pyarrow.ArrowInvalid, OSError) as error:
            place = f"row {count + 1}" if count else ""
            raise SourceError(path, place, f"broken Parquet: {str(error).splitlines()[0]}") from None
    if not count:
        raise SourceError(path, "", "is empty")


def expand_paths(path: str) -> list[str]:
    """The files that `path` names: itself, or the sorted matches of its `*`.

    Raises:
        SourceError: nothing there, or a directory.
    """
    filesystem, _, _ = fsspec.get_fs_token_paths(path)
    if "*" in path:
        if not (found := sorted(filesystem.glob(path))):
            raise SourceError(path, "", "no file matches")
        return [filesystem.unstrip_protocol(name) if "://" in path else name for name in found]
    if not path.startswith(("http://", "https://")):
        if filesystem.isdir(path):
            raise SourceError(
                path, "", f"is a directory; name a file, or a pattern such as {path.rstrip('/')}/*.jsonl.gz"
            )
        if not filesystem.exists(path):
            raise SourceError(path, "", "does not exist")
    return [path]


def broken_json(path: str, error: Exception) -> SourceError:
    """The error for a JSON document that does not parse, with its place."""
    position = syntax_error_position(partial(open_json, path))
    if position is None:
        return SourceError(path, "", "is empty")
    reason = str(error).split("\n")[0].strip() or type(error).__name__
    return SourceError(path, f"line {position[0]}, column {position[1]}", f"is not JSON: {reason}")


@contextmanager
def open_stream(path: str) -> Iterator[BinaryIO]:
    """Open `path` for reading bytes, decompressed by its suffix."""
    with fsspec.open(path, "rb", compression="infer") as stream:
        yield stream


@contextmanager
def open_text(path: str) -> Iterator[BinaryIO]:
    """As `open_stream`, behind the byte-order mark that some editors write."""
    with open_stream(path) as stream:
        buffered = io.BufferedReader(stream)
        if buffered.peek(3).startswith(_BYTE_ORDER_MARK):
            buffered.read(3)
        yield buffered


@contextmanager
def open_json(path: str) -> Iterator["_JsonStream"]:
    """As `open_text`, for the parser of JSON documents."""
    with open_text(path) as stream:
        yield _JsonStream(stream)


class _JsonStream:
    """The bytes of a JSON document in which half a surrogate pair is written as `_HALF_PAIR`.

    The parser would make "?" of it, or a letter with what comes next. The length stays, so that places stay right.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self._marked = stream, False

    def read(self, size: int = -1) -> bytes:
        """The next block, somewhat longer than `size` where an escape would be cut in two."""
        block = self._stream.read(size)
        while b"\\" in block[-12:] and (more := self._stream.read(64)):
            block += more
        return _ESCAPE.sub(self._mark, block) if _SURROGATE.search(block) else block

    def _mark(self, escape: re.Match[bytes]) -> bytes:
        self._marked = self._marked or bool(escape["half"])
        return _HALF_PAIR.encode("ascii", "backslashreplace") if escape["half"] else escape[0]

    def restored(self, value: Any) -> Any:
        """A parsed value as the document has it: with half a pair, which the checks of rows refuse."""
        if not self._marked:
            return value
        if isinstance(value, str):
            return value.replace(_HALF_PAIR, "\ud800")
        if isinstance(value, dict):
            return {self.restored(name): self.restored(item) for name, item in value.items()}
        return [self.restored(item) for item in value] if isinstance(value, list) else value


@contextmanager
def broken_compression(file: str, count: list[int], unit: str) -> Iterator[None]:
    """Turn what a broken compressed stream raises into an error that names the place reached."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = "truncated gzip" if isinstance(error, EOFError) else f"broken gzip: {error}"
        raise SourceError(file, f"{unit} {count[0] + 1}", problem) from None


def json_lines(stream: BinaryIO, file: str) -> Iterator[Record]:
    """The records of a JSON lines stream, blank lines skipped.

    Raises:
        SourceError: truncated compression, or no record at all.
    """
    count, found = [0], False
    with broken_compression(file, count, "line"):
        for line in stream:
            count[0] += 1
            if line.strip():
                found = True
                yield Record(file, f"line {count[0]}", line)
    if not found:
        raise SourceError(file, "", "is empty")


def json_items(path: str, prefix: str) -> Iterator[Record]:
    """The records of a JSON document at `prefix` (as ijson writes it: "item", "data.item"), never all in memory.

    Raises:
        SourceError: truncated compression, broken JSON (with its line), an empty file, or nothing at `prefix`.
    """
    count = [0]
    with broken_compression(path, count, "record"), open_json(path) as stream:
        try:
            for item in ijson.items(stream, prefix, use_float=True, buf_size=BLOCK):
                count[0] += 1
                yield Record(path, f"record {count[0]}", stream.restored(item), prefix, count[0])
        except ijson.JSONError as error:
            raise broken_json(path, error) from None
    if not count[0]:
        raise SourceError(path, "", f"holds no record at `{prefix}`", prefix)


def json_columns(path: str, names: tuple[str, ...]) -> Iterator[Record]:
    """The records of a column-oriented JSON document ({"column": {"key": value}}), read in lockstep.

    One stream a column, so that memory does not grow with the file.

    Raises:
        SourceError: as `json_items`; also columns whose keys differ.
    """
    columns = [_column(path, name) for name in names]
    for index, first in enumerate(columns[0], start=1):
        pairs = [first, *(next(column, None) for column in columns[1:])]
        for name, pair in zip(names, pairs, strict=True):
            if pair is None or pair[0] != first[0]:
                got = "nothing" if pair is None else repr(pair[0])
                problem = f"`{name}` has {got} where `{names[0]}` has key {first[0]!r}"
                raise SourceError(path, f"record {index}", problem, name)
        yield Record(path, f"record {index}", {name: pair[1] for name, pair in zip(names, pairs, strict=True)})


def _column(path: str, name: str) -> Iterator[tuple[str, Any]]:
    count = [0]
    with broken_compression(path, count, "record"), open_json(path) as stream:
        try:
            for pair in ijson.kvitems(stream, name, use_float=True, buf_size=BLOCK):
                count[0] += 1
                yield stream.restored(pair[0]), stream.restored(pair[1])
        except ijson.JSONError as error:
            raise broken_json(path, error) from None
    if not count[0]:
        raise SourceError(path, "", f"holds no column `{name}`", name)


@dataclass(frozen=True)
class HubLocation:
    """Where a source lives on the Hub, and what of it is read by default."""

    repo: str
    config: str | None = None
    split: str | None = None


def parse_hub_id(path: str) -> HubLocation | None:
    """`path` as a place on the Hub; None when it names a file."""
    match = _HUB_ID.fullmatch(path)
    if match is None or os.path.exists(path) or path.endswith(_FILE_SUFFIXES) or "*" in path:
        return None
    return HubLocation(match["repo"], match["config"], match["split"])


def hub_records(location: HubLocation, default: HubLocation | None = None) -> Iterator[Record]:
    """Stream the rows of a Hub data set; what `location` leaves open is taken from `default`.

    Raises:
        SourceError: no such repository, configuration or split, or no access to it.
    """
    default = default or location
    config, split = location.config or default.config, location.split or default.split or "train"
    name = f"{location.repo}{':' + config if config else ''}@{split}"
    try:
        rows = datasets.load_dataset(location.repo, config, split=split, streaming=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise SourceError(name, "", f"cannot be read from the Hub: {str(error).splitlines()[0]}") from error
    count = 0
    for count, row in enumerate(rows, start=1):
        yield Record(name, f"row {count}", row)
    if not count:
        raise SourceError(name, "", "is empty")
