"""The closed-form fit: a hierarchical Bayesian linear model of query embeddings over frozen item features, by EM.

    u_q ~ N(W x_q, Sigma)        y_qi = v_i . u_q + noise,  noise ~ N(0, sigma²)

`v_i` are item features (n_items, dim), `x_q` query features (n_queries, n_features), `y` scaled CE scores. Every sum
runs over queries alone, so `e_step` of disjoint queries can be added. Knows no CE, no Ray and no search.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.errors import FitError, InputError

logger = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

WEIGHT_PENALTY = 10.0
CONSTANT = 0.3  # the item feature that carries a query's mean score; 1 on the query's side


@dataclass(frozen=True)
class BayesModel:
    """Parameters: `weights` W (dim, n_features), `covariance` Sigma (dim, dim), `noise_variance` sigma²."""

    weights: Float64Array
    covariance: Float64Array
    noise_variance: float


@dataclass(frozen=True)
class BayesInputs:
    """`item_features (n_items, dim)`, `query_features (n_queries, n_features)` float32, observed scores and their scale."""

    item_features: FloatArray
    query_features: FloatArray
    matrix: ScoreMatrix
    scale: ScoreScale


@dataclass
class SufficientStatistics:
    """What an E-step sums over queries; `+` merges the sums of disjoint queries."""

    moment_xx: Float64Array  # sum of x xᵀ (n_features, n_features)
    moment_mx: Float64Array  # sum of m xᵀ (dim, n_features), m the posterior mean
    spread: Float64Array  # sum of P + m mᵀ (dim, dim), P the posterior covariance
    squared_error: float  # sum over observations of (y - v.m)² + v P v
    log_evidence: float
    n_queries: int
    n_observed: int

    def __add__(self, other: "SufficientStatistics") -> "SufficientStatistics":
        return SufficientStatistics(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def e_step(model: BayesModel, inputs: BayesInputs, queries: Iterable[int]) -> SufficientStatistics:
    """Posterior moments of the given queries, summed."""
    dim, n_features = model.weights.shape
    total = SufficientStatistics(np.zeros((n_features,) * 2), np.zeros((dim, n_features)), np.zeros((dim,) * 2), 0.0, 0.0, 0, 0)
    means, features = [], []
    shrinkage = np.zeros((dim, dim))
    for query in queries:
        items, scores = inputs.matrix.row(query)
        x = inputs.query_features[query].astype(np.float64)
        prior = model.weights @ x
        features.append(x)
        if not len(items):
            means.append(prior)
            continue
        anchors = inputs.item_features[items].astype(np.float64)  # (m, dim)
        spread = anchors @ model.covariance  # (m, dim)
        gram = spread @ anchors.T + model.noise_variance * np.eye(len(items))
        lower = scipy.linalg.cholesky(gram, lower=True)
        residual = inputs.scale.scale(scores) - anchors @ prior
        whitened = scipy.linalg.solve_triangular(lower, np.column_stack([spread, residual]), lower=True)
        half, z = whitened[:, :-1], whitened[:, -1]
        inverse = scipy.linalg.solve_triangular(lower, np.eye(len(items)), lower=True)
        left = model.noise_variance * (inverse.T @ z)  # y - A m
        variance = model.noise_variance * len(items) - model.noise_variance**2 * float((inverse**2).sum())  # tr(A P Aᵀ)
        means.append(prior + half.T @ z)
        shrinkage += half.T @ half
        total.squared_error += float(left @ left) + variance
        total.log_evidence -= float(np.log(np.diag(lower)).sum() + 0.5 * (z @ z) + 0.5 * len(items) * np.log(2 * np.pi))
        total.n_observed += len(items)
    stacked_m, stacked_x = np.array(means).reshape(-1, dim), np.array(features).reshape(-1, n_features)
    total.n_queries = len(stacked_m)
    total.moment_xx, total.moment_mx = stacked_x.T @ stacked_x, stacked_m.T @ stacked_x
    total.spread = total.n_queries * model.covariance - shrinkage + stacked_m.T @ stacked_m
    return total


def m_step(total: SufficientStatistics, prior_weights: Float64Array, weight_penalty: float) -> BayesModel:
    """The parameters that maximize the expected likelihood; W is a ridge regression shrunk towards `prior_weights`.

    Raises:
        FitError: the noise or the covariance came out unusable.
    """
    n_features = len(total.moment_xx)
    penalty = weight_penalty * np.eye(n_features)
    weights = scipy.linalg.solve(total.moment_xx + penalty, (total.moment_mx + prior_weights @ penalty).T, assume_a="pos").T
    cross = weights @ total.moment_mx.T
    covariance = (total.spread - cross - cross.T + weights @ total.moment_xx @ weights.T) / total.n_queries
    noise_variance = total.squared_error / total.n_observed
    if not (np.isfinite(covariance).all() and np.isfinite(noise_variance) and noise_variance > 0):
        raise FitError(f"the fit gave noise variance {noise_variance}; check the scores for constant or extreme values")
    return BayesModel(weights, (covariance + covariance.T) / 2, noise_variance)


def sum_over_queries(model: BayesModel, inputs: BayesInputs) -> SufficientStatistics:
    """The E-step over all queries, in this process."""
    return e_step(model, inputs, range(inputs.matrix.n_queries))


def fit_bayes(
    inputs: BayesInputs,
    *,
    iterations: int = 6,
    weight_penalty: float = WEIGHT_PENALTY,
    sum_statistics: Callable[[BayesModel, BayesInputs], SufficientStatistics] = sum_over_queries,
) -> BayesModel:
    """EM from `W = identity on the leading block` (both sides start with the DE's embedding), `Sigma = tau² I`.

    `sum_statistics` is the E-step over all queries: here, or spread over many hands.

    Raises:
        InputError: no observations.
        FitError: see `m_step`.
    """
    if not inputs.matrix.n_observed:
        raise InputError("the score matrix is empty; score some pairs first")
    dim, n_features = inputs.item_features.shape[1], inputs.query_features.shape[1]
    prior_weights = np.eye(dim, n_features)
    variance = float(np.var(inputs.scale.scale(inputs.matrix.scores)))
    model = BayesModel(prior_weights, variance * np.eye(dim), 0.1 * variance)
    for iteration in range(1, iterations + 1):
        total = sum_statistics(model, inputs)
        model = m_step(total, prior_weights, weight_penalty)
        evidence = total.log_evidence / total.n_observed
        logger.info("iteration %d: log evidence %.4f per score, noise variance %.6f", iteration, evidence, model.noise_variance)
    return model


def held_out_rmse(model: BayesModel, inputs: BayesInputs, held_out: ScoreMatrix) -> float:
    """Error of the posterior mean, given `inputs`' observations, on other observations of the same queries; scaled units."""
    squared = 0.0
    for query in np.flatnonzero(np.diff(held_out.indptr)).tolist():
        items, scores = inputs.matrix.row(query)
        prior = model.weights @ inputs.query_features[query]
        anchors = inputs.item_features[items].astype(np.float64)
        spread = anchors @ model.covariance
        gram = spread @ anchors.T + model.noise_variance * np.eye(len(items))
        u = prior + spread.T @ scipy.linalg.solve(gram, inputs.scale.scale(scores) - anchors @ prior, assume_a="pos")
        others, expected = held_out.row(query)
        squared += float(((inputs.item_features[others] @ u - inputs.scale.scale(expected)) ** 2).sum())
    return float(np.sqrt(squared / held_out.n_observed))


def whiten(model: BayesModel, item_features: FloatArray) -> tuple[FloatArray, Float64Array]:
    """Coordinates in which the prior covariance is the identity: item embeddings (n_items, dim) and a query map.

    With `Sigma = R Rᵀ`: items `V R`, queries `R⁻¹ W x`; inner products are unchanged and `u ~ N(R⁻¹ W x, I)`, so
    `Ridge` with prior variance 1 and this noise variance is the model's posterior mean. Returned map: (dim, n_features).
    """
    values, vectors = np.linalg.eigh(model.covariance)
    root = np.sqrt(np.maximum(values, values.max() * 1e-10))
    return (item_features @ (vectors * root)).astype(np.float32), (vectors / root).T @ model.weights


def with_constant(embeddings: FloatArray, constant: float) -> FloatArray:
    """Append one constant column: (n, dim) -> (n, dim + 1)."""
    return np.column_stack([embeddings, np.full(len(embeddings), constant)]).astype(np.float32)
