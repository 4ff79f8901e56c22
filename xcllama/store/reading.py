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
            # deleted files that stay open hold their room on the disk
            for gone in [other for other, one in self._shards.items() if one.is_deleted]:
                del self._shards[gone]
            self._shards[number] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

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
            found = self._fetch({place for row in rows for place in row})
            damaged = {place for row in rows for place in row if place not in found}
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
        # documents may share states: each is stored once
        unique = {place.state: place for row in rows for place in row}
        index = {state: number for number, state in enumerate(unique)}
        picked = tuple(tuple(index[place.state] for place in row) for row in rows)
        whole = picked == tuple((number,) for number in range(len(unique)))
        return join(list(unique.values()), found, fingerprint, None if whole else picked), rows

    def verify(self) -> VerifyReport:
        """Read every context and compare checksums; what is damaged is marked where the catalogue can be written."""
        report, names = VerifyReport(), {}
        for (number,) in self._catalogue.rows("SELECT shard FROM shards WHERE live"):
            places = list(map(Location._make, self._catalogue.rows(STATES, (number,))))
            report.checked += len(places)
            # anew, whatever was compared before
            self.forget(number)
            damaged = set(places) - self._fetch(places).keys()
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

    def _fetch(self, places: Collection[Location]) -> dict[Location, tuple]:
        """Contexts as (open shard, rows of each part); what is damaged is left out."""
        found: dict[Location, tuple] = {}
        for number in {place.shard for place in places}:
            try:
                shard = self.shard(number)
                rows = shard.fetch([place for place in places if place.shard == number])
            except DamagedShardError:
                continue
            found |= {place: (shard, own) for place, own in rows.items()}
        return found


def join(places: Sequence[Location], found: dict, fingerprint: str, rows: tuple | None) -> ContextCache:
    """A cache of contexts, each stored once: views of a mapped shard if they lie there so, else one copy."""
    offsets, (shard, _), start = offsets_of(place.tokens for place in places), found[places[0]], places[0].start
    run = [(places[0].shard, start + offset) for offset in offsets[:-1]]
    if run == [(place.shard, place.start) for place in places] and isinstance(shard, MappedShard):
        tensors = {name: tensor[start : start + offsets[-1]] for name, tensor in shard.tensors.items()}
    else:
        # numpy asks for huge pages where much is copied, torch does not
        tensors = {
            name: part.tensor(numpy.concatenate([found[place][1][name] for place in places]))
            for name, part in shard.parts.items()
        }
    return cache_of_parts(tensors, offsets, fingerprint, rows)
