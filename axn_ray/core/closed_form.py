"""The `bayes` fit from end to end: several views of each item side by side, reduced to a few numbers, and EM over these.

Knows no CE, no files and no Ray.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from axn_ray.core.bayes import (
    BayesInputs,
    BayesModel,
    Float64Array,
    SumStatistics,
    e_step,
    fit_bayes,
    start_model,
    whiten,
    with_constant,
)
from axn_ray.core.lexical import Feature
from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import FitError, InputError

logger = logging.getLogger(__name__)

StoredArray = npt.NDArray[np.floating]  # float32, or float16 as views are stored

BLOCK, SAMPLE, JUDGED = 1 << 14, 1 << 17, 2000
LARGEST = 127  # of an int8 whose negative is one, too
CONSTANT = 0.3  # the item feature that carries a query's mean score; 1 on the query's side
VIEW_SCALE = 0.5
FIRST_PART, FIRST_LEAST = 4, 100  # the first iteration is over every fourth query, and over a hundred where there are as many


@dataclass(frozen=True)
class ItemFeatures:
    """`v_i = [embedding ; VIEW_SCALE view ; ... ; CONSTANT] basis`: the dual-encoder's embeddings (n_items, dim), then views.

    The arrays may be memory-mapped; only the rows asked for are read. Without a `basis` (features, dim) all stay.

    Raises:
        InputError: a view of other items.
    """

    embeddings: StoredArray
    views: Sequence[StoredArray] = ()
    basis: FloatArray | None = None

    def __post_init__(self) -> None:
        for view in self.views:
            if len(view) != len(self.embeddings):
                raise InputError(f"a view of {len(view)} items beside embeddings of {len(self.embeddings)}; make it again")

    def __len__(self) -> int:
        return len(self.embeddings)

    def take(self, rows: npt.NDArray[np.integer] | slice) -> FloatArray:
        """The features of some items, (n, dim) float32."""
        parts = [self.embeddings[rows], *(view[rows] for view in self.views)]
        starts = np.cumsum([0, *(part.shape[1] for part in parts)])
        whole = np.full((len(parts[0]), starts[-1] + 1), CONSTANT, dtype=np.float32)
        for number, part in enumerate(parts):  # into place: there may be millions of rows
            columns = whole[:, starts[number] : starts[number + 1]]
            np.multiply(part, VIEW_SCALE if number else 1.0, out=columns, dtype=np.float32)
        return whole if self.basis is None else whole @ self.basis

    def blocks(self) -> Iterator[tuple[slice, FloatArray]]:
        """All items, a block of rows at a time."""
        for start in range(0, len(self), BLOCK):
            yield (rows := slice(start, start + BLOCK)), self.take(rows)

    def sample(self) -> Iterator[FloatArray]:
        """All items, or `SAMPLE` of them, evenly spaced, where there are more; a block of rows at a time."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLE)).astype(np.int64))
        return (self.take(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK))

    def moment(self) -> Float64Array:
        """Mean of `v vᵀ` (dim, dim) over the sample."""
        parts = [((block.T @ block).astype(np.float64), len(block)) for block in self.sample()]
        return np.sum([part for part, _ in parts], axis=0) / sum(n for _, n in parts)

    def reduce(self, dim: int) -> "ItemFeatures":
        """The same items by the `dim` directions in which they differ most, or as they are where they have no more."""
        moment = self.moment()
        if len(moment) <= dim:
            return self
        _, basis = scipy.linalg.eigh(moment, subset_by_index=[len(moment) - dim, len(moment) - 1])
        return replace(self, basis=basis.astype(np.float32))

    def start_weights(self) -> Float64Array:
        """W (dim, dual-encoder's dim + 1) with which `v . W [x ; 1]` is the inner product of the dual-encoder's embeddings."""
        n_seen = sum(part.shape[1] for part in (self.embeddings, *self.views)) + 1
        dim = self.embeddings.shape[1]
        weights = np.eye(n_seen, dim + 1)
        weights[:, dim] = 0.0
        return weights if self.basis is None else self.basis.T.astype(np.float64) @ weights


