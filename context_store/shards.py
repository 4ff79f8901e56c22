"""Shards: immutable safetensors files of many documents (each a `ContextCache` file), mapped, checked, sliced.

A document's checksum covers its slice of every tensor, so one document can be checked without reading its shard.
"""

import json
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
# bytes from which a copy is worth huge pages
HUGE = 4 << 20
SUFFIXES = ("", ".scale", ".zero")
# bytes of a header that are not states, at most: its fields, and `offsets`, `rows`, `row_offsets` of each document
HEADER_BYTES, DOCUMENT_BYTES = 4096, 24


class DamagedShardError(ValueError):
    """A shard that is cut short, altered or gone."""


@dataclass(frozen=True)
class Part:
    """Where one tensor lies in a shard: first byte, bytes a token, dtype and shape."""

    offset: int
    token_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


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
    for name in next(names for names in LAYOUTS.values() if names[0] in parts):
        stored = [parts[name + suffix] for suffix in SUFFIXES if name + suffix in parts]
        states[name] = stored[0] if len(stored) == 1 else QuantizedTensor(*stored)
    return ContextCache(states, offsets, parts["token_ids"], fingerprint, rows)


def checksum(buffers: Iterable) -> bytes:
    """128-bit checksum of buffers, one after the other."""
    digest = xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return digest.digest()


def document_checksums(cache: ContextCache) -> list[bytes]:
    """The checksum of each document of `cache`."""
    parts = [tensor.contiguous() for _, tensor in sorted(state_parts(cache).items())]
    raw = [(part.reshape(-1).view(torch.uint8).numpy(), prod(part.shape[1:]) * part.element_size()) for part in parts]
    spans = zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    return [checksum(data[start * size : end * size] for data, size in raw) for start, end in spans]


def _umask() -> int:
    # the umask can only be read by setting it; /proc tells it without
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o022)


def write_shard(path: Path, cache: ContextCache) -> tuple[int, bytes]:
    """Write a shard durably: temporary file, fsync, rename, fsync of the folder.

    Returns:
        The file's size and the checksum of its header.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        cache.save(path)
        # safetensors makes files that only their owner may read
        path.chmod(0o666 & ~_umask())
    except OSError:
        raise
    except Exception as error:
        # safetensors reports a full disk as an error of its own
        if "I/O" not in str(error) and "os error" not in str(error):
            raise
        raise OSError(f"{path} could not be written: {error}.") from error
    sync_folder(path.parent)
    return path.stat().st_size, MappedShard.header_checksum(path)


def read_header(file) -> bytes:
    """The first bytes of a safetensors file: length and JSON."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > 100_000_000:
        raise DamagedShardError("no safetensors header")
    return head + file.read(size)


def parse_header(header: bytes) -> dict[str, Part]:
    """The parts with one row a token that a header names."""
    parts = {}
    for name, entry in json.loads(header[8:]).items():
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

    def __init__(self, path: Path, nbytes: int, header_checksum: bytes):
        self.path, self.nbytes = path, nbytes
        self.verified: set[int] = set()
        try:
            with open(path, "rb") as file:
                self._modified = self._check_size(os.fstat(file.fileno()))
                header = read_header(file)
                if checksum([header]) != header_checksum:
                    raise DamagedShardError(f"{path} has an altered header.")
                # private and writable: torch warns about read-only buffers, and nothing we do reaches the file
                self._map = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path} is gone.") from error
        self.parts = parse_header(header)
        self.names = sorted(self.parts)
        self.tensors = {name: self._tensor(part) for name, part in self.parts.items()}

    @staticmethod
    def header_checksum(path: Path) -> bytes:
        """The checksum of a shard's header."""
        with open(path, "rb") as file:
            return checksum([read_header(file)])

    def _check_size(self, status: os.stat_result) -> int:
        if status.st_size != self.nbytes:
            raise DamagedShardError(f"{self.path} has {status.st_size} bytes, the catalogue says {self.nbytes}.")
        return status.st_mtime_ns

    def _tensor(self, part: Part) -> Tensor:
        count = prod(part.shape)
        if not count:
            return torch.empty(part.shape, dtype=part.dtype)
        return torch.frombuffer(self._map, dtype=part.dtype, count=count, offset=part.offset).view(part.shape)

    def check(self) -> None:
        """Look whether the file was cut or written to since it was mapped; what was verified then no longer is.

        Raises:
            DamagedShardError: cut short or gone: touching the map would kill the process.
        """
        try:
            modified = self._check_size(os.stat(self.path))
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self.path} is gone.") from error
        if modified != self._modified:
            self.verified.clear()
            self._modified = modified

    def spans(self, start: int, tokens: int) -> list[tuple[int, int]]:
        """First and last byte of each part of a document, in the order of its checksum."""
        parts = (self.parts[name] for name in self.names)
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


def join_tokens(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` along the tokens; large ones into memory of numpy, which asks for huge pages: fewer page faults."""
    first = tensors[0]
    if sum(tensor.nbytes for tensor in tensors) < HUGE:
        return torch.cat(tensors)
    raw = numpy.concatenate([tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors])
    return torch.from_numpy(raw).view(first.dtype).view(-1, *first.shape[1:])


def gather(spans: Sequence[tuple[MappedShard, int, int]]) -> dict[str, Tensor]:
    """The tokens `(shard, start, tokens)` back to back: views where they lie so, else one copy."""
    first, start = spans[0][0], spans[0][1]
    position = start
    for shard, begin, tokens in spans:
        if shard is not first or begin != position:
            break
        position += tokens
    else:
        return {name: tensor[start:position] for name, tensor in first.tensors.items()}
    return {
        name: join_tokens([shard.tensors[name][begin : begin + n] for shard, begin, n in spans])
        for name in first.names
    }


def offsets_of(lengths: Iterable[int]) -> tuple[int, ...]:
    """Cumulated lengths, from 0."""
    return tuple(accumulate(lengths, initial=0))
