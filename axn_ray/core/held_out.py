"""What a closed-form fit says of scores that it has not seen, and what the words add to it: a small system for each query.

Knows no CE, no files and no Ray.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from axn_ray.core.bayes import BayesModel, Float64Array, whiten
from axn_ray.core.closed_form import BLOCK, Embedded, ItemFeatures
from axn_ray.core.lexical import Feature
from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.core.tokens import Int32Array

WATCHED, JUDGED = 500, 2000  # queries whose held-out scores judge each iteration, and the end
MOST_ANCHORS = 2000  # of a query that is judged


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


class Watch:
    """Scores that no fit sees, of at most `WATCHED` queries: how far a model's posterior mean is from them.

    Holds the features of these queries' items (n, dim), so that nothing but a small product is needed for a model.
    """

    def __init__(
        self,
        features: ItemFeatures,
        query_embeddings: FloatArray,
        scale: ScoreScale,
        observed: ScoreMatrix,
        held_out: ScoreMatrix,
    ) -> None:
        there = np.flatnonzero(np.diff(held_out.indptr))
        rows = there[np.linspace(0, len(there) - 1, min(len(there), WATCHED)).astype(np.int64)]
        matrices = [matrix.take(rows) for matrix in (observed, held_out)]
        items = np.unique(np.concatenate([matrix.item_index for matrix in matrices]))
        self._observed, self._held_out = (
            ScoreMatrix(matrix.indptr, np.searchsorted(items, matrix.item_index).astype(np.int32), matrix.scores, len(items))
            for matrix in matrices
        )
        self._features = np.concatenate([features.take(items[start : start + BLOCK]) for start in range(0, len(items), BLOCK)])
        self._query_embeddings, self._scale = query_embeddings[rows], scale

    def rmse(self, model: BayesModel) -> float:
        """Of the posterior mean given the query's other scores, in scaled units; see `held_out_rmse`."""
        item_map, query_map = (part.astype(np.float32) for part in whiten(model))
        prior_variance = np.ones(len(query_map), dtype=np.float32)
        embedded = Embedded(self._features @ item_map, query_map, prior_variance, model.noise_variance)
        return held_out_rmse(embedded, self._query_embeddings, self._scale, self._observed, self._held_out)


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
    """Of the queries with scores in `judged`; of many, `JUDGED` of them, evenly spaced: each is a small system to solve.

    Of a query's many scores `MOST_ANCHORS` are taken, evenly spaced.
    """
    priors = embedded.embed_queries(query_embeddings).astype(np.float64)
    there = np.flatnonzero(np.diff(judged.indptr))
    for query in there[np.linspace(0, len(there) - 1, min(len(there), JUDGED)).astype(np.int64)].tolist():
        items, scores = observed.row(query)
        taken = np.linspace(0, len(items) - 1, min(len(items), MOST_ANCHORS)).astype(np.int64)
        items, scores = items[taken], scores[taken]
        anchors = embedded.item_embeddings[items].astype(np.float64)
        covariance = (anchors * embedded.prior_variance) @ anchors.T + embedded.noise_variance * np.eye(len(items))
        residual = scale.scale(scores).astype(np.float64) - anchors @ priors[query]
        yield _System(query, items, anchors, priors[query], covariance, residual)
