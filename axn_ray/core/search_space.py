"""What the methods search in, and the one function that sets a method up for a query. Knows no CE score."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from axn_ray.core.adaptive import Search, search, split_budget
from axn_ray.core.estimators import Estimator, Pinv, Ridge, Tour
from axn_ray.core.first_round import Bm25Index, dense_first_round, random_first_round
from axn_ray.core.graph_search import gar, ladr
from axn_ray.core.index import ItemIndex
from axn_ray.core.lexical import LexicalMean
from axn_ray.core.methods import BM25, FIXED, RANDOM, Method
from axn_ray.core.score_matrix import FloatArray, ItemArray, ScoreScale
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError


@dataclass(frozen=True)
class Embeddings:
    """Items (n_items, dim) and queries (n_queries, dim) in one space, and the scale that brings CE scores into it.

    Without a scale each search fits its own. Some spaces hold no queries: see `cur_embeddings`. `noise_variance` of the
    scaled scores and `prior_variance` (dim,) of a query's numbers, where a fit has estimated them; `index_ce_calls` is what
    making the embeddings cost, where it is known; `lexical` is what the words of query and item add to the prior mean. Ridge
    estimators take them in; with directions that vary by different amounts the others would be wrong and are refused.

    Raises:
        InputError: shapes that do not fit, or a NaN or infinite value.
    """

    items: ItemArray
    queries: FloatArray | None
    scale: ScoreScale | None
    noise_variance: float | None = None
    index_ce_calls: int | None = None
    lexical: LexicalMean | None = None
    prior_variance: FloatArray | None = None

    def __post_init__(self) -> None:
        queries = self.items[:0] if self.queries is None else self.queries
        if self.items.ndim != 2 or queries.ndim != 2 or self.items.shape[1] != queries.shape[1]:
            raise InputError(f"items {self.items.shape} and queries {queries.shape} must both be (n, dim), same dim")
        for side, array in (("item", self.items), ("query", queries)):
            bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
            if len(bad):
                raise InputError(f"{len(bad)} {side} embeddings are NaN or infinite (first: row {bad[0]}); make them again")


def cur_embeddings(dense_rows: FloatArray) -> Embeddings:
    """The space of ANNCUR and ADACUR (Yadav et al., EMNLP 2022 and Findings of EMNLP 2023): scores R (n_rows, n_items).

    R holds the raw CE scores of some train queries against every item; an item's embedding is its column. In that space
    `Pinv` is CUR: a query with the scores c of its anchors A gets `c pinv(R_A) R`.

    Raises:
        InputError: scores that are not a matrix, or a NaN or infinite one.
    """
    return Embeddings(np.ascontiguousarray(dense_rows.T), None, ScoreScale(), index_ce_calls=dense_rows.size)


@dataclass(frozen=True)
class SearchSpace:
    """All that the methods look at: embeddings by name, the queries' texts (n_queries,), BM25 over the items.

    `graphs` hold the nearest neighbours (n_items, n_neighbours) of the items in the embeddings of that name.

    Raises:
        InputError: parts that count different items or queries.
    """

    embeddings: Mapping[str, Embeddings]
    query_texts: tuple[str, ...]
    bm25: Bm25Index | None = None
    graphs: Mapping[str, Int32Array] = field(default_factory=dict)
    _indexes: dict[str, ItemIndex] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.embeddings:
            raise InputError("a search space without embeddings; give at least the dual-encoder's under the name 'de'")
        n_queries = len(self.query_texts)
        for name, part in self.embeddings.items():
            shape = (len(part.items), n_queries if part.queries is None else len(part.queries))
            if shape != (self.n_items, n_queries):
                expected = (self.n_items, n_queries)
                raise InputError(f"embeddings {name!r} hold {shape} instead of {expected} items and queries; align them")
        if self.bm25 is not None and self.bm25.n_items != self.n_items:
            raise InputError(f"BM25 holds {self.bm25.n_items} items, the embeddings {self.n_items}; build it over the same items")
        for name, graph in self.graphs.items():
            if len(graph) != self.n_items:
                raise InputError(f"graph {name!r} holds {len(graph)} items, the embeddings {self.n_items}; build it anew")

    def index_of(self, method: Method) -> ItemIndex:
        """The index that answers what the method's searches retrieve; made once for each of the embeddings."""
        name = method.embeddings or method.first_round
        if name not in self._indexes:
            self._indexes[name] = ItemIndex(self.embeddings[name].items)
        return self._indexes[name]

    @property
    def n_items(self) -> int:
        """Items to search among."""
        return len(next(iter(self.embeddings.values())).items)

    def check_methods(self, methods: Iterable[Method]) -> None:
        """Refuse methods that need what this space does not hold.

        Raises:
            InputError: embeddings of that name, their queries, a graph as wide, or BM25, are missing.
        """
        with_queries = {name for name, part in self.embeddings.items() if part.queries is not None}
        rankings = {RANDOM, FIXED, *with_queries, *([BM25] if self.bm25 is not None else [])}
        for method in methods:
            known = {*self.embeddings} if method.estimator == "pinv" and not method.blend else with_queries
            for name, given in ((method.first_round, rankings), (method.embeddings, known)):
                if name is not None and name not in given:
                    raise InputError(f"method {method.name!r} needs {name!r}, given are {', '.join(sorted(given))}; add it")
            variances = None if method.embeddings is None else self.embeddings[method.embeddings].prior_variance
            if variances is not None and (method.graph or method.estimator in ("pinv", "tour")):
                what = f"method {method.name!r} takes all directions of {method.embeddings!r} as equal, which they are not"
                raise InputError(f"{what}; use the estimator ridge")
            if method.graph and method.embeddings is not None:
                width = self.graphs[method.embeddings].shape[1] if method.embeddings in self.graphs else 0
                if width < method.n_neighbours:
                    needed = f"{method.n_neighbours} neighbours of each item in {method.embeddings!r}"
                    raise InputError(f"method {method.name!r} needs {needed}, given are {width}; build the graph as wide")

    def index_ce_calls(self, method: Method) -> int | None:
        """CE calls that the method's embeddings cost, or None where that is not known."""
        used = {method.first_round, method.embeddings}
        calls = [part.index_ce_calls for name, part in self.embeddings.items() if name in used]
        known = [number for number in calls if number is not None]
        return sum(known) if len(known) == len(calls) else None


