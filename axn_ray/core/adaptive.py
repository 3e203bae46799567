"""The search desk: which items the CE should score next, round by round, until the budget is spent (AXN, Algorithm 1).

A generator: it yields the items to score and receives their scores, so that tests, evaluation and serving drive one
loop. Knows no CE, no estimator's formula, no Ray, no clock.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from axn_ray.core.estimators import Estimator
from axn_ray.core.ranking import order_by_score, top_items
from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError, ModelError


@dataclass(frozen=True)
class SearchResult:
    """Every item that was scored, best first by (score, item index): three arrays (budget,).

    `score` float32 is the raw CE logit, `round` int32 (from 1) the round that chose the item. `n_known` of them were
    looked up instead of computed; they count as CE calls all the same.
    """

    item_index: Int32Array
    score: FloatArray
    round: Int32Array
    n_known: int = 0

    @property
    def n_ce_calls(self) -> int:
        """Pairs scored; no pair is scored twice."""
        return len(self.item_index)


Search = Generator[Int32Array, FloatArray, SearchResult]
# From what was scored so far (items and scores in the order asked, and a mask (n_items,)) to the items to score next.
Choose = Callable[[Int32Array, FloatArray, npt.NDArray[np.bool_]], Int32Array]


def split_budget(budget: int, rounds: int) -> list[int]:
    """Items to score in each round: equal shares, what remains goes one by one to the first rounds."""
    share, remainder = divmod(budget, rounds)
    return [share + (number < remainder) for number in range(rounds)]


def search(estimator: Estimator | None, first_round: Int32Array, *, n_items: int, budget: int, rounds: int) -> Search:
    """Start a search: yields int32 item indices (n,) to score, receives their raw CE scores (n,), returns the result.

    Round 1 scores the head of `first_round` (a ranking, best first), each later round the items not yet scored that
    `estimator` ranks highest. `rounds=1` is retrieve-and-rerank and needs no estimator. Exactly `budget` items are
    scored, none twice.

    Raises:
        InputError: here, before the first round: budget or rounds out of range, no estimator for a second round, a
            first round that is too short, names an item twice or one that does not exist; while it runs: the number
            of scores received is not the number of items asked for.
        ModelError: while it runs: a score received is NaN or infinite, or the estimator gives NaN.
    """
    check_budget(n_items, budget, rounds)
    if rounds > 1 and estimator is None:
        raise InputError(f"rounds={rounds} needs an estimator for the rounds after the first; give one or set rounds=1")
    shares = split_budget(budget, rounds)
    check_first_round(first_round, shares[0], n_items)
    remaining = iter(shares)

    def choose(anchor_items: Int32Array, scores: FloatArray, is_scored: npt.NDArray[np.bool_]) -> Int32Array:
        share = next(remaining)
        if estimator is None or not len(anchor_items):
            return first_round[:share]
        return top_items(estimator.approx_scores(anchor_items, scores), share, excluded=is_scored)

    return run_rounds(choose, n_items, budget)


def run_rounds(choose: Choose, n_items: int, budget: int) -> Search:
    """Let `choose` name unscored items, at least one and no more than remain, until exactly `budget` are scored."""
    is_scored = np.zeros(n_items, dtype=np.bool_)
    anchor_items, scores = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
    shares: list[int] = []
    while len(anchor_items) < budget:
        chosen = choose(anchor_items, scores, is_scored).astype(np.int32)
        received = yield chosen
        scores = np.concatenate([scores, _check_scores(received, chosen)])
        anchor_items = np.concatenate([anchor_items, chosen])
        is_scored[chosen] = True
        shares.append(len(chosen))
    order = order_by_score(anchor_items, scores)
    found_in = np.repeat(np.arange(1, len(shares) + 1, dtype=np.int32), shares)
    return SearchResult(anchor_items[order], scores[order], found_in[order])


def run_search(running: Search, score: Callable[[Int32Array], FloatArray]) -> SearchResult:
    """Drive a search to its end with a function that scores item indices (n,) -> raw CE scores (n,)."""
    chosen = next(running)
    while True:
        scores = score(chosen)
        try:
            chosen = running.send(scores)
        except StopIteration as finished:
            return finished.value


def check_budget(n_items: int, budget: int, rounds: int) -> None:
    """Refuse a budget that the items or the rounds do not allow.

    Raises:
        InputError: budget or rounds out of range.
    """
    if budget < 1 or rounds < 1:
        raise InputError(f"budget={budget} and rounds={rounds} must both be at least 1; raise the smaller one")
    if budget > n_items:
        raise InputError(f"budget={budget} exceeds the {n_items} items in the index; lower the budget or add items")
    if rounds > budget:
        raise InputError(f"rounds={rounds} exceeds budget={budget}, each round scores an item; lower rounds or raise the budget")


def check_first_round(first_round: Int32Array, share: int, n_items: int) -> None:
    """Refuse a ranking whose head cannot be scored.

    Raises:
        InputError: it is too short, names an item twice or one that does not exist.
    """
    head = first_round[:share]
    if len(head) < share:
        raise InputError(f"the first round ranks {len(head)} items and scores {share}; rank at least that many")
    if head.min() < 0 or head.max() >= n_items:
        wrong = head.min() if head.min() < 0 else head.max()
        raise InputError(f"the first round names item {wrong}, which lies outside 0..{n_items - 1}; rank the same items")
    if len(np.unique(head)) < share:
        raise InputError(f"the first round names {share - len(np.unique(head))} items twice; rank each item once")


def _check_scores(received: FloatArray, chosen: Int32Array) -> FloatArray:
    scores = np.asarray(received, dtype=np.float32)
    if scores.shape != chosen.shape:
        raise InputError(f"scores of shape {scores.shape} received for {len(chosen)} items; send one score per item")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        where = f"item {chosen[bad[0]]} the score {scores[bad[0]]}"
        raise ModelError(f"the cross-encoder gave {where}; check the item's text and the model's dtype")
    return scores
