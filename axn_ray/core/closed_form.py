"""The `bayes` fit from end to end: several views of each item side by side, reduced to a few numbers, and EM over these.

Knows no CE, no files and no Ray.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import scipy.linalg

from axn_ray.core.bayes import (
    BayesInputs,
    BayesModel,
    Float64Array,
    SumStatistics,
    e_step,
    iterate_em,
    start_model,
    whiten,
    with_constant,
)
from axn_ray.core.score_matrix import FloatArray, ItemArray, ScoreMatrix, ScoreScale
from axn_ray.errors import FitError, InputError

logger = logging.getLogger(__name__)

StoredArray = npt.NDArray[np.floating]  # float32, or float16 as views are stored

BLOCK, SAMPLE = 1 << 14, 1 << 17
LARGEST = 127  # of an int8 whose negative is one, too
LEAST_STEP = 1e-9  # its square, a prior variance, is far from float32's least
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

    def scored(self) -> "TrainData":
        """The queries that have scores: the others say nothing, and would hold EM where it is."""
        there = np.flatnonzero(np.diff(self.matrix.indptr))
        return self if len(there) == self.matrix.n_queries else self._take(there)

    def first_part(self) -> "TrainData":
        """Some of the queries, evenly spaced: what EM reads first."""
        n_queries = self.matrix.n_queries
        n = min(n_queries, max(FIRST_LEAST, n_queries // FIRST_PART))
        return self._take(np.linspace(0, n_queries - 1, n).astype(np.int64))

    def _take(self, rows: npt.NDArray[np.int64]) -> "TrainData":
        return replace(self, query_embeddings=self.query_embeddings[rows], matrix=self.matrix.take(rows))


Spread = Callable[[TrainData], SumStatistics]


def in_one_process(data: TrainData) -> SumStatistics:
    """The E-step over all queries in this process."""
    return partial(e_step, inputs=data.share(range(data.matrix.n_queries)))


def fit_model(
    data: TrainData,
    iterations: int,
    spread: Spread = in_one_process,
    judge: Callable[[BayesModel], float] | None = None,
    patience: int = 3,
) -> BayesModel:
    """EM from the dual-encoder's own scores: see `ItemFeatures.start_weights`. The first iteration is over part of the queries.

    Its model is nearly as good as one of all of them, for it is the start that holds it back, and costs a fourth. With `judge`,
    a model's error on what is held out, the best model is kept, and EM ends after `patience` iterations without a better one.

    Raises:
        InputError: no observations.
        FitError: see `iterate_em`.
    """
    if not data.matrix.n_observed:
        raise InputError("the score matrix is empty; score some pairs first")
    best, least = None, np.inf
    for model in _models(data.scored(), iterations, spread):
        error = 0.0 if judge is None else judge(model)
        if best is None or judge is None or error < least:
            best, least = model, error
        elif model.iterations - best.iterations >= patience:
            break
    assert best is not None  # at least one iteration
    return best


def _models(data: TrainData, iterations: int, spread: Spread) -> Iterator[BayesModel]:
    """After each iteration of EM, the first one over part of the queries."""
    variance = float(np.var(data.scale.scale(data.matrix.scores)))
    prior = data.features.start_weights()
    (model,) = iterate_em(spread(data.first_part()), start_model(prior, variance), prior, iterations=1)
    yield model
    if iterations > 1:
        yield from iterate_em(spread(data), model, prior, iterations=iterations - 1)


@dataclass(frozen=True)
class Embedded:
    """What the search needs: scaled scores are `item_embeddings u + N(0, noise_variance)`, `u ~ N(query_map [x ; 1], prior)`.

    `item_embeddings int8 (n_items, width)`, or float32 where they are not kept; `query_map float32 (width, dim + 1)`; the prior
    covariance is diagonal, `prior_variance float32 (width,)`.
    """

    item_embeddings: ItemArray
    query_map: FloatArray
    prior_variance: FloatArray
    noise_variance: float

    def embed_queries(self, query_embeddings: FloatArray) -> FloatArray:
        """The dual-encoder's (n, dim) -> (n, width)."""
        return with_constant(query_embeddings, 1.0) @ self.query_map.T


def embed(model: BayesModel, features: ItemFeatures) -> Embedded:
    """Every item in the coordinates of the search (see `whiten`), each direction in steps of its own, rounded to 8 bits.

    A step is the 127th part of the largest number in its direction, or in the sample of the items where they are many, and no
    less than `LEAST_STEP` of the largest step: where items do not differ at all there is nothing but rounding. The queries take
    the steps in, so that inner products stay what they were.

    Raises:
        FitError: an item embedding is NaN or infinite.
    """
    item_map, query_map = whiten(model)
    largest = np.max([np.abs(block @ item_map.astype(np.float32)).max(axis=0) for block in features.sample()], axis=0)
    steps = np.maximum(largest, LEAST_STEP * (largest.max() or 1.0)).astype(np.float64) / LARGEST
    to_steps = (item_map / steps).astype(np.float32)
    embeddings = np.empty((len(features), len(item_map)), dtype=np.int8)
    for rows, block in features.blocks():
        numbers = np.rint(block @ to_steps)
        if not np.isfinite(numbers).all():
            raise FitError("item embeddings are NaN or infinite; check the scores for extreme values")
        embeddings[rows] = np.clip(numbers, -LARGEST, LARGEST)
    in_steps, prior_variance = (steps[:, None] * query_map).astype(np.float32), np.square(steps).astype(np.float32)
    return Embedded(embeddings, in_steps, prior_variance, model.noise_variance)
