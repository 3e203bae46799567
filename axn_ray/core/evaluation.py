"""The examiner: every method at every budget on every query, against weighing everything. Counts each CE call.

One query at a time, so that any number of hands can share the work. Knows no Ray and no CE: its scores are looked up.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from axn_ray.core.adaptive import SearchResult, run_search
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.index import Retrieve, Retrieved
from axn_ray.core.methods import Method
from axn_ray.core.metrics import LABEL_CUTOFF, exact_top_k, label_metrics, recall_at_k
from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.search_space import SearchSpace, start_search
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

SCHEMA = pa.schema(
    [
        ("query_index", pa.int32()),
        ("query_id", pa.string()),
        ("method", pa.string()),
        ("rounds", pa.int32()),
        ("budget", pa.int32()),
        ("k", pa.int32()),
        ("target_recall", pa.float64()),
        ("recall", pa.float64()),
        ("ce_calls", pa.int32()),
        ("index_ce_calls", pa.int64()),
        ("search_seconds", pa.float64()),
        ("accuracy", pa.float64()),
        ("ndcg_at_10", pa.float64()),
        ("found", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class ExactScores:
    """The truth: the raw CE score of every pair of a test query and an item, `scores float32 (n_queries, n_items)`.

    Raises:
        InputError: ids and rows that do not fit, or scores that are not float32.
    """

    query_ids: tuple[str, ...]
    scores: FloatArray

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or len(self.scores) != len(self.query_ids):
            raise InputError(f"{len(self.query_ids)} query ids but exact scores of shape {self.scores.shape}; one row per query")
        if self.scores.dtype != np.float32:
            raise InputError(f"exact scores are {self.scores.dtype}; give float32, coarser ones tie by accident")


@dataclass(frozen=True)
class EvaluationPlan:
    """What is compared: methods x budgets (CE calls per query) x k.

    Raises:
        InputError: an empty list, a value that comes twice or lies below 1, or a budget too small for a method's rounds.
    """

    methods: tuple[Method, ...]
    budgets: tuple[int, ...]
    ks: tuple[int, ...]

    def __post_init__(self) -> None:
        named = [(method.name, method.rounds) for method in self.methods]
        for what, values in (("methods", named), ("budgets", self.budgets), ("ks", self.ks)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"{what} {list(values)} must name at least one and none twice; mend the list")
        if min(*self.budgets, *self.ks) < 1:
            raise InputError(f"budgets {list(self.budgets)} and ks {list(self.ks)} must all be at least 1; raise the lowest")
        deepest = max(self.methods, key=lambda method: method.rounds)
        if deepest.rounds > min(self.budgets):
            short = f"budget={min(self.budgets)} is too small for the {deepest.rounds} rounds of {deepest.name!r}"
            raise InputError(f"{short}; raise the budget or lower the rounds")

    @property
    def rows_per_query(self) -> int:
        """Rows that each query adds to the result."""
        return len(self.methods) * len(self.budgets) * len(self.ks)


@dataclass(frozen=True)
class Examination:
    """One evaluation, whole: where to search, the truth, the plan, and the labelled item of each query, if known.

    Raises:
        InputError: parts that count different queries or items, a method that needs what the space lacks, or a budget
            or k that exceeds the items.
    """

    space: SearchSpace
    exact: ExactScores
    plan: EvaluationPlan
    labels: Int32Array | None = None

    def __post_init__(self) -> None:
        n_queries, n_items = len(self.space.query_texts), self.space.n_items
        if self.exact.scores.shape != (n_queries, n_items):
            raise InputError(
                f"scores {self.exact.scores.shape} do not cover {n_queries} queries x {n_items} items; score every pair"
            )
        for name, values in (("budget", self.plan.budgets), ("k", self.plan.ks)):
            if max(values) > n_items:
                raise InputError(f"{name}={max(values)} exceeds the {n_items} items in the index; lower the {name} or add items")
        if self.labels is not None and len(self.labels) != n_queries:
            raise InputError(f"{len(self.labels)} labels for {n_queries} queries; give one per query or none at all")
        self.space.check_methods(self.plan.methods)

    @property
    def n_queries(self) -> int:
        """Queries to evaluate."""
        return len(self.exact.query_ids)


def index_labels(items: Items, queries: Queries) -> Int32Array | None:
    """The item index of each query's label (n_queries,), or None where the queries bring no labels.

    Raises:
        InputError: a query without a label beside others that have one, or a label that is no item.
    """
    if queries.labels is None:
        return None
    if missing := [queries.ids[row] for row, label in enumerate(queries.labels) if not label]:
        raise InputError(
            f"{len(missing)} queries have no label (first: {missing[0]!r}); give each one, or drop the column item_id"
        )
    unknown = [row for row, label in enumerate(queries.labels) if label not in items.index_of]
    if unknown:
        pair = f"query {queries.ids[unknown[0]]!r}: {queries.labels[unknown[0]]!r}"
        raise InputError(f"{len(unknown)} labels are not among the {len(items)} items (first: {pair}); take the items they name")
    return np.array([items.index_of[label] for label in queries.labels], dtype=np.int32)


def evaluate_queries(examination: Examination, queries: Iterable[int]) -> pa.Table:
    """Rows of `SCHEMA` for these query indices: per query, methods x budgets x k in the plan's order.

    `found` are the k best items that were scored, best first by (score, item index): what the search returns.
    `accuracy` and `ndcg_at_10` do not depend on k; they stand in each of its rows, and are null without labels.
    `index_ce_calls` is what the method's embeddings cost before the first query, null where that is not known.
    `target_recall` is the recall at this k at which the search was to stop, null for one that spends its budget.
    `search_seconds` is the time of the search without the CE: what remains beside looking its scores up.

    Raises:
        InputError, ModelError: see `search`.
    """
    rows = [row for query in queries for row in _evaluate_query(examination, query)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def evaluate_in_process(examination: Examination) -> pa.Table:
    """All queries in this process: the exact twin of `axn_ray.distributed.evaluate.evaluate`."""
    return evaluate_queries(examination, range(examination.n_queries))


def _evaluate_query(examination: Examination, query: int) -> Iterator[dict[str, Any]]:
    plan, exact_scores = examination.plan, examination.exact.scores[query]
    exact = exact_top_k(exact_scores, max(plan.ks))
    cells = [(method, budget) for method in plan.methods for budget in plan.budgets]
    searched = [_search(examination.space, method, query, budget, exact_scores) for method, budget in cells]
    labelled: list[tuple[float, float] | tuple[None, None]] = [(None, None)] * len(cells)
    if examination.labels is not None:
        labelled = [*label_metrics([result.item_index for result, *_ in searched], int(examination.labels[query]))]
    for (method, budget), (result, ce_calls, seconds), (accuracy, ndcg) in zip(cells, searched, labelled, strict=True):
        for k in plan.ks:
            yield {
                "query_index": query,
                "query_id": examination.exact.query_ids[query],
                "method": method.name,
                "rounds": method.rounds,
                "budget": budget,
                "k": k,
                "target_recall": method.target_recall if method.k == k else None,
                "recall": recall_at_k(result.item_index, exact[:k]),
                "ce_calls": ce_calls,
                "index_ce_calls": examination.space.index_ce_calls(method),
                "search_seconds": seconds,
                "accuracy": accuracy,
                "ndcg_at_10": ndcg,
                "found": result.item_index[:k],
            }


def exact_label_metrics(examination: Examination) -> dict[str, float]:
    """Mean `accuracy` and `ndcg_at_10` of the CE's exact ranking; empty without labels. No search can be closer to the CE."""
    if examination.labels is None:
        return {}
    pairs = zip(examination.exact.scores, examination.labels.tolist(), strict=True)
    values = [label_metrics([exact_top_k(scores, LABEL_CUTOFF)], label)[0] for scores, label in pairs]
    return dict(zip(("accuracy", "ndcg_at_10"), np.mean(values, axis=0).tolist(), strict=True))


def _search(
    space: SearchSpace, method: Method, query: int, budget: int, exact_scores: FloatArray
) -> tuple[SearchResult, int, float]:
    """One search whose CE is the row of exact scores; the number of scores that it asked for, and its own seconds."""
    asked: list[int] = []
    elsewhere = 0.0

    def look_up(chosen: Int32Array) -> FloatArray:
        nonlocal elsewhere
        begun = time.perf_counter()
        asked.append(len(chosen))
        scores = exact_scores[chosen]
        elsewhere += time.perf_counter() - begun
        return scores

    def retrieve(request: Retrieve) -> Retrieved:
        nonlocal elsewhere
        begun = time.perf_counter()
        index = space.index_of(method)  # the first search makes it
        elsewhere += time.perf_counter() - begun
        return index.retrieve([request])[0]

    begun = time.perf_counter()
    result = run_search(start_search(method, space, query, budget), look_up, retrieve)
    return result, sum(asked), time.perf_counter() - begun - elsewhere