def build_estimator(
    method: Method,
    item_embeddings: ItemArray,
    scale: ScoreScale | None,
    query_embedding: FloatArray | None,
    noise_variance: float | None = None,
    offset: FloatArray | None = None,
    prior_variance: FloatArray | None = None,
) -> Estimator | None:
    """The method's estimator for one query (None for RnR): items (n_items, dim), query (dim,).

    A `noise_variance` and a `prior_variance` (dim,) that were fitted with the embeddings take the place of the method's;
    `offset`: see `Ridge`.

    Raises:
        InputError: an estimator that needs a query embedding or a fitted scale and has none.
    """
    if method.estimator is None:
        return None
    if method.estimator == "pinv":
        return Pinv(item_embeddings, scale, method.blend, query_embedding)
    if query_embedding is None:
        raise InputError(f"method {method.name!r} needs a query embedding; choose embeddings that have them")
    if method.estimator == "tour":
        return Tour(item_embeddings, query_embedding, method.learning_rate, method.temperature)
    if scale is None:
        raise InputError(f"method {method.name!r} needs a fitted scale; factorize first")
    noise_variance = method.noise_variance if noise_variance is None else noise_variance
    prior = method.prior_variance if prior_variance is None else prior_variance
    return Ridge(item_embeddings, scale, query_embedding, noise_variance, prior, offset)


def start_search(method: Method, space: SearchSpace, query: int, budget: int) -> Search:
    """Start the method's search for one query of the space under a budget of CE calls.

    What it retrieves, it retrieves among `space.embeddings[method.embeddings].items`.

    Raises:
        InputError: see `SearchSpace.check_methods`, `search`, `gar`, `ladr` and `build_estimator`.
    """
    space.check_methods([method])
    n_first = budget if method.graph else split_budget(budget, method.rounds)[0]
    # Where the search opens in its estimator's own embeddings, the driver's index finds the first round, too.
    opens_itself = method.estimator is not None and method.first_round == method.embeddings
    ranking = None if opens_itself else _rank_first(method, space, query, n_first)
    if method.embeddings is None:
        return search(None, ranking, n_items=space.n_items, budget=budget, rounds=method.rounds)
    if method.graph and ranking is not None:
        graph = space.graphs[method.embeddings][:, : method.n_neighbours]
        if method.graph == "gar":
            return gar(ranking, graph, budget=budget, rounds=method.rounds)
        return ladr(ranking, graph, budget=budget, rounds=method.rounds, depth=method.depth)
    part = space.embeddings[method.embeddings]
    query_embedding = None if part.queries is None else part.queries[query]
    offset = None if part.lexical is None else part.lexical.of_query(space.query_texts[query])
    learned = part.noise_variance, offset, part.prior_variance
    estimator = build_estimator(method, part.items, part.scale, query_embedding, *learned)
    return search(estimator, ranking, n_items=space.n_items, budget=budget, rounds=method.rounds, stop=method.stop)


def _rank_first(method: Method, space: SearchSpace, query: int, n: int) -> Int32Array:
    """The head (n,) of the ranking that opens the method's search for one query."""
    if method.first_round == BM25 and space.bm25 is not None:
        return space.bm25.rank(space.query_texts[query], n)
    if method.first_round in (RANDOM, FIXED):
        return random_first_round(space.n_items, n, np.random.default_rng(query if method.first_round == RANDOM else 0))
    first = space.embeddings[method.first_round]
    if first.queries is None:
        raise InputError(f"embeddings {method.first_round!r} hold no queries; open the search with others")
    return dense_first_round(first.items, first.queries[query], n)
