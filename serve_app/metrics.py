"""What is counted: through Ray's exporter on every node, and again for this replica alone at `/metrics`."""

from dataclasses import dataclass
from typing import Any

import prometheus_client
from ray.util.metrics import Counter, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class _Both:
    """One metric, twice."""

    ray: Any
    own: Any

    def record(self, verb: str, value: float, tags: dict[str, str]) -> None:
        getattr(self.ray, verb)(value, tags=tags)
        getattr(self.own.labels(**tags) if tags else self.own, verb)(value)


class Metrics:
    """The ingress's metrics; a replica makes them once."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._requests = self._counter("axn_requests_total", "requests by route and status", ("route", "status"))
        self._rounds = self._counter("axn_rounds_total", "rounds of searches")
        self._ce_calls = self._counter("axn_ce_calls_total", "pairs scored by the cross-encoder", ("route",))
        self._tokens = self._counter("axn_tokens_total", "tokens scored by the cross-encoder, padding excluded")
        self._degraded = self._counter("axn_degraded_total", "searches cut short, by reason", ("reason",))
        self._broken = self._counter("axn_broken_streams_total", "streams that began and ended in an error", ("status",))
        self._shed = self._counter("axn_shed_total", "requests refused with 429")
        self._seconds = self._histogram("axn_search_seconds", "seconds of a search", SECONDS, ("method",))
        what = "share of a search's results that were found before its last round; low: more rounds would find more"
        self._recall_proxy = self._histogram("axn_recall_proxy", what, SHARES)
        self._queue = prometheus_client.Gauge("axn_queue_pairs", "pairs that waited, as last heard", registry=self.registry)

    def _counter(self, name: str, what: str, tags: tuple[str, ...] = ()) -> _Both:
        own = prometheus_client.Counter(name.removesuffix("_total"), what, tags, registry=self.registry)
        return _Both(Counter(name, what, tag_keys=tags), own)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], tags: tuple[str, ...] = ()) -> _Both:
        own = prometheus_client.Histogram(name, what, tags, registry=self.registry, buckets=buckets)
        return _Both(Histogram(name, what, boundaries=list(buckets), tag_keys=tags), own)

    def count_request(self, route: str, status: int) -> None:
        """A request that was answered."""
        self._requests.record("inc", 1, {"route": route, "status": str(status)})
        if status == 429:
            self._shed.record("inc", 1, {})

    def count_broken_stream(self, status: int) -> None:
        """A stream, answered by 200 already, whose last event was an error that has this status elsewhere."""
        self._broken.record("inc", 1, {"status": str(status)})

    def count_scored(self, route: str, ce_calls: int, tokens: int, queued_pairs: int | None = None) -> None:
        """Pairs that were scored, and how many waited then, where that was heard."""
        if ce_calls:
            self._ce_calls.record("inc", ce_calls, {"route": route})
        if tokens:
            self._tokens.record("inc", tokens, {})
        if queued_pairs is not None:
            self._queue.set(queued_pairs)

    def count_search(self, method: str, seconds: float, body: dict[str, Any], recall_proxy: float) -> None:
        """A search that was answered."""
        self._seconds.record("observe", seconds, {"method": method})
        degraded = body["degraded"]
        if degraded["rounds_done"]:
            self._rounds.record("inc", degraded["rounds_done"], {})
        for reason in ("deadline", "scorer_error"):
            if degraded[reason]:
                self._degraded.record("inc", 1, {"reason": reason})
        if degraded["rounds_done"] > 1:
            self._recall_proxy.record("observe", recall_proxy, {})

    def exposition(self) -> bytes:
        """Prometheus' text format, of this replica."""
        return prometheus_client.generate_latest(self.registry)
