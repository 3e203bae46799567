"""The closed-form fit: a hierarchical Bayesian linear model of query embeddings over frozen item features, by EM.

    u_q ~ N(W x_q, Sigma)        y_qi = v_i . u_q + noise,  noise ~ N(0, sigma²)

`v_i` are item features (n_items, dim), `x_q` query features (n_queries, n_features), `y` scaled CE scores. Every sum
runs over queries alone, so `e_step` of disjoint queries can be added. Knows no CE, no Ray and no search.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.errors import FitError, InputError

logger = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BayesModel:
    """Parameters: `weights` W (dim, n_features), `covariance` Sigma (dim, dim), `noise_variance` sigma²."""

    weights: Float64Array
    covariance: Float64Array
    noise_variance: float


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


def e_step(
    model: BayesModel,
    item_features: FloatArray,
    query_features: FloatArray,
    matrix: ScoreMatrix,
    scale: ScoreScale,
    queries: Iterable[int],
) -> SufficientStatistics:
    """Posterior moments of the given queries, summed. Features: items (n_items, dim), queries (n_queries, n_features)."""
    dim, n_features = model.weights.shape
    total = SufficientStatistics(np.zeros((n_features,) * 2), np.zeros((dim, n_features)), np.zeros((dim,) * 2), 0.0, 0.0, 0, 0)
    means, features = [], []
    shrinkage = np.zeros((dim, dim))
    for query in queries:
        items, scores = matrix.row(query)
        x = query_features[query].astype(np.float64)
        prior = model.weights @ x
        features.append(x)
        if not len(items):
            means.append(prior)
            continue
        anchors = item_features[items].astype(np.float64)  # (m, dim)
        spread = anchors @ model.covariance  # (m, dim)
        gram = spread @ anchors.T + model.noise_variance * np.eye(len(items))
        lower = scipy.linalg.cholesky(gram, lower=True)
        residual = scale.scale(scores) - anchors @ prior
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


def fit_bayes(
    item_features: FloatArray,
    query_features: FloatArray,
    matrix: ScoreMatrix,
    scale: ScoreScale,
    *,
    iterations: int = 6,
    weight_penalty: float = 10.0,
) -> BayesModel:
    """EM from `W = identity on the leading block` (both sides start with the DE's embedding), `Sigma = tau² I`.

    Raises:
        InputError: no observations, or fewer features than the query embedding has.
        FitError: see `m_step`.
    """
    dim, n_features = item_features.shape[1], query_features.shape[1]
    if not matrix.n_observed:
        raise InputError("the score matrix is empty; score some pairs first")
    prior_weights = np.eye(dim, n_features)
    variance = float(np.var(scale.scale(matrix.scores)))
    model = BayesModel(prior_weights, variance * np.eye(dim), 0.1 * variance)
    for iteration in range(iterations):
        total = e_step(model, item_features, query_features, matrix, scale, range(matrix.n_queries))
        model = m_step(total, prior_weights, weight_penalty)
        logger.info(
            "bayes iteration %d: log evidence %.4f per observation, noise variance %.5f",
            iteration + 1, total.log_evidence / total.n_observed, model.noise_variance,
        )  # fmt: skip
    return model


def whiten(model: BayesModel, item_features: FloatArray) -> tuple[FloatArray, Float64Array]:
    """Coordinates in which the prior covariance is the identity: item embeddings (n_items, dim) and a query map.

    With `Sigma = R Rᵀ`: items `V R`, queries `R⁻¹ W x`; inner products are unchanged and `u ~ N(R⁻¹ W x, I)`, so
    `Ridge` with prior variance 1 and this noise variance is the model's posterior mean. Returned map: (dim, n_features).
    """
    values, vectors = np.linalg.eigh(model.covariance)
    root = np.sqrt(np.maximum(values, values.max() * 1e-10))
    return (item_features @ (vectors * root)).astype(np.float32), (vectors / root).T @ model.weights
