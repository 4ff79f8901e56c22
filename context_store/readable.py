"""What every store can do: read, search, count, verify."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from time import perf_counter

from modeling_xcllama.context_cache import ContextCache

from .catalogue import Catalogue
from .counters import Counters, Metrics
from .pending import VerifyReport
from .reading import ShardReader, View
from .searching import Hit, search
from .shards import DamagedShardError, MappedShard


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

    @abstractmethod
    def _note_use(self, views: list[View]) -> None:
        """Remember what was read, where documents are evicted by their last use."""

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
        begin = perf_counter()
        ids = [ids] if isinstance(ids, str) else list(ids)
        if not ids:
            raise ValueError("`ids` must name at least one document, got an empty list.")
        cache, views = self._reader.read(ids, self.catalogue.meta["fingerprint"], self._where)
        self._note_use(views)
        self.metrics.got(len(ids), cache.offsets[-1] * self._reader.token_bytes, perf_counter() - begin)
        return cache

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
