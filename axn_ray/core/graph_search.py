"""Rivals at the search desk that walk a graph of the items' nearest neighbours: GAR and LADR, under an exact budget.

They yield and receive what `axn_ray.core.adaptive.search` does. Knows no CE, no query embedding and no clock.
"""

import heapq

import numpy as np
import numpy.typing as npt

from axn_ray.core.adaptive import Search, check_budget, check_first_round, run_rounds
from axn_ray.core.index import nearest_items
from axn_ray.core.ranking import order_by_score
from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError


def neighbour_graph(item_embeddings: FloatArray, n_neighbours: int) -> Int32Array:
    """Each item's nearest others by inner product, nearest first: items (n_items, dim) -> (n_items, n_neighbours).

    Exhaustive, in memory bounded by `nearest_items`. An item is never its own neighbour.

    Raises:
        InputError: n_neighbours outside 1..n_items - 1, or embeddings of a wrong shape.
    """
    n_items = len(item_embeddings)
    if not 1 <= n_neighbours < n_items:
        raise InputError(f"n_neighbours={n_neighbours} must lie in 1..{n_items - 1}, the other items; lower it or add items")
    nearest, _ = nearest_items(item_embeddings, item_embeddings, n_neighbours + 1)
    dropped = nearest == np.arange(n_items, dtype=np.int32)[:, None]
    dropped[~dropped.any(axis=1), -1] = True  # many equal embeddings, or a short one: the item itself is not among its nearest
    return nearest[~dropped].reshape(n_items, n_neighbours)


def gar(ranking: Int32Array, graph: Int32Array, *, budget: int, rounds: int) -> Search:
    """Graph-based Adaptive Re-ranking (MacAvaney, Tonellotto and Macdonald, CIKM 2022, Algorithm 1).

    Batches come alternately from the head of `ranking` (budget or more items, best first) and from the frontier: the
    unscored neighbours in `graph` (n_items, n_neighbours) of what was scored, each as good as the best CE score that led
    to it; ties to the one that was reached first, an item's nearest neighbour first. A batch is `budget / rounds` items,
    rounded up, or the frontier where that holds fewer: then there are more rounds.

    Raises:
        InputError: before the first round: budget or rounds out of range, or a ranking that is too short, names an item
            twice or one that does not exist; while it runs: see `search`.
    """
    batch = _check(ranking, graph, budget, rounds)
    return run_rounds(_Gar(ranking, graph, batch, budget), len(graph), budget)


def ladr(ranking: Int32Array, graph: Int32Array, *, budget: int, rounds: int, depth: int) -> Search:
    """Adaptive LADR (Kulkarni, MacAvaney, Goharian and Frieder, SIGIR 2023) with the CE in the place of its dense scorer.

    The head of `ranking` is scored as seeds, then, round by round, the unscored neighbours of the `depth` best items so
    far: those of the best item first, the nearest first. Seeds and rounds are `budget / rounds` items, rounded up, or the
    neighbours where there are fewer. LADR ends where none are left; what remains of the budget goes on down the ranking.

    Raises:
        InputError: see `gar`; or a depth below 1.
    """
    batch = _check(ranking, graph, budget, rounds)
    if depth < 1:
        raise InputError(f"depth={depth} must be at least 1, the items whose neighbours are scored; raise it")

    def choose(anchor_items: Int32Array, scores: FloatArray, is_scored: npt.NDArray[np.bool_]) -> Int32Array:
        best = anchor_items[order_by_score(anchor_items, scores)[:depth]]
        size = min(batch, budget - len(anchor_items))
        reached = _first_of_each(graph[best].ravel())
        new = reached[~is_scored[reached]]
        return (new if len(new) else ranking[~is_scored[ranking]])[:size]

    return run_rounds(choose, len(graph), budget)


class _Gar:
    """Chooses GAR's next batch. The frontier keeps the order in which items were reached: it decides ties."""

    def __init__(self, ranking: Int32Array, graph: Int32Array, batch: int, budget: int) -> None:
        self._ranking, self._graph, self._batch, self._budget = ranking, graph, batch, budget
        self._frontier: dict[int, float] = {}
        self._lowest = float("inf")  # CE score that led to the frontier's last item
        self._n_expanded = 0
        self._from_frontier = True

    def __call__(self, anchor_items: Int32Array, scores: FloatArray, is_scored: npt.NDArray[np.bool_]) -> Int32Array:
        remaining = self._budget - len(anchor_items)
        self._expand(anchor_items[self._n_expanded :], scores[self._n_expanded :], is_scored, remaining)
        self._n_expanded = len(anchor_items)
        size = min(self._batch, remaining)
        self._from_frontier = not self._from_frontier and bool(self._frontier)
        if self._from_frontier:
            # nlargest is stable, so equal ones stay in the order in which they were reached.
            return np.array(heapq.nlargest(size, self._frontier, key=self._frontier.__getitem__), dtype=np.int32)
        return self._ranking[~is_scored[self._ranking]][:size]

    def _expand(self, items: Int32Array, scores: FloatArray, is_scored: npt.NDArray[np.bool_], remaining: int) -> None:
        """Bring the neighbours of newly scored items into the frontier, those of the best first."""
        for item in items:
            self._frontier.pop(int(item), None)
        for place in order_by_score(items, scores):
            score = float(scores[place])
            # A frontier that outlasts the budget, all of it better than this: its neighbours would never be scored.
            if len(self._frontier) >= remaining and score < self._lowest:
                break
            for neighbour in self._graph[items[place]].tolist():
                if not is_scored[neighbour] and score > self._frontier.get(neighbour, -np.inf):
                    self._frontier[neighbour] = score
                    self._lowest = min(self._lowest, score)


def _first_of_each(items: Int32Array) -> Int32Array:
    """The items without repetition, in the order of their first appearance."""
    return items[np.sort(np.unique(items, return_index=True)[1])]


def _check(ranking: Int32Array, graph: Int32Array, budget: int, rounds: int) -> int:
    """Refuse what cannot run; returns the size of a batch."""
    check_budget(len(graph), budget, rounds)
    check_first_round(ranking, budget, len(graph))
    if graph.ndim != 2 or graph.min() < 0 or graph.max() >= len(graph):
        raise InputError(f"a graph {graph.shape} must be (n_items, n_neighbours) of items 0..{len(graph) - 1}; build it anew")
    return -(-budget // rounds)
