"""Shards: immutable safetensors files of many contexts, written in one pass, mapped, checked, sliced.

A context's checksum covers its slice of every tensor, so one context can be checked without reading its shard: it is
compared when a context is first read through an open shard, and again if the file was written to since.
"""

import json
import mmap
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from secrets import token_hex

import numpy
import torch
from torch import Tensor
from xxhash import xxh3_128

from xcllama.durable import durable

SUFFIX = ".safetensors"
FORMAT = "xcllama-context-shard"
PAGE = mmap.ALLOCATIONGRANULARITY
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}
# what a shard may hold, one row a token
NAMES = {f"{name}{suffix}" for name in ("hidden", "key", "value") for suffix in ("", ".scale", ".zero")}
NAMES.add("token_ids")
# bytes of a header, at most; the states behind it start at a multiple of ALIGNMENT
HEADER_BYTES, ALIGNMENT = 4096, 64
# the most that one system call takes
WRITES_AT_ONCE = os.sysconf("SC_IOV_MAX")


class DamagedShardError(ValueError):
    """A shard that is cut short, altered or gone."""


def new_shard_name() -> str:
    """A file name no other writer uses."""
    return token_hex(12) + SUFFIX


@dataclass(frozen=True)
class Part:
    """Where one tensor lies in a shard: first byte, bytes a token, dtype and shape."""

    offset: int
    token_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, raw: numpy.ndarray) -> numpy.ndarray:
        """The part in the bytes of its shard, uint8 `[tokens, token_bytes]`."""
        count = self.shape[0] * self.token_bytes
        return raw[self.offset : self.offset + count].reshape(self.shape[0], self.token_bytes)

    def tensor(self, rows: numpy.ndarray) -> Tensor:
        """Such rows in the part's dtype and shape; a view."""
        tensor = torch.from_numpy(rows).view(self.dtype)
        return tensor if len(self.shape) == 2 else tensor.view(-1, *self.shape[1:])


def checksum(buffers: Iterable) -> bytes:
    """128-bit checksum of buffers, one after the other."""
    digest = xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return digest.digest()


def _bytes_of(tensor: Tensor) -> numpy.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def parts_checksum(parts: Mapping[str, Tensor]) -> bytes:
    """The checksum of one context's tensors."""
    return checksum(_bytes_of(part) for _, part in sorted(parts.items()))


def describe(parts: Mapping[str, Tensor]) -> str:
    """Names, dtypes and widths of a context's tensors, as text: all contexts of a namespace have the same."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return json.dumps({name: [names[part.dtype], *part.shape[1:]] for name, part in sorted(parts.items())})


def dtype_of(kind: str) -> str:
    """The dtype of states that `describe` described: "bfloat16", "int8", "int4", ..."""
    states = [entry[0] for name, entry in json.loads(kind).items() if name in ("hidden", "key")]
    return {"I8": "int8", "U8": "int4"}.get(states[0]) or str(DTYPES[states[0]]).removeprefix("torch.")


def write_shard(path: Path, parts: Sequence[Mapping[str, Tensor]], fingerprint: str) -> tuple[int, bytes]:
    """Write a shard durably and in one pass.

    Args:
        path: of the shard.
        parts: the tensors `[tokens, ...]` of each context by name, in the order they are to lie in.
        fingerprint: of the states, for the header.

    Returns:
        The file's size and the checksum of its header.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    columns = {
        name: [part[name] for part in parts] for name in sorted(parts[0], key=lambda name: _key(parts[0][name]))
    }
    header, nbytes = _header(columns, fingerprint)
    with durable(path) as file:
        _write_all(file, [header, *(_bytes_of(piece) for pieces in columns.values() for piece in pieces)])
    return len(header) + nbytes, checksum([header])


def _key(piece: Tensor) -> tuple[bool, int]:
    """Rows of whole cache lines first (copying others takes a tenth longer), then wide numbers: all are aligned."""
    return bool(prod(piece.shape[1:]) * piece.itemsize % ALIGNMENT), -piece.itemsize


def _write_all(file, buffers: Sequence) -> None:
    """Write buffers one after the other, many in a call: the page cache then holds the file in large blocks.

    Reading those costs a quarter less than reading what was written context by context.
    """
    waiting = deque(view.cast("B") for view in map(memoryview, buffers) if view.nbytes)
    while waiting:
        written = os.writev(file.fileno(), list(islice(waiting, WRITES_AT_ONCE)))
        while waiting and written >= waiting[0].nbytes:
            written -= waiting.popleft().nbytes
        if written:
            waiting[0] = waiting[0][written:]


