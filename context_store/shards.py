"""Shards: immutable safetensors files of many documents, written in one pass, mapped, checked, sliced.

A document's checksum covers its slice of every tensor, so one document can be checked without reading its shard: it
is compared when a document is first read through an open shard, and again if the file was written to since.
"""

import json
import mmap
import os
import secrets
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod
from pathlib import Path

import numpy
import torch
from torch import Tensor
from xxhash import xxh3_128

from modeling_xcllama.context_cache import LAYOUTS, ContextCache, QuantizedTensor

from .schema import sync_folder

PAGE = mmap.ALLOCATIONGRANULARITY
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
SUFFIXES = ("", ".scale", ".zero")
FORMAT = "xcllama-context-shard"
# bytes of a header, at most; the states behind it start at a multiple of ALIGNMENT
HEADER_BYTES, ALIGNMENT = 4096, 64
# the most that one system call takes
WRITES_AT_ONCE = os.sysconf("SC_IOV_MAX")


class DamagedShardError(ValueError):
    """A shard that is cut short, altered or gone."""


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


def state_parts(cache: ContextCache) -> dict[str, Tensor]:
    """The tensors of a cache that have one row a token, by their names in a file."""
    parts = {"token_ids": cache.token_ids}
    for name, state in cache.states.items():
        tensors = (state,) if isinstance(state, Tensor) else state.tensors()
        parts |= {name + suffix: tensor for suffix, tensor in zip(SUFFIXES, tensors, strict=False)}
    return parts


def cache_of_parts(
    parts: dict[str, Tensor], offsets: tuple[int, ...], fingerprint: str, rows: tuple | None = None
) -> ContextCache:
    """The inverse of `state_parts`."""
    states = {}
    for name in LAYOUTS["hidden" if "hidden" in parts else "condensed"]:
        stored = [parts[name + suffix] for suffix in SUFFIXES if name + suffix in parts]
        states[name] = stored[0] if len(stored) == 1 else QuantizedTensor(*stored)
    return ContextCache(states, offsets, parts["token_ids"], fingerprint, rows)


def checksum(buffers: Iterable) -> bytes:
    """128-bit checksum of buffers, one after the other."""
    digest = xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return digest.digest()


def _bytes_of(tensor: Tensor) -> numpy.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def document_checksums(cache: ContextCache) -> list[bytes]:
    """The checksum of each document of `cache`."""
    raw = [(_bytes_of(part), prod(part.shape[1:]) * part.itemsize) for _, part in sorted(state_parts(cache).items())]
    spans = zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    return [checksum(data[start * size : end * size] for data, size in raw) for start, end in spans]


