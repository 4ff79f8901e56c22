"""Where each document's states lie, in memory: sorted arrays of about 50 bytes a document and a small overlay."""

from hashlib import blake2b
from typing import NamedTuple

import numpy

MERGE_EVERY = 8192
FIELDS = numpy.dtype(
    [
        ("high", "u8"),
        ("low", "u8"),
        ("document", "i8"),
        ("start", "i8"),
        ("expires", "f8"),
        ("shard", "i4"),
        ("tokens", "i4"),
    ]
)


class Location(NamedTuple):
    """A document's number in the catalogue, its shard and its tokens there; `expires` in seconds of the epoch."""

    document: int
    shard: int
    start: int
    tokens: int
    expires: float


def _key(document_id: str) -> bytes:
    return blake2b(document_id.encode(), digest_size=16).digest()


class Locations:
    """A map from id to `Location` that stays small: ids are kept as 128-bit digests.

    Args:
        merge_every: changes (and an eighth of the table) that are kept apart before they are sorted in.
    """

    def __init__(self, merge_every: int = MERGE_EVERY):
        self._merge_every = merge_every
        self._table = numpy.empty(0, FIELDS)
        # contiguous: a search in a strided column would copy it
        self._high = numpy.empty(0, numpy.uint64)
        self._overlay: dict[bytes, Location | None] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._table.nbytes

    def get(self, document_id: str) -> Location | None:
        """The location of a document, None where there is none."""
        return self._find(_key(document_id))

    def _find(self, key: bytes) -> Location | None:
        if key in self._overlay:
            return self._overlay[key]
        high, low = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        column = self._high
        index = int(column.searchsorted(numpy.uint64(high)))
        while index < len(column) and int(column[index]) == high:
            row = self._table[index]
            if int(row["low"]) == low:
                return Location(
                    int(row["document"]),
                    int(row["shard"]),
                    int(row["start"]),
                    int(row["tokens"]),
                    float(row["expires"]),
                )
            index += 1
        return None

    def set(self, document_id: str, location: Location | None) -> None:
        """Record where a document lies, or with None that it is gone."""
        key = _key(document_id)
        self._count += (location is not None) - (self._find(key) is not None)
        self._overlay[key] = location
        if len(self._overlay) > self._merge_every + len(self._table) // 8:
            self._merge()

    def _merge(self) -> None:
        gone = numpy.array(sorted(int.from_bytes(key[:8], "little") for key in self._overlay), dtype=numpy.uint64)
        position = numpy.minimum(gone.searchsorted(self._high), len(gone) - 1)
        touched = gone[position] == self._high
        # two digests that share a half are told apart by the other
        kept = [
            index
            for index in numpy.flatnonzero(touched)
            if self._table[index]["high"].tobytes() + self._table[index]["low"].tobytes() not in self._overlay
        ]
        touched[kept] = False
        fresh = numpy.array(
            [
                (int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little"))
                + (value.document, value.start, value.expires, value.shard, value.tokens)
                for key, value in self._overlay.items()
                if value is not None
            ],
            dtype=FIELDS,
        )
        table = numpy.concatenate((self._table[~touched], fresh))
        self._table = table[numpy.argsort(table["high"], kind="stable")]
        self._high = numpy.ascontiguousarray(self._table["high"])
        self._overlay.clear()
