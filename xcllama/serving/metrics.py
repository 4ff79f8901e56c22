"""Counters of the HTTP side in Prometheus text form; no label names a tenant, an id or a text."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """What an app counts."""

    def __init__(self):
        self._registry = CollectorRegistry(auto_describe=False)
        options = {"registry": self._registry}
        self.requests = Counter("xcllama_requests", "Requests.", ["route", "status"], **options)
        self.tokens = Counter("xcllama_tokens", "Tokens of answered requests.", ["kind"], **options)
        self.first_token = Histogram(
            "xcllama_first_token_seconds", "From a request to its first token.", buckets=SECONDS, **options
        )
        self.seconds = Histogram("xcllama_request_seconds", "Of whole answers.", buckets=SECONDS, **options)
        self._gauges: dict[str, Gauge] = {}

    def count(self, usage: Mapping) -> None:
        """Count the tokens of a request."""
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.tokens.labels("context").inc(cached)
        self.tokens.labels("prompt").inc(usage["prompt_tokens"] - cached)
        self.tokens.labels("completion").inc(usage["completion_tokens"])

    def text(self, stats: Mapping[str, int]) -> bytes:
        """All counters, and `stats` as gauges."""
        for name, value in stats.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"xcllama_{name}", name.replace("_", " "), registry=self._registry)
            self._gauges[name].set(value)
        return generate_latest(self._registry)
