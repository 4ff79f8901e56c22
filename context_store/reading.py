"""From ids to one cache: locations, open shards, checksums at first use; what every store can do."""

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import numpy
from torch import Tensor

from modeling_xcllama.context_cache import ContextCache

from .catalogue import Catalogue
from .counters import Counters, Metrics
from .locations import Location
from .pending import VerifyReport
from .searching import Hit, search
from .shards import DamagedShardError, MappedShard, cache_of_parts, offsets_of

OPEN_SHARDS = 256
VIEWS = 4096
ATTEMPTS = 5


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
    """A document that was read: where it lies, its rows there, and its cache if it was asked for alone."""

    place: Location
    shard: MappedShard
    rows: dict[str, numpy.ndarray]
    cache: ContextCache | None = None


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
        self._views: dict[str, View] = {}
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
            self._views = {}
            self._shards.pop(number, None)

    def refresh(self) -> None:
        """Take over what was committed; let go of views and of shards that are no more: they hold room on the disk."""
        self._catalogue.refresh()
        if self._version != self._catalogue.version:
            with self._lock:
                self._version, self._views = self._catalogue.version, {}
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
        if len(views) == 1 and views[0].cache is not None:
            return views[0].cache, views
        unique = sorted(set(views), key=lambda view: (view.place.shard, view.place.start))
        rows = None
        if unique != views:
            position = {view: index for index, view in enumerate(unique)}
            rows = tuple((position[view],) for view in views)
        offsets = offsets_of(view.place.tokens for view in unique)
        cache = cache_of_parts(gather(unique, offsets), offsets, fingerprint, rows)
        if len(views) == 1:
            views[0].cache = cache
        return cache, views

    def _known(self, ids: Sequence[str]) -> list[View] | None:
        """Views of documents that were all read before, if they and their shards are unchanged."""
        views, now = [], time.time()
        for document_id in ids:
            view = self._views.get(document_id)
            if view is None or view.place.expires <= now:
                return None
            views.append(view)
        try:
            for shard in {view.shard for view in views}:
                shard.check()
        except DamagedShardError:
            return None
        return views

    def _look_up(self, ids: Sequence[str], where: str) -> list[View]:
        """Views of documents by the catalogue, checksums compared."""
        kept = self._views
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
            rows = {part: rows[place.start : place.start + place.tokens] for part, rows in shard.rows.items()}
            views[name] = View(place, shard, rows)
        if kept is self._views:
            if len(kept) + len(views) > VIEWS:
                kept.clear()
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


def gather(views: Sequence[View], offsets: Sequence[int]) -> dict[str, Tensor]:
    """The parts of documents, `offsets` apart: views of the mapped shard if they lie there so, else one copy."""
    shard, start = views[0].shard, views[0].place.start
    if all(v.shard is shard and v.place.start == start + offset for v, offset in zip(views, offsets, strict=False)):
        return {name: tensor[start : start + offsets[-1]] for name, tensor in shard.tensors.items()}
    # numpy asks for huge pages where much is copied, torch does not
    return {
        name: part.tensor(numpy.concatenate([view.rows[name] for view in views])) for name, part in shard.parts.items()
    }


class ReadableStore(ABC):
    """Reading and searching one namespace.

    Args:
        catalogue: of the namespace.
        namespace: its name, for counters.
        where: names the store in errors.
    """

    def __init__(self, catalogue: Catalogue, namespace: str, where: str):
        self.catalogue, self.namespace, self._where = catalogue, namespace, where
        self.metrics = Metrics(namespace)
        self._reader = ShardReader(catalogue, self._open_shard, self.metrics)

    @abstractmethod
    def _open_shard(self, name: str, nbytes: int, header_checksum: bytes) -> MappedShard:
        """Open a shard of the catalogue."""

    @property
    def dtype(self) -> str:
        """Dtype of the states at rest; "" before the first document."""
        return self.catalogue.meta["dtype"]

    def __len__(self) -> int:
        self.catalogue.refresh()
        return len(self.catalogue.locations)

    def __contains__(self, document_id: str) -> bool:
        self.catalogue.refresh()
        place = self.catalogue.locate(document_id)
        return place is not None and place.expires > time.time()

    def get(self, ids: str | Sequence[str]) -> ContextCache:
        """The states of documents, one row each, in the order of `ids`.

        Documents that lie back to back in one shard come as views of the mapped file, others as one copy.

        Raises:
            MissingDocumentError: a document that is not there, or not any more.
            DamagedDocumentError: stored states that fail their checksum.
            ValueError: no ids.
        """
        return self._get(ids)[0]

    def _get(self, ids: str | Sequence[str]) -> tuple[ContextCache, list[View]]:
        ids = [ids] if isinstance(ids, str) else list(ids)
        if not ids:
            raise ValueError("`ids` must name at least one document, got an empty list.")
        begin = perf_counter()
        cache, views = self._reader.read(ids, self.catalogue.meta["fingerprint"], self._where)
        nbytes = cache.offsets[-1] * self._reader.token_bytes
        self.metrics.got(len(ids), nbytes, perf_counter() - begin)
        return cache, views

    def search(self, query: str, k: int = 4, where: dict | None = None) -> list[Hit]:
        """The `k` documents that match `query` best by BM25 over their words.

        Args:
            query: words; common ones count only where there are no others.
            where: metadata that hits must have, `{field: value}` or `{field: [values]}`.

        Raises:
            ValueError: an empty query, or `k` below 1.
        """
        if not isinstance(query, str) or not query.strip() or k < 1:
            raise ValueError(f"`query` must be words and `k` at least 1, got {query!r:.80} and {k}.")
        with self.metrics.timed("search"):
            return search(self.catalogue, query, k, where)

    def request(self) -> AbstractContextManager[Counters]:
        """A context that counts what happens inside apart: `with store.request() as cost: ...`."""
        return self.metrics.request()

    def stats(self) -> dict:
        """Sizes of the namespace and counters since it was opened."""
        fixed = {name: self.catalogue.meta[name] for name in ("fingerprint", "dtype")}
        return {"namespace": self.namespace, **fixed, **self.catalogue.totals(), **self.metrics.as_dict()}

    def prometheus(self) -> str:
        """Counters, latencies and sizes in Prometheus text form."""
        return self.metrics.text(self.catalogue.totals())

    def _verify(self) -> VerifyReport:
        """Read every document and compare checksums."""
        report = VerifyReport()
        for number in self.catalogue.live_shards():
            documents = self.catalogue.documents_of(number)
            try:
                shard = self._reader.shard(number)
            except DamagedShardError:
                # evicted meanwhile, or really damaged
                report.damaged += [document.id for document in self.catalogue.documents_of(number)]
                continue
            for document in documents:
                shard.load([(document.start, document.tokens, document.checksum)])
                report.checked += 1
                if not shard.verify(document.start, document.tokens, document.checksum):
                    report.damaged.append(document.id)
        return report
