"""What a search or a rerank answers, and what it may be told: over HTTP and in one process alike. Imports no torch, no Ray."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

from pydantic import BaseModel, ConfigDict


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer server may say more


class Hit(_Reply):
    """One result: `score` is the CE's raw logit, or an estimate of it where `exact` is false."""

    id: str
    score: float
    exact: bool = True
    round: int | None = None
    title: str = ""
    text: str


class Degraded(_Reply):
    """What kept a search from its end or its CE from a score, and how many rounds it had by then."""

    deadline: bool = False
    scorer_error: bool = False
    rounds_done: int


class SearchReply(_Reply):
    """The ranking of one query, best first, and what it cost (`usage["ce_calls"]`).

    `failures` names items that the CE was asked for and could not score: `id` and `reason`.
    """

    results: tuple[Hit, ...]
    usage: Mapping[str, int]
    degraded: Degraded
    index_version: str
    timing_ms: Mapping[str, float] = {}
    trace: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[Mapping[str, str], ...] = ()


class RoundReply(_Reply):
    """The best ranking so far, after one round of a stream."""

    round: int
    rounds: int
    ce_calls: int
    results: tuple[Hit, ...]


class Ranked(_Reply):
    """One reranked document: its place in the request's list and its raw logit."""

    index: int
    score: float


class SearchOptions(TypedDict, total=False):
    """What a search may be told; without, the server's defaults. `budget` is CE calls, spent over `rounds`.

    `filter` names values (one, or several to choose from) of columns that the index's items have.
    """

    top_k: int
    budget: int
    rounds: int
    method: Literal["axn", "rnr"]
    deadline_ms: int
    filter: Mapping[str, str | Sequence[str]]
    return_scores: Literal["exact", "all"]
    trace: bool
    fail_open: bool


class Backend(Protocol):
    """What searches and reranks: an `AxnClient`, or an `AxnSearcher` in this process."""

    def search(self, query: str, *, top_k: int) -> SearchReply:
        """The best `top_k` items."""
        ...

    def rerank(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """Documents by score, best first; one that cannot be scored is left out."""
        ...
