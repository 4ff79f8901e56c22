"""What a store did, in total and for one request, and the same in Prometheus text form."""

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from time import perf_counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

LATENCY_BUCKETS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
OPERATIONS = ("get", "search", "encode", "write")
GETS_KEPT = 1000


@dataclass
class Counters:
    """Counts since a store was opened, or of one request; times in seconds."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    bytes_read: int = 0
    bytes_fetched: int = 0
    bytes_written: int = 0
    documents_encoded: int = 0
    tokens_encoded: int = 0
    documents_skipped: int = 0
    evictions: int = 0
    get_seconds: float = 0.0
    search_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0

    def add(self, **amounts: float) -> None:
        """Add to the named counts."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)


class Metrics:
    """The counters of one store; those of a request are counted by `request` as well."""

    def __init__(self, namespace: str):
        self.namespace = namespace
        self._total = Counters()
        self._lock = threading.Lock()
        self._request: ContextVar[Counters | None] = ContextVar("request", default=None)
        self._buckets = {name: [0] * (len(LATENCY_BUCKETS) + 1) for name in OPERATIONS}
        # (documents, bytes, seconds) of gets that are not counted yet
        self._gets: deque[tuple[int, int, float]] = deque()

    @property
    def total(self) -> Counters:
        """All counts."""
        self._count_gets()
        return self._total

    def add(self, **amounts: float) -> None:
        """Count for the store and for the request that is being served."""
        request = self._request.get()
        with self._lock:
            self._total.add(**amounts)
            if request is not None:
                request.add(**amounts)

    def got(self, documents: int, nbytes: int, seconds: float) -> None:
        """Note one `get`, the shortest way: a warm one takes a few microseconds."""
        self._gets.append((documents, nbytes, seconds))
        request = self._request.get()
        if request is not None:
            with self._lock:
                request.add(hits=documents, bytes_read=nbytes, get_seconds=seconds)
        if len(self._gets) > GETS_KEPT:
            self._count_gets()

    def _count_gets(self) -> None:
        with self._lock:
            for _ in range(len(self._gets)):
                documents, nbytes, seconds = self._gets.popleft()
                self._total.add(hits=documents, bytes_read=nbytes, get_seconds=seconds)
                self._buckets["get"][bisect_left(LATENCY_BUCKETS, seconds)] += 1

    @contextmanager
    def request(self) -> Iterator[Counters]:
        """Count what happens inside, in this thread or task, apart."""
        counters = Counters()
        token = self._request.set(counters)
        try:
            yield counters
        finally:
            self._request.reset(token)

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the time spent inside to an operation's counter and histogram."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.observe(operation, perf_counter() - begin)

    def observe(self, operation: str, seconds: float, **amounts: float) -> None:
        """Count one operation that took so long, and `amounts`."""
        self.add(**{f"{operation}_seconds": seconds}, **amounts)
        with self._lock:
            self._buckets[operation][bisect_left(LATENCY_BUCKETS, seconds)] += 1

    def collect(self, totals: dict[str, int]) -> Iterator:
        """Prometheus metric families (the collector interface of prometheus_client)."""
        labels, total = {"namespace": self.namespace}, self.total
        for field in fields(Counters):
            if not field.name.endswith("_seconds"):
                family = CounterMetricFamily(
                    f"xcllama_store_{field.name}", field.name.replace("_", " "), labels=labels
                )
                family.add_metric(list(labels.values()), getattr(total, field.name))
                yield family
        for operation in OPERATIONS:
            family = HistogramMetricFamily(f"xcllama_store_{operation}_seconds", f"time of {operation}", labels=labels)
            counts, cumulated = [], 0
            for bound, count in zip((*LATENCY_BUCKETS, "+Inf"), self._buckets[operation], strict=True):
                cumulated += count
                counts.append((str(bound), cumulated))
            seconds = getattr(total, f"{operation}_seconds")
            family.add_metric(list(labels.values()), counts, sum_value=seconds)
            yield family
        for name, value in totals.items():
            family = GaugeMetricFamily(f"xcllama_store_{name}", name.replace("_", " "), labels=labels)
            family.add_metric(list(labels.values()), value)
            yield family

    def text(self, totals: dict[str, int]) -> str:
        """All counters, and `totals` as gauges, in Prometheus text form."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(list(self.collect(totals))))
        return generate_latest(registry).decode()

    def as_dict(self) -> dict[str, float]:
        """The totals by name."""
        return asdict(self.total)


class _Collector:
    def __init__(self, families: list):
        self._families = families

    def collect(self) -> list:
        return self._families
