"""The methods that the examiner compares: each a frozen value, and the one function that sets it up for a query.

Knows no CE score and no budget beyond the first round's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from axn_ray.core.estimators import Estimator, Pinv, Ridge
from axn_ray.core.first_round import Bm25Index, dense_first_round, random_first_round
from axn_ray.core.score_matrix import FloatArray, ScoreScale
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

BM25, RANDOM = "bm25", "random"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to spend the budget.

    `first_round` and `embeddings` name embeddings of the search space; a first round may also be `bm25` or `random`.
    One round is retrieve-and-rerank (RnR). `blend` is the paper's lambda for `pinv`; the variances belong to `ridge`.

    Raises:
        InputError: several rounds without estimator or embeddings.
    """

    name: str
    first_round: str
    embeddings: str | None = None
    estimator: Literal["pinv", "ridge"] | None = None
    rounds: int = 1
    blend: float = 0.0
    noise_variance: float = 0.5
    prior_variance: float = 1.0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"method {self.name!r} has rounds={self.rounds}; give 1 or more")
        if self.rounds > 1 and (self.estimator is None or self.embeddings is None):
            raise InputError(f"method {self.name!r} has rounds={self.rounds}; name its estimator and embeddings, or set rounds=1")


METHODS: Mapping[str, Method] = {
    "rnr_bm25": Method(name="RnR, BM25", first_round=BM25),
    "rnr_de": Method(name="RnR, DE", first_round="de"),
    "rnr_mf_ind": Method(name="RnR, MF_Ind", first_round="mf_ind"),
    "axn_pinv_de": Method(name="AXN pinv, DE", first_round="de", embeddings="de", estimator="pinv", rounds=10),
    "axn_pinv_mf_trns": Method(name="AXN pinv, MF_Trns", first_round="de", embeddings="mf_trns", estimator="pinv", rounds=10),
    "axn_pinv_mf_ind_bm25": Method(
        name="AXN pinv, MF_Ind, BM25 first", first_round=BM25, embeddings="mf_ind", estimator="pinv", rounds=10
    ),
    "axn_pinv_mf_ind_random": Method(
        name="AXN pinv, MF_Ind, random first", first_round=RANDOM, embeddings="mf_ind", estimator="pinv", rounds=10
    ),
    "axn_pinv_mf_ind": Method(name="AXN pinv, MF_Ind", first_round="mf_ind", embeddings="mf_ind", estimator="pinv", rounds=10),
    "axn_blend_mf_ind": Method(
        name="AXN pinv λ=0.5, MF_Ind", first_round="mf_ind", embeddings="mf_ind", estimator="pinv", rounds=10, blend=0.5
    ),
    "axn_bayes": Method(name="AXN bayes", first_round="bayes", embeddings="bayes", estimator="ridge", rounds=10),
    "axn_ridge_mf_ind": Method(name="AXN ridge, MF_Ind", first_round="mf_ind", embeddings="mf_ind", estimator="ridge", rounds=10),
}


def methods_for(embeddings: Iterable[str]) -> list[str]:
    """Keys of all methods that can do with these embeddings (BM25 and a random first round are always there)."""
    there = {*embeddings, BM25, RANDOM, None}
    return [key for key, method in METHODS.items() if {method.first_round, method.embeddings} <= there]


