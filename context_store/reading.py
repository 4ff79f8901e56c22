"""From ids to one cache: locations, open shards, checksums at first use; what every store can do."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

import numpy

from modeling_xcllama.context_cache import ContextCache

from .catalogue import FOREVER, Catalogue
from .counters import Metrics
from .locations import Location
from .shards import DamagedShardError, MappedShard, cache_of_parts, offsets_of

OPEN_SHARDS = 256
VIEWS = 4096
ATTEMPTS = 5
SHARD = attrgetter("shard")


class MissingDocumentError(KeyError):
    """Documents that the namespace does not have (any more); `ids` names them."""

    def __init__(self, ids: Sequence[str], where: str):
        self.ids = list(ids)
        shown = ", ".join(map(repr, self.ids[:8])) + (", ..." if len(self.ids) > 8 else "")
        super().__init__(f"{where} has no document {shown}; add it first.")

    def __str__(self) -> str:
        return self.args[0]


class DamagedDocumentError(ValueError):
    """Documents whose stored states are cut short or altered; `ids` names them."""

    def __init__(self, ids: Sequence[str], where: str):
        self.ids = list(ids)
        shown = ", ".join(map(repr, self.ids[:8])) + (", ..." if len(self.ids) > 8 else "")
        super().__init__(
            f"the states of document {shown} in {where} are damaged and were not served; `repair()` encodes them."
        )


@dataclass(eq=False, slots=True)
class View:
    """A document that was read: its number, its first token in its shard, its rows of each of the shard's parts.

    `cache`: what was made of it when it was asked for alone.
    """

    document: int
    start: int
    shard: MappedShard
    rows: tuple[numpy.ndarray, ...]
    cache: ContextCache | None = None


class Views(dict[str, View]):
    """Documents by id that were read under one version of the catalogue; good `until` the first of them expires."""

    until = FOREVER


class ShardReader:
    """The open shards of a namespace, and reading documents from them.

    A document's checksum is compared when it is first read through an open shard. Every later read looks whether the
    shard's file is there, has its size and was not written to since; if it was, it is opened and compared anew.

    Args:
        catalogue: knows where documents lie.
        open_shard: opens a shard by (name, nbytes, header checksum).
        metrics: counts bytes.
    """

    def __init__(self, catalogue: Catalogue, open_shard: Callable[[str, int, bytes], MappedShard], metrics: Metrics):
        self._catalogue = catalogue
        self._open_shard = open_shard
        self._metrics = metrics
        self._shards: OrderedDict[int, MappedShard] = OrderedDict()
        # of the version of the catalogue that they were read under
        self._views = Views()
        self._version = -1
        self._lock = threading.Lock()
        self.token_bytes = 0

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
        # all documents of a namespace have one dtype and width
        self.token_bytes = sum(part.token_bytes for name, part in shard.parts.items() if name != "token_ids")
        with self._lock:
            self._shards[number] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def forget(self, number: int) -> None:
        """Close a shard; what `read` gave stays valid."""
        with self._lock:
            self._views = Views()
            self._shards.pop(number, None)

    def close_deleted(self) -> None:
        """Close shards whose files were deleted."""
        with self._lock:
            numbers = [number for number, shard in self._shards.items() if shard.is_deleted]
        for number in numbers:
            self.forget(number)

    def refresh(self) -> None:
        """Take over what was committed; let go of views and of shards that are no more: they hold room on the disk."""
        self._catalogue.refresh()
        if self._version != self._catalogue.version:
            with self._lock:
                self._version, self._views = self._catalogue.version, Views()
                numbers = list(self._shards)
            live = set(self._catalogue.live_shards()) if numbers else set()
            for number in set(numbers) - live:
                self.forget(number)

    def locate(self, ids: Sequence[str], where: str) -> list[Location]:
        """Where documents lie now.

        Raises:
            MissingDocumentError: unknown, evicted or expired ids.
        """
        self.refresh()
        locations = [self._catalogue.locate(document_id) for document_id in ids]
        now = time.time()
        missing = [n for n, place in zip(ids, locations, strict=True) if place is None or place.expires <= now]
        if missing:
            self._metrics.add(misses=len(missing))
            raise MissingDocumentError(missing, where)
        return locations

    def read(self, ids: Sequence[str], fingerprint: str, where: str) -> tuple[ContextCache, list[View]]:
        """One row for each of `ids`: views of the mapped shard where they lie back to back, else one copy.

        Raises:
            MissingDocumentError: unknown, evicted or expired ids.
            DamagedDocumentError: documents that fail their checksum.
        """
        self.refresh()
        views = self._known(ids) or self._look_up(ids, where)
        if len(views) > 1:
            return join(views, fingerprint), views
        (view,) = views
        if view.cache is None:
            view.cache = join(views, fingerprint)
        return view.cache, views

    def _known(self, ids: Sequence[str]) -> list[View] | None:
        """Views of documents that were all read before, if they and their shards are unchanged."""
        kept = self._views
        if time.time() >= kept.until:
            return None
        try:
            # without a frame of Python a document: this is most of what a warm read costs
            views = list(map(kept.__getitem__, ids))
            for shard in set(map(SHARD, views)):
                shard.check()
        except (KeyError, DamagedShardError):
            return None
        return views

    def _look_up(self, ids: Sequence[str], where: str) -> list[View]:
        """Views of documents by the catalogue, checksums compared."""
        kept = self._views if time.time() < self._views.until else Views()
        self._views = kept
        for attempt in range(ATTEMPTS):
            locations = self.locate(ids, where)
            damaged, shards = self._check(set(locations))
            if not damaged:
                break
            # a writer may have moved or replaced them since they were looked up
            self._catalogue.refresh(ask=True)
            known = dict(zip(ids, locations, strict=True))
            real = [
                name for name, place in known.items() if place in damaged and self._catalogue.locate(name) == place
            ]
            if real or attempt == ATTEMPTS - 1:
                self._metrics.add(damaged=len(real))
                if not self._catalogue.read_only:
                    self._catalogue.mark_damaged(real)
                raise DamagedDocumentError(real, where)
        views = {}
        for name, place in zip(ids, locations, strict=True):
            shard = shards[place.shard]
            rows = tuple(rows[place.start : place.start + place.tokens] for rows in shard.rows.values())
            views[name] = View(place.document, place.start, shard, rows)
        if kept is self._views:
            if len(kept) + len(views) > VIEWS:
                self._views = kept = Views()
            kept.until = min(kept.until, *(place.expires for place in locations))
            kept.update(islice(views.items(), VIEWS))
        return [views[name] for name in ids]

    def _check(self, places: Collection[Location]) -> tuple[set[Location], dict[int, MappedShard]]:
        """Verify what is read for the first time; returns the damaged ones and the open shards."""
        shards: dict[int, MappedShard] = {}
        damaged: set[Location] = set()
        for number in dict.fromkeys(place.shard for place in places):
            try:
                shards[number] = self.shard(number)
            except DamagedShardError:
                damaged.update(place for place in places if place.shard == number)
        fresh = [p for p in places if p.shard in shards and p.document not in shards[p.shard].verified]
        if fresh:
            stored = self._catalogue.checksums([place.document for place in fresh])
            damaged.update(place for place in fresh if place.document not in stored)
            for number, shard in shards.items():
                wanted = [p for p in fresh if p.shard == number and p.document in stored]
                shard.load([(place.start, place.tokens, stored[place.document][0]) for place in wanted])
                for place in wanted:
                    if shard.verify(place.start, place.tokens, stored[place.document][0]):
                        shard.verified.add(place.document)
                    else:
                        damaged.add(place)
        return damaged, shards


def join(views: Sequence[View], fingerprint: str) -> ContextCache:
    """One row a view, each document stored once: views of the mapped shard if they lie there so, else one copy."""
    unique = list(dict.fromkeys(views))
    rows = None
    if len(unique) < len(views):
        position = {view: index for index, view in enumerate(unique)}
        rows = tuple((position[view],) for view in views)
    columns = list(zip(*[view.rows for view in unique], strict=True))
    offsets = offsets_of(map(len, columns[0]))
    shard, start = unique[0].shard, unique[0].start
    if all(v.shard is shard and v.start == start + offset for v, offset in zip(unique, offsets, strict=False)):
        parts = {name: tensor[start : start + offsets[-1]] for name, tensor in shard.tensors.items()}
    else:
        # numpy asks for huge pages where much is copied, torch does not
        copies = map(numpy.concatenate, columns)
        parts = {name: part.tensor(copy) for (name, part), copy in zip(shard.parts.items(), copies, strict=True)}
    return cache_of_parts(parts, offsets, fingerprint, rows)
