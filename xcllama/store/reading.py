"""From ids to one cache: places in the catalogue, open shards, checksums at first use."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy

from modeling_xcllama.context_cache import ContextCache

from .catalogue import Catalogue, Location
from .counters import Metrics
from .encoding import cache_of_parts, offsets_of
from .shards import DamagedShardError, MappedShard

OPEN_SHARDS = 256
ATTEMPTS = 5
STATES = "SELECT 0, state, shard, start, tokens, checksum FROM states WHERE shard = ? ORDER BY start"
READERS = "SELECT DISTINCT id FROM passages JOIN documents USING (document) WHERE state = ?"


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:8])) + (", ..." if len(ids) > 8 else "")


class MissingDocumentError(KeyError, ValueError):
    """Documents that the namespace does not have (any more); `ids` names them."""

    def __init__(self, ids: Sequence[str], where: str):
        self.ids = list(ids)
        super().__init__(f"{where} has no document {_listed(self.ids)}; add it first.")

    def __str__(self) -> str:
        return self.args[0]


class DamagedDocumentError(ValueError):
    """Documents whose stored states are cut short or altered; `ids` names them."""

    def __init__(self, ids: Sequence[str], where: str):
        self.ids = list(ids)
        super().__init__(
            f"the states of document {_listed(self.ids)} in {where} are damaged and were not served; `repair()` "
            "encodes them."
        )


@dataclass
class VerifyReport:
    """What `verify` found: contexts read, ids of damaged documents, and of those that were encoded again."""

    checked: int = 0
    damaged: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


class Reader:
    """The open shards of a namespace, and reading from them.

    A context's checksum is compared when it is first read through an open shard. Every later read looks whether the
    shard's file is there, has its size and was not written to since; if it was, it is opened and compared anew.

    Args:
        catalogue: knows where states lie.
        open_shard: opens a shard by (name, nbytes, header checksum).
        metrics: counts what is missing or damaged.
        where: names the store in errors.
    """

    def __init__(
        self, catalogue: Catalogue, open_shard: Callable[[str, int, bytes], MappedShard], metrics: Metrics, where: str
    ):
        self._catalogue, self._open_shard, self._metrics, self._where = catalogue, open_shard, metrics, where
        self._shards: OrderedDict[int, MappedShard] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, number: int) -> MappedShard:
        """An open shard; opened anew if its file was cut, written to, replaced or evicted meanwhile.

        Raises:
            DamagedShardError: the file is gone, cut or altered.
        """
        with self._lock:
            shard = self._shards.get(number)
            if shard is not None:
                self._shards.move_to_end(number)
        if shard is not None:
            try:
                shard.check()
                return shard
            except DamagedShardError:
                self.forget(number)
        entry = self._catalogue.shard(number)
        if entry is None:
            raise DamagedShardError(f"shard {number} is gone.")
        shard = self._open_shard(*entry)
        with self._lock:
            self._shards[number] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _let_go(self) -> None:
        """Close shards whose files were deleted: files that stay open hold their room on the disk."""
        with self._lock:
            for number in [number for number, shard in self._shards.items() if shard.is_deleted]:
                del self._shards[number]

    def forget(self, number: int) -> None:
        """Close a shard; what `read` gave stays valid."""
        with self._lock:
            self._shards.pop(number, None)

    def read(
        self, asked: Sequence[tuple[str, int | None]], fingerprint: str
    ) -> tuple[ContextCache, list[list[Location]]]:
        """One row for each document, or passage of it, that is asked for, and the places it was read from.

        States that lie back to back in one shard come as views of the mapped file, others as one copy.

        Raises:
            MissingDocumentError: unknown, evicted or expired documents.
            DamagedDocumentError: states that fail their checksum.
        """
        for attempt in range(ATTEMPTS):
            rows = self._locate(asked)
            damaged, shards = self._check({place for row in rows for place in row})
            if not damaged:
                break
            # a writer may have moved or replaced them since they were looked up
            still = {place for row in self._locate(asked) for place in row} & damaged
            if still or attempt == ATTEMPTS - 1:
                ids = [name for (name, _), row in zip(asked, rows, strict=True) if not damaged.isdisjoint(row)]
                self._metrics.add(damaged=len(ids))
                if not self._catalogue.read_only:
                    self._catalogue.mark_damaged(still)
                raise DamagedDocumentError(ids, self._where)
        places = list(dict.fromkeys(place[1:] for row in rows for place in row))
        index = {place: number for number, place in enumerate(places)}
        picked = tuple(tuple(index[place[1:]] for place in row) for row in rows)
        whole = picked == tuple((number,) for number in range(len(places)))
        return join(places, shards, fingerprint, None if whole else picked), rows

    def verify(self) -> VerifyReport:
        """Read every context and compare checksums; what is damaged is marked where the catalogue can be written."""
        report, names = VerifyReport(), {}
        for (number,) in self._catalogue.rows("SELECT shard FROM shards WHERE live"):
            damaged = set()
            for place in map(Location._make, self._catalogue.rows(STATES, (number,))):
                report.checked += 1
                try:
                    shard = self.shard(number)
                    shard.load([place[3:]])
                    intact = shard.verify(*place[3:])
                except DamagedShardError:
                    intact = False
                if not intact:
                    damaged.add(place)
            # what was evicted or moved meanwhile is not damaged
            damaged &= set(map(Location._make, self._catalogue.rows(STATES, (number,))))
            if damaged and not self._catalogue.read_only:
                self._catalogue.mark_damaged(damaged)
            for place in damaged:
                names |= dict.fromkeys(row[0] for row in self._catalogue.rows(READERS, (place.state,)))
        report.damaged = list(names)
        return report

    def _locate(self, asked: Sequence[tuple[str, int | None]]) -> list[list[Location]]:
        rows = [self._catalogue.locate(*one) for one in asked]
        if missing := [name for (name, _), row in zip(asked, rows, strict=True) if not row]:
            self._metrics.add(misses=len(missing))
            raise MissingDocumentError(missing, self._where)
        return rows

    def _check(self, places: Collection[Location]) -> tuple[set[Location], dict[int, MappedShard]]:
        """Verify what is read for the first time; returns the damaged ones and the open shards."""
        shards: dict[int, MappedShard] = {}
        damaged: set[Location] = set()
        for number in {place.shard for place in places}:
            own = [place for place in places if place.shard == number]
            try:
                shard = shards[number] = self.shard(number)
            except DamagedShardError:
                damaged.update(own)
                continue
            fresh = [place for place in own if place.state not in shard.verified]
            shard.load([place[3:] for place in fresh])
            for place in fresh:
                if shard.verify(*place[3:]):
                    shard.verified.add(place.state)
                else:
                    damaged.add(place)
            if fresh:
                self._let_go()
        return damaged, shards


def join(
    places: Sequence[tuple], shards: dict[int, MappedShard], fingerprint: str, rows: tuple | None
) -> ContextCache:
    """A cache of the contexts at (state, shard, start, tokens, checksum), each stored once."""
    offsets = offsets_of(place[3] for place in places)
    number, start = places[0][1:3]
    parts = shards[number].parts
    if all(place[1] == number and place[2] == start + offset for place, offset in zip(places, offsets, strict=False)):
        tensors = {name: tensor[start : start + offsets[-1]] for name, tensor in shards[number].tensors.items()}
    else:
        # numpy asks for huge pages where much is copied, torch does not
        columns = {
            name: numpy.concatenate([shards[shard].rows[name][first : first + n] for _, shard, first, n, _ in places])
            for name in parts
        }
        tensors = {name: parts[name].tensor(column) for name, column in columns.items()}
    return cache_of_parts(tensors, offsets, fingerprint, rows)