def choose_methods(names: Sequence[str], rounds: Sequence[int]) -> tuple[Method, ...]:
    """Methods by their key in `METHODS`, each that searches once per number of rounds; RnR once.

    Raises:
        InputError: an unknown key.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is not known; choose among {', '.join(METHODS)}")
    chosen: list[Method] = []
    for method in (METHODS[name] for name in names):
        chosen += [method] if method.estimator is None else [replace(method, rounds=number) for number in rounds]
    return tuple(chosen)


@dataclass(frozen=True)
class Embeddings:
    """Items (n_items, dim) and queries (n_queries, dim) in one space, and the scale that brings CE scores into it.

    Without a scale each search fits its own. `noise_variance` of the scaled scores, where a fit has estimated it.

    Raises:
        InputError: shapes that do not fit, or a NaN or infinite value.
    """

    items: FloatArray
    queries: FloatArray
    scale: ScoreScale | None
    noise_variance: float | None = None

    def __post_init__(self) -> None:
        if self.items.ndim != 2 or self.queries.ndim != 2 or self.items.shape[1] != self.queries.shape[1]:
            raise InputError(f"items {self.items.shape} and queries {self.queries.shape} must both be (n, dim), same dim")
        for side, array in (("item", self.items), ("query", self.queries)):
            bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
            if len(bad):
                raise InputError(f"{len(bad)} {side} embeddings are NaN or infinite (first: row {bad[0]}); make them again")


@dataclass(frozen=True)
class SearchSpace:
    """All that the methods look at: embeddings by name, the queries' texts (n_queries,), BM25 over the items.

    Raises:
        InputError: parts that count different items or queries.
    """

    embeddings: Mapping[str, Embeddings]
    query_texts: tuple[str, ...]
    bm25: Bm25Index | None = None

    def __post_init__(self) -> None:
        if not self.embeddings:
            raise InputError("a search space without embeddings; give at least the dual-encoder's under the name 'de'")
        for name, part in self.embeddings.items():
            shape = (len(part.items), len(part.queries))
            if shape != (self.n_items, len(self.query_texts)):
                expected = (self.n_items, len(self.query_texts))
                raise InputError(f"embeddings {name!r} hold {shape} instead of {expected} items and queries; align them")
        if self.bm25 is not None and self.bm25.n_items != self.n_items:
            raise InputError(f"BM25 holds {self.bm25.n_items} items, the embeddings {self.n_items}; build it over the same items")

    @property
    def n_items(self) -> int:
        """Items to search among."""
        return len(next(iter(self.embeddings.values())).items)

    def check_methods(self, methods: Iterable[Method]) -> None:
        """Refuse methods that need what this space does not hold.

        Raises:
            InputError: embeddings of that name, or BM25, are missing.
        """
        known = {RANDOM, *self.embeddings, *([BM25] if self.bm25 is not None else [])}
        for method in methods:
            for name in (method.first_round, method.embeddings):
                if name is not None and name not in known:
                    raise InputError(f"method {method.name!r} needs {name!r}, given are {', '.join(sorted(known))}; add it")


def build_estimator(
    method: Method,
    item_embeddings: FloatArray,
    scale: ScoreScale | None,
    query_embedding: FloatArray,
    noise_variance: float | None = None,
) -> Estimator | None:
    """The method's estimator for one query (None for RnR): items (n_items, dim), query (dim,).

    A `noise_variance` that was fitted with the embeddings takes the place of the method's.
    """
    match method.estimator:
        case None:
            return None
        case "pinv":
            return Pinv(item_embeddings, scale, method.blend, query_embedding)
        case "ridge":
            noise_variance = method.noise_variance if noise_variance is None else noise_variance
            if scale is None:
                raise InputError(f"method {method.name!r} needs a fitted scale; factorize first")
            return Ridge(item_embeddings, scale, query_embedding, noise_variance, method.prior_variance)


def prepare(method: Method, space: SearchSpace, query: int, n_first: int) -> tuple[Int32Array, Estimator | None]:
    """What `search` needs for one query of the space: the first round's ranking (n_first,) and the estimator.

    Raises:
        InputError: see `SearchSpace.check_methods`, `dense_first_round` and `Bm25Index.rank`.
    """
    space.check_methods([method])
    if method.first_round == BM25 and space.bm25 is not None:
        ranking = space.bm25.rank(space.query_texts[query], n_first)
    elif method.first_round == RANDOM:
        ranking = random_first_round(space.n_items, n_first, np.random.default_rng(query))
    else:
        first = space.embeddings[method.first_round]
        ranking = dense_first_round(first.items, first.queries[query], n_first)
    if method.embeddings is None:
        return ranking, None
    part = space.embeddings[method.embeddings]
    return ranking, build_estimator(method, part.items, part.scale, part.queries[query], part.noise_variance)
