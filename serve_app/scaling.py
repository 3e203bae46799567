"""How many cross-encoder replicas: by the pairs in the house, for one request may hold one pair or a thousand."""

import math
from typing import Any

PAIRS_PER_REPLICA = 256  # waiting or being scored: two or three batches


def by_pending_pairs(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy; bounds, delays and factors of the deployment's config apply to what it returns."""
    by_replica = (context.aggregated_metrics or {}).get("pending_pairs", {})
    return max(1, math.ceil(sum(by_replica.values()) / PAIRS_PER_REPLICA)), {}
