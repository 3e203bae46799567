"""The search desk: which items the CE should score next, round by round, until the budget is spent (AXN, Algorithm 1).

A generator: it yields what it wants (`Score` these items, `Retrieve` items near an embedding) and receives the answer, so
that tests, evaluation and serving drive one loop, and a driver may batch the requests of many searches. Knows no CE, no
index, no estimator's formula, no Ray, no clock.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from axn_ray.core.estimators import Estimator, Ridge
from axn_ray.core.index import Retrieve, Retrieved
from axn_ray.core.ranking import order_by_score
from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.stopping import HEAD, Stop
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError, ModelError


@dataclass(frozen=True)
class SearchResult:
    """Every item that was scored, best first by (score, item index): three arrays (n,), at most the budget.

    `score` float32 is the raw CE logit, `round` int32 (from 1) the round that chose the item. `n_known` of them were
    looked up instead of computed; they count as CE calls all the same, and so do the `n_failed` items beside them that the
    CE could not score. `failures` has the reason of each of these (item index -> one sentence), where the driver gives it.
    """

    item_index: Int32Array
    score: FloatArray
    round: Int32Array
    n_known: int = 0
    n_failed: int = 0
    failures: Mapping[int, str] = field(default_factory=dict)

    @property
    def n_ce_calls(self) -> int:
        """Pairs asked for; no pair is asked for twice."""
        return len(self.item_index) + self.n_failed


@dataclass(frozen=True, eq=False)
class Score:
    """A request: the raw CE scores float32 (n,) of the items `item_index` int32 (n,), NaN for one that cannot be scored."""

    item_index: Int32Array


# To a `Score` the driver sends the scores (n,), to a `Retrieve` a `Retrieved`.
Search = Generator[Score | Retrieve, FloatArray | Retrieved, SearchResult]
# From what was scored so far (items and scores in the order asked, and a mask (n_items,)) to the items to score next.
Choose = Callable[[Int32Array, FloatArray, npt.NDArray[np.bool_]], Int32Array]


def split_budget(budget: int, rounds: int) -> list[int]:
    """Items to score in each round: equal shares, what remains goes one by one to the first rounds."""
    share, remainder = divmod(budget, rounds)
    return [share + (number < remainder) for number in range(rounds)]


def search(
    estimator: Estimator | None,
    first_round: Int32Array | None,
    *,
    n_items: int,
    budget: int,
    rounds: int,
    stop: Stop | None = None,
) -> Search:
    """Start a search: yields requests, receives their answers, returns the result.

    Round 1 scores the head of `first_round` (a ranking, best first), or what lies nearest to the estimator's own query
    embedding where that is None; each later round the items not yet scored that `estimator` ranks highest. `rounds=1` with
    a ranking is retrieve-and-rerank and needs no estimator. Exactly `budget` items are asked for, none twice; with a `stop`,
    which is looked at before each round but the first, perhaps fewer. An item that cannot be scored spends its call, teaches
    nothing and is not in the result.

    Raises:
        InputError: here, before the first round: budget or rounds out of range, no estimator for a second round, nothing
            to start from, a first round that is too short, names an item twice or one that does not exist, a stop whose
            estimator has no variance or whose k exceeds the budget; while it runs: an answer of another size than asked
            for, or with items that were scored before.
        ModelError: while it runs: a score received is infinite, no item of the first round could be scored, or the estimator
            gives NaN.
    """
    check_budget(n_items, budget, rounds)
    if rounds > 1 and estimator is None:
        raise InputError(f"rounds={rounds} needs an estimator for the rounds after the first; give one or set rounds=1")
    shares = split_budget(budget, rounds)
    if first_round is not None:
        check_first_round(first_round, shares[0], n_items)
    elif estimator is None or estimator.query_embedding is None:
        raise InputError("nothing to start the search from; give a first round or an estimator with a query embedding")
    if stop is not None:
        if not isinstance(estimator, Ridge):
            raise InputError("target_recall needs an estimator that knows its own error; use ridge or leave it out")
        if stop.k > budget:
            raise InputError(f"target_recall at k={stop.k} needs k scores, budget={budget}; raise the budget or lower k")
    return _run_estimator(estimator, first_round, n_items, shares, stop)


def _run_estimator(
    estimator: Estimator | None, first_round: Int32Array | None, n_items: int, shares: list[int], stop: Stop | None
) -> Search:
    scored = _Scored(n_items)
    for share in shares:
        if first_round is not None and not scored.shares:
            chosen = first_round[:share]
        else:
            n = share if stop is None else min(max(share, HEAD), n_items - len(scored.asked))
            offset = estimator.offset if isinstance(estimator, Ridge) else None
            head = scored.read_retrieved((yield Retrieve(_embedding(estimator), n, scored.asked, offset)), n)
            if stop is not None and isinstance(estimator, Ridge) and stop.is_reached(estimator, scored.score, *head):
                break
            chosen = head.item_index[:share]
        scores = scored.add(chosen, (yield Score(chosen)))
        good = ~np.isnan(scores)
        if estimator is not None and len(scored.shares) < len(shares) and good.any():
            estimator.observe(chosen[good], scores[good])
    return scored.result()


def run_rounds(choose: Choose, n_items: int, budget: int) -> Search:
    """Let `choose` name unscored items, at least one and no more than remain, until exactly `budget` are scored.

    Raises:
        ModelError: while it runs: a score received is NaN or infinite.
    """
    scored = _Scored(n_items)
    while len(scored.item_index) < budget:
        chosen = choose(scored.item_index, scored.score, scored.is_asked).astype(np.int32)
        scores = scored.add(chosen, (yield Score(chosen)))
        if (bad := np.flatnonzero(np.isnan(scores))).size:
            raise _no_number(chosen[bad[0]], scores[bad[0]])
    return scored.result()


def run_search(
    running: Search, score: Callable[[Int32Array], FloatArray], retrieve: Callable[[Retrieve], Retrieved] | None = None
) -> SearchResult:
    """Drive a search to its end with functions that answer its requests; without `retrieve`, of a search that has none.

    Raises:
        InputError: the search wants to retrieve and there is no way to.
    """
    request = next(running)
    while True:
        answer: FloatArray | Retrieved
        if isinstance(request, Score):
            answer = score(request.item_index)
        elif retrieve is not None:
            answer = retrieve(request)
        else:
            raise InputError("the search wants items from an index; drive it with one")
        try:
            request = running.send(answer)
        except StopIteration as finished:
            return finished.value


class _Scored:
    """What one search has `asked` for, and what of it was scored, in that order; checks every answer at the door."""

    def __init__(self, n_items: int) -> None:
        self.asked = np.empty(0, dtype=np.int32)
        self.item_index, self.score = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        self.is_asked = np.zeros(n_items, dtype=np.bool_)
        self.shares: list[int] = []

    def read_retrieved(self, answer: FloatArray | Retrieved, n: int) -> Retrieved:
        """An answer to `Retrieve`, n items."""
        if not isinstance(answer, Retrieved) or len(answer.item_index) != n:
            raise InputError(f"a search asked for {n} items and got {answer!r:.80}; send a Retrieved with exactly as many")
        items = answer.item_index.astype(np.int32, copy=False)
        if self.is_asked[items].any() or len(np.unique(items)) < n:
            raise InputError(f"items retrieved ({items[:5]}...) were scored before or come twice; leave the excluded out")
        return answer._replace(item_index=items)

    def add(self, chosen: Int32Array, answer: FloatArray | Retrieved) -> FloatArray:
        """Take in an answer to `Score`: the scores (n,) of the chosen items (n,), returned as float32."""
        scores = _check_scores(answer, chosen, is_first=not len(self.item_index))
        good = ~np.isnan(scores)
        self.asked, self.is_asked[chosen] = np.concatenate([self.asked, chosen]), True
        self.item_index = np.concatenate([self.item_index, chosen[good]])
        self.score = np.concatenate([self.score, scores[good]])
        self.shares.append(int(good.sum()))
        return scores

    def result(self) -> SearchResult:
        """All of it, best first."""
        order = order_by_score(self.item_index, self.score)
        found_in = np.repeat(np.arange(1, len(self.shares) + 1, dtype=np.int32), self.shares)
        n_failed = len(self.asked) - len(order)
        return SearchResult(self.item_index[order], self.score[order], found_in[order], n_failed=n_failed)


def _embedding(estimator: Estimator | None) -> FloatArray:
    embedding = None if estimator is None else estimator.query_embedding
    if embedding is None:
        raise InputError("the estimator has no query embedding to retrieve with; give it one or start from a first round")
    return embedding


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


def _check_scores(received: FloatArray | Retrieved, chosen: Int32Array, is_first: bool) -> FloatArray:
    if isinstance(received, Retrieved):
        raise InputError(f"retrieved items received for {len(chosen)} items to score; send one score per item")
    scores = np.asarray(received, dtype=np.float32)
    if scores.shape != chosen.shape:
        raise InputError(f"scores of shape {scores.shape} received for {len(chosen)} items; send one score per item")
    bad = np.flatnonzero(np.isinf(scores) | (is_first and np.isnan(scores).all()))
    if len(bad):
        raise _no_number(chosen[bad[0]], scores[bad[0]])
    return scores


def _no_number(item: int, score: float) -> ModelError:
    return ModelError(f"the cross-encoder gave item {item} the score {score}; check the item's text and the model's dtype")
