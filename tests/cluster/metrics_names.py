"""The metrics that the serving app exports through `ray.util.metrics`; Ray puts `ray_` before each name."""

COUNTERS = {
    "axn_requests_total",
    "axn_rounds_total",
    "axn_ce_calls_total",
    "axn_tokens_total",
    "axn_degraded_total",
    "axn_shed_total",
    "axn_broken_streams_total",
}
GAUGES = {"axn_queue_pairs", "axn_batch_fill"}
HISTOGRAMS = {"axn_search_seconds", "axn_recall_proxy"}
SERIES = {f"ray_{name}" for name in COUNTERS | GAUGES} | {
    f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")
}