def write_shard(path: Path, parts: Mapping[str, Sequence[Tensor]], fingerprint: str) -> tuple[int, bytes]:
    """Write a shard durably and in one pass: temporary file, fsync, rename, fsync of the folder.

    Args:
        path: of the shard.
        parts: by name the rows of each document, `[tokens, ...]`, in the order they are to lie in.
        fingerprint: of the states, for the header.

    Returns:
        The file's size and the checksum of its header.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    header, nbytes = _header(parts, fingerprint)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            _write_all(file, [header, *(_bytes_of(piece) for name in _order(parts) for piece in parts[name])])
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return len(header) + nbytes, checksum([header])


def _write_all(file, buffers: Sequence) -> None:
    """Write buffers one after the other, many in a call: the page cache then holds the file in large blocks.

    Reading those costs a quarter less than reading what was written document by document.
    """
    waiting = deque(view.cast("B") for view in map(memoryview, buffers) if view.nbytes)
    while waiting:
        written = os.writev(file.fileno(), list(islice(waiting, WRITES_AT_ONCE)))
        while waiting and written >= waiting[0].nbytes:
            written -= waiting.popleft().nbytes
        if written:
            waiting[0] = waiting[0][written:]


def _order(parts: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """Rows of whole cache lines first (copying others takes a tenth longer), then wide numbers: all are aligned."""

    def key(name: str) -> tuple[bool, int]:
        piece = parts[name][0]
        return bool(prod(piece.shape[1:]) * piece.itemsize % ALIGNMENT), -piece.itemsize

    return sorted(parts, key=key)


def _header(parts: Mapping[str, Sequence[Tensor]], fingerprint: str) -> tuple[bytes, int]:
    """The safetensors header of a shard, padded, and the bytes behind it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    fields: dict = {"__metadata__": {"format": FORMAT, "fingerprint": fingerprint}}
    end = 0
    for name in _order(parts):
        pieces = parts[name]
        begin, end = end, end + sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
        fields[name] = {"dtype": names[pieces[0].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, end


def read_header(file) -> bytes:
    """The first bytes of a safetensors file: length and JSON."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > 100_000_000:
        raise DamagedShardError("no safetensors header")
    return head + file.read(size)


def parse_header(header: bytes) -> dict[str, Part]:
    """The parts with one row a token that a header names, by name: checksums and views count on that order."""
    parts = {}
    for name, entry in sorted(json.loads(header[8:]).items()):
        # older shards have lists of documents too
        if name.removesuffix(".scale").removesuffix(".zero") in ("token_ids", "hidden", "key", "value"):
            shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
            size = prod(shape[1:]) * dtype.itemsize
            parts[name] = Part(len(header) + entry["data_offsets"][0], size, dtype, shape)
    return parts


class MappedShard:
    """A shard in memory by `mmap`: nothing is read before it is used.

    Raises:
        DamagedShardError: the file is gone, has another size or another header than the catalogue says.
    """

    writable = False

    def __init__(self, path: Path, nbytes: int, header_checksum: bytes):
        self.path, self.nbytes = path, nbytes
        self.verified: set[int] = set()
        try:
            self._file = open(path, "r+b" if self.writable else "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path} is gone.") from error
        self._descriptor = self._file.fileno()
        self._modified = self._status().st_mtime_ns
        header = read_header(self._file)
        if checksum([header]) != header_checksum:
            raise DamagedShardError(f"{path} has an altered header.")
        # private and writable: torch warns about read-only buffers, and nothing we do reaches the file
        self._map = mmap.mmap(self._descriptor, nbytes, access=mmap.ACCESS_COPY)
        self.parts = parse_header(header)
        raw = numpy.frombuffer(self._map, numpy.uint8)
        self.rows = {name: part.rows(raw) for name, part in self.parts.items()}
        self.tensors = {name: part.tensor(self.rows[name]) for name, part in self.parts.items()}

    @staticmethod
    def header_checksum(path: Path) -> bytes:
        """The checksum of a shard's header."""
        with open(path, "rb") as file:
            return checksum([read_header(file)])

    def _status(self) -> os.stat_result:
        """Of the file that is open, which must be there in its size."""
        status = os.fstat(self._descriptor)
        if not status.st_nlink:
            raise DamagedShardError(f"{self.path} is gone.")
        if status.st_size != self.nbytes:
            raise DamagedShardError(f"{self.path} has {status.st_size} bytes, the catalogue says {self.nbytes}.")
        return status

    @property
    def is_deleted(self) -> bool:
        """Whether the file has no name any more."""
        return not os.fstat(self._descriptor).st_nlink

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

    def spans(self, start: int, tokens: int) -> list[tuple[int, int]]:
        """First and last byte of each part of a document, in the order of its checksum."""
        parts = self.parts.values()
        return [(p.offset + start * p.token_bytes, p.offset + (start + tokens) * p.token_bytes) for p in parts]

    def prefetch(self, start: int, tokens: int) -> None:
        """Tell the kernel that a document will be read: its pages come in large reads instead of one by one."""
        for begin, end in self.spans(start, tokens):
            page = begin - begin % PAGE
            if end > begin:
                self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def document_checksum(self, start: int, tokens: int) -> bytes:
        """The checksum of a document's bytes as they are now."""
        view = memoryview(self._map)
        return checksum(view[begin:end] for begin, end in self.spans(start, tokens))

    def load(self, documents: Sequence[tuple[int, int, bytes]]) -> None:
        """Prepare to read documents (start, tokens, checksum) for the first time."""
        for start, tokens, _ in documents:
            self.prefetch(start, tokens)

    def verify(self, start: int, tokens: int, expected: bytes) -> bool:
        """Whether a document's bytes have the `expected` checksum."""
        return self.document_checksum(start, tokens) == expected

    def document_bytes(self, tokens: int) -> int:
        """Bytes of a document of so many tokens."""
        return tokens * sum(part.token_bytes for part in self.parts.values())


def slices(spans: Sequence[tuple[MappedShard, int, int]]) -> dict[str, list[Tensor]]:
    """Views of the tokens `(shard, start, tokens)`, as `write_shard` takes them."""
    return {name: [shard.tensors[name][begin : begin + n] for shard, begin, n in spans] for name in spans[0][0].parts}


def offsets_of(lengths: Iterable[int]) -> tuple[int, ...]:
    """Cumulated lengths, from 0."""
    return tuple(accumulate(lengths, initial=0))
