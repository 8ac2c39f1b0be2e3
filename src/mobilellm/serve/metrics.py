"""What Prometheus reads at /metrics: counts since the start, and how it stands now."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mobilellm.serve.access_log import Record

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Of one server, in a registry of its own. `running` and `waiting` are asked when someone reads."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "mobilellm_requests", "Requests answered", ("route", "status"), registry=registry
        )
        self._disconnected = Counter(
            "mobilellm_disconnected", "Answers whose client went away before the end", registry=registry
        )
        self._tokens = Counter(
            "mobilellm_tokens", "Tokens: of prompts, of prompts and found in a cache, written",
            ("kind",), registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "mobilellm_request_seconds", "From a request to the end of its answer", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "mobilellm_first_token_seconds", "From a request to its first token, waiting included",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        for name, what, ask in (
            ("mobilellm_texts_running", "Texts that are being written", running),
            ("mobilellm_texts_waiting", "Texts that wait for a slot", waiting),
        ):
            Gauge(name, what, registry=registry).set_function(ask)

    def add(self, record: Record) -> None:
        self._requests.labels(record.route, record.status).inc()
        self._seconds.labels(record.route).observe(record.seconds)
        if record.disconnected:
            self._disconnected.inc()
        for kind, count in record.tokens.items():
            self._tokens.labels(kind).inc(count)
        if record.first_token is not None:
            self._first_token.observe(record.first_token)

    def text(self) -> bytes:
        return generate_latest(self._registry)
