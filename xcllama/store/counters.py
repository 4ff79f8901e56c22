"""What a store did, in total and for one request, and the same in Prometheus text form."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)


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


class Metrics:
    """The counters of one store; those of a request are counted by `request` as well."""

    def __init__(self, namespace: str):
        self.namespace, self.total = namespace, Counters()
        self._lock = threading.Lock()
        self._request: ContextVar[Counters | None] = ContextVar("request", default=None)
        self._registry = CollectorRegistry(auto_describe=False)
        options = {"buckets": LATENCY_BUCKETS, "registry": self._registry}
        self._seconds = Histogram("xcllama_store_seconds", "time of calls", ["namespace", "operation"], **options)

    def add(self, **amounts: float) -> None:
        """Count for the store and for the request that is being served."""
        with self._lock:
            for counters in filter(None, (self.total, self._request.get())):
                for name, amount in amounts.items():
                    setattr(counters, name, getattr(counters, name) + amount)

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
        """Add the time spent inside to the counter and histogram of "get", "search", "encode" or "write"."""
        begin = perf_counter()
        try:
            yield
        finally:
            seconds = perf_counter() - begin
            self.add(**{f"{operation}_seconds": seconds})
            self._seconds.labels(self.namespace, operation).observe(seconds)

    def text(self, totals: Mapping[str, int]) -> str:
        """All counters, and `totals` as gauges, in Prometheus text form."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self._seconds)
        counts = {name: count for name, count in asdict(self.total).items() if not name.endswith("_seconds")}
        for kind, values in ((Counter, counts), (Gauge, totals)):
            for name, value in values.items():
                metric = kind(f"xcllama_store_{name}", name.replace("_", " "), ["namespace"], registry=registry)
                metric.labels(self.namespace).inc(value)
        return generate_latest(registry).decode()