@dataclass(frozen=True)
class TrainData:
    """Features of the items, the dual-encoder's query embeddings (n_queries, dim), the observed scores and their scale."""

    features: ItemFeatures
    query_embeddings: FloatArray
    matrix: ScoreMatrix
    scale: ScoreScale

    def share(self, queries: range) -> BayesInputs:
        """What the E-step of some queries needs: their scores, and the features of the items that these know."""
        matrix = self.matrix.rows(queries)
        observed, columns = np.unique(matrix.item_index, return_inverse=True)
        compact = ScoreMatrix(matrix.indptr, columns.astype(np.int32), matrix.scores, len(observed))
        x = with_constant(self.query_embeddings[queries.start : queries.stop], 1.0)
        return BayesInputs(self.features.take(observed), x, compact, self.scale)

    def first_part(self) -> "TrainData":
        """Some of the queries that have scores, evenly spaced: what EM reads first."""
        there = np.flatnonzero(np.diff(self.matrix.indptr))
        n = min(len(there), max(FIRST_LEAST, len(there) // FIRST_PART))
        rows = there[np.linspace(0, len(there) - 1, n).astype(np.int64)]
        return replace(self, query_embeddings=self.query_embeddings[rows], matrix=self.matrix.take(rows))


Spread = Callable[[TrainData], SumStatistics]


def in_one_process(data: TrainData) -> SumStatistics:
    """The E-step over all queries in this process."""
    return partial(e_step, inputs=data.share(range(data.matrix.n_queries)))


def fit_model(data: TrainData, iterations: int, spread: Spread = in_one_process) -> BayesModel:
    """EM from the dual-encoder's own scores: see `ItemFeatures.start_weights`. The first iteration is over part of the queries.

    Its model is nearly as good as one of all of them, for it is the start that holds it back, and costs a fourth.

    Raises:
        InputError: no observations.
        FitError: see `fit_bayes`.
    """
    if not data.matrix.n_observed:
        raise InputError("the score matrix is empty; score some pairs first")
    variance = float(np.var(data.scale.scale(data.matrix.scores)))
    prior = data.features.start_weights()
    model = fit_bayes(spread(data.first_part()), start_model(prior, variance), prior, iterations=1)
    return fit_bayes(spread(data), model, prior, iterations=iterations - 1) if iterations > 1 else model


@dataclass(frozen=True)
class Embedded:
    """What the search needs: scaled scores are `item_embeddings u + N(0, noise_variance)`, `u ~ N(query_map [x ; 1], prior)`.

    `item_embeddings int8 (n_items, width)`, `query_map float32 (width, dim + 1)`; the prior covariance is diagonal,
    `prior_variance float32 (width,)`.
    """

    item_embeddings: npt.NDArray[np.int8]
    query_map: FloatArray
    prior_variance: FloatArray
    noise_variance: float

    def embed_queries(self, query_embeddings: FloatArray) -> FloatArray:
        """The dual-encoder's (n, dim) -> (n, width)."""
        return with_constant(query_embeddings, 1.0) @ self.query_map.T


def embed(model: BayesModel, features: ItemFeatures) -> Embedded:
    """Every item in the coordinates of the search (see `whiten`), each direction in steps of its own, rounded to 8 bits.

    A step is the 127th part of the largest number in its direction, or in the sample of the items where they are many. The
    queries take the steps in, so that inner products stay what they were.

    Raises:
        FitError: an item embedding is NaN or infinite.
    """
    item_map, query_map = whiten(model)
    largest = np.max([np.abs(block @ item_map.astype(np.float32)).max(axis=0) for block in features.sample()], axis=0)
    steps = np.where(largest == 0.0, 1.0, largest.astype(np.float64) / LARGEST)
    to_steps = (item_map / steps).astype(np.float32)
    embeddings = np.empty((len(features), len(item_map)), dtype=np.int8)
    for rows, block in features.blocks():
        numbers = np.rint(block @ to_steps)
        if not np.isfinite(numbers).all():
            raise FitError("item embeddings are NaN or infinite; check the scores for extreme values")
        embeddings[rows] = np.clip(numbers, -LARGEST, LARGEST)
    in_steps, prior_variance = (steps[:, None] * query_map).astype(np.float32), np.square(steps).astype(np.float32)
    return Embedded(embeddings, in_steps, prior_variance, model.noise_variance)


def fit_lexical_weight(
    embedded: Embedded, query_embeddings: FloatArray, scale: ScoreScale, observed: ScoreMatrix, feature: Feature
) -> float:
    """The weight of a feature of query and item in the prior mean of their scaled score; 0 where it does not help.

    Generalized least squares of what the prior mean of each query's observed scores leaves, under the covariance of these
    scores. Where there are many queries, of `JUDGED` of them.
    """
    explained = size = 0.0
    for system in _systems(embedded, query_embeddings, scale, observed, observed):
        values = feature(system.query)[system.items].astype(np.float64)
        solved = np.linalg.solve(system.covariance, values)
        explained, size = explained + float(solved @ system.residual), size + float(solved @ values)
    return max(0.0, explained / size) if size else 0.0


def held_out_rmse(
    embedded: Embedded,
    query_embeddings: FloatArray,
    scale: ScoreScale,
    observed: ScoreMatrix,
    held_out: ScoreMatrix,
    offset: Feature | None = None,
) -> float:
    """Error of the posterior mean, given a query's `observed` scores, on other scores of the same queries; scaled units.

    `offset` is a part of the prior mean beside the embeddings. Where there are many queries, of `JUDGED` of them.
    """
    squared, n_judged = 0.0, 0
    for system in _systems(embedded, query_embeddings, scale, observed, held_out):
        others, scores = held_out.row(system.query)
        residual, expected = system.residual, scale.scale(scores)
        if offset is not None:
            known = offset(system.query)
            residual, expected = residual - known[system.items], expected - known[others]
        u = system.prior + embedded.prior_variance * (system.anchors.T @ np.linalg.solve(system.covariance, residual))
        squared += float(np.square(embedded.item_embeddings[others].astype(np.float64) @ u - expected).sum())
        n_judged += len(others)
    return float(np.sqrt(squared / n_judged))


class _System(NamedTuple):
    """A train query's observed items (m,): embeddings (m, dim), covariance of their scaled scores, these less the prior mean."""

    query: int
    items: Int32Array
    anchors: Float64Array
    prior: Float64Array
    covariance: Float64Array
    residual: Float64Array


def _systems(
    embedded: Embedded, query_embeddings: FloatArray, scale: ScoreScale, observed: ScoreMatrix, judged: ScoreMatrix
) -> Iterator[_System]:
    """Of the queries with scores in `judged`; of many, `JUDGED` of them, evenly spaced: each is a small system to solve."""
    priors = embedded.embed_queries(query_embeddings).astype(np.float64)
    there = np.flatnonzero(np.diff(judged.indptr))
    for query in there[np.linspace(0, len(there) - 1, min(len(there), JUDGED)).astype(np.int64)].tolist():
        items, scores = observed.row(query)
        anchors = embedded.item_embeddings[items].astype(np.float64)
        covariance = (anchors * embedded.prior_variance) @ anchors.T + embedded.noise_variance * np.eye(len(items))
        residual = scale.scale(scores).astype(np.float64) - anchors @ priors[query]
        yield _System(query, items, anchors, priors[query], covariance, residual)