def _header(columns: Mapping[str, Sequence[Tensor]], fingerprint: str) -> tuple[bytes, int]:
    """The safetensors header of a shard, padded, and the bytes behind it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    fields: dict = {"__metadata__": {"format": FORMAT, "fingerprint": fingerprint}}
    end = 0
    for name, pieces in columns.items():
        begin, end = end, end + sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
        fields[name] = {"dtype": names[pieces[0].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, end


def read_header(file) -> bytes:
    """The first bytes of a safetensors file: length and JSON.

    Raises:
        DamagedShardError: no such file.
    """
    head = file.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > HEADER_BYTES:
        raise DamagedShardError("no header of a shard")
    return head + file.read(size)


def parse_header(header: bytes, nbytes: int) -> dict[str, Part]:
    """The parts that a header names, by name in alphabetical order; nothing in it is trusted.

    Raises:
        DamagedShardError: other tensors, or ones that do not fit into a file of `nbytes`.
    """
    try:
        entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
        parts = {}
        for name, entry in sorted(entries.items()):
            (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), DTYPES[entry["dtype"]]
            token_bytes = prod(shape[1:]) * dtype.itemsize
            fits = 0 <= begin <= end <= nbytes - len(header) and end - begin == shape[0] * token_bytes
            if name not in NAMES or min(shape) < 0 or len(shape) > 4 or not fits:
                raise ValueError(f"{name!r:.40} with shape {shape} at {begin}")
            parts[name] = Part(len(header) + begin, token_bytes, dtype, shape)
        if "token_ids" not in parts or len({part.shape[0] for part in parts.values()}) != 1:
            raise ValueError(f"tensors {sorted(parts)} of different lengths")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DamagedShardError(f"no header of a shard: {error}") from error
    return parts


def fits(parts: Mapping[str, Part], place) -> bool:
    """Whether a context (`start` and `tokens`) lies within a shard."""
    return place.start >= 0 <= place.tokens and place.start + place.tokens <= parts["token_ids"].shape[0]


def spans_of(parts: Mapping[str, Part], place) -> list[tuple[int, int]]:
    """First and last byte of each part of a context, in the order of its checksum."""
    return [
        (part.offset + place.start * part.token_bytes, part.offset + (place.start + place.tokens) * part.token_bytes)
        for part in parts.values()
    ]


class MappedShard:
    """A shard in memory by `mmap`: nothing is read before it is used.

    A context (a `catalogue.Location`) is compared with its checksum when it is first fetched.

    Raises:
        DamagedShardError: the file is gone, has another size or another header than the catalogue says.
    """

    def __init__(self, path: Path, nbytes: int, header_checksum: bytes):
        self.path, self.nbytes = path, nbytes
        self._verified: set = set()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path} is gone.") from error
        self._modified = self._status().st_mtime_ns
        header = read_header(self._file)
        if checksum([header]) != header_checksum:
            raise DamagedShardError(f"{path} has an altered header.")
        self.parts = parse_header(header, nbytes)
        # private and writable: torch warns about read-only buffers, and nothing we do reaches the file
        self._map = mmap.mmap(self._file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        raw = numpy.frombuffer(self._map, numpy.uint8)
        self.rows = {name: part.rows(raw) for name, part in self.parts.items()}
        self.tensors = {name: part.tensor(self.rows[name]) for name, part in self.parts.items()}

    def _status(self) -> os.stat_result:
        """Of the file that is open, which must be there in its size."""
        status = os.fstat(self._file.fileno())
        if not status.st_nlink:
            raise DamagedShardError(f"{self.path} is gone.")
        if status.st_size != self.nbytes:
            raise DamagedShardError(f"{self.path} has {status.st_size} bytes, the catalogue says {self.nbytes}.")
        return status

    @property
    def is_deleted(self) -> bool:
        """Whether the file has no name any more."""
        return not os.fstat(self._file.fileno()).st_nlink

    def check(self) -> None:
        """Look whether the file is as it was when it was mapped.

        Raises:
            DamagedShardError: gone, written to, or cut short: touching the map would kill the process.
        """
        if self._status().st_mtime_ns != self._modified:
            raise DamagedShardError(f"{self.path} was written to.")

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def fetch(self, places: Sequence) -> dict:
        """The rows of each part of contexts by their places: of those that are as their checksums say."""
        inside = [place for place in places if fits(self.parts, place)]
        fresh = [place for place in inside if place not in self._verified]
        for place in fresh:
            for begin, end in spans_of(self.parts, place):
                # what is read for the first time comes in large reads instead of page by page
                if begin < end:
                    self._map.madvise(mmap.MADV_WILLNEED, begin - begin % PAGE, end - begin + begin % PAGE)
        view = memoryview(self._map)
        for place in fresh:
            if checksum(view[begin:end] for begin, end in spans_of(self.parts, place)) == place.checksum:
                self._verified.add(place)
        return {place: self._slice(self.rows, place) for place in inside if place in self._verified}

    @staticmethod
    def _slice(columns: Mapping, place) -> dict:
        return {name: column[place.start : place.start + place.tokens] for name, column in columns.items()}

    def context(self, place) -> dict[str, Tensor]:
        """Views of a context's tensors, as `write_shard` takes them."""
        return self._slice(self.tensors, place)
