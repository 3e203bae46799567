"""What the deployments say to one another. A refusal is a value: an error would be logged with its traceback at each hop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from axn_ray.core.pairs import FloatArray

Kind = Literal["empty", "invalid", "scorer_failed", "overloaded", "deadline", "not_ready"]
STATUS: Mapping[Kind, int] = {
    "empty": 400,
    "invalid": 422,
    "scorer_failed": 424,
    "overloaded": 429,
    "deadline": 504,
    "not_ready": 503,
}


@dataclass(frozen=True)
class Refused:
    """Why there is no answer, in one sentence, and when to try again; `ce_calls` and `tokens` were spent all the same."""

    kind: Kind
    message: str
    retry_after_s: float | None = None
    param: str | None = None
    ce_calls: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Scored:
    """Raw logits (n,) of the pairs asked for; one that failed is NaN and has its reason in `failures`.

    `tokens` were scored, padding excluded; `queued_pairs` waited in the replica when these were done, which scores
    `pairs_per_second`. `scorer` names the cross-encoder's fingerprint: scores of another do not stand beside these.
    """

    scores: FloatArray
    failures: Mapping[int, str]
    truncated: int
    tokens: int
    queued_pairs: int
    pairs_per_second: float = 0.0
    scorer: str = ""


@dataclass(frozen=True)
class SearchJob:
    """One search as the ingress hands it on; `timeout_s` is what is left of its deadline, `carrier` the trace it belongs to."""

    query: str
    top_k: int
    ce_calls: int
    rounds: int
    timeout_s: float
    method: Literal["axn", "rnr"] = "axn"
    return_all: bool = False
    trace: bool = False
    fail_open: bool = False
    carrier: Mapping[str, str] = field(default_factory=dict)
    filter: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """The best ranking after a round: what a stream shows while the search goes on."""

    body: Mapping[str, Any]


@dataclass(frozen=True)
class SearchReply:
    """The end of a search: the reply's body, and figures for the metrics."""

    body: Mapping[str, Any]
    recall_proxy: float = 0.0
    queued_pairs: int = 0
    pairs_per_second: float = 0.0
