"""The closed-form fit: a hierarchical Bayesian linear model of query embeddings over frozen item features, by EM.

    u_q ~ N(W x_q, Sigma)        y_qi = v_i . u_q + noise,  noise ~ N(0, sigma²)

`v_i` are item features (n_items, dim), `x_q` query features (n_queries, n_features), `y` scaled CE scores. Every sum
runs over queries alone, so the `e_step`s of disjoint queries can be added. Knows no CE, no Ray and no search.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.linalg.blas
import scipy.linalg.lapack

from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.errors import FitError

logger = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

WEIGHT_PENALTY = 10.0
RANK_CUT = 1e-10  # of the largest eigenvalue
BATCH_NUMBERS = 1 << 20  # of one padded batch of anchors
NOT_POSITIVE = "the covariance of a query's scores is not positive definite"
CURE = "check scores and views for NaN, constant or extreme values, or take fewer epochs"
MIN_GAIN = 1e-3  # of log evidence per score, for another iteration


@dataclass(frozen=True)
class BayesModel:
    """After `iterations` of EM: `weights` W (dim, n_features), `covariance` Sigma (dim, dim), `noise_variance` sigma²."""

    weights: Float64Array
    covariance: Float64Array
    noise_variance: float
    iterations: int = 0


@dataclass(frozen=True)
class BayesInputs:
    """`item_features (n_items, dim)`, `query_features (n_queries, n_features)`, observed scores and their scale."""

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


SumStatistics = Callable[[BayesModel], SufficientStatistics]


def e_step(model: BayesModel, inputs: BayesInputs) -> SufficientStatistics:
    """Posterior moments of all queries of `inputs`, summed. The large products are in the item features' own precision.

    Queries go in batches of about equally many observations, most first, the shorter padded with items of features 0. With
    `R Rᵀ = Sigma` all is computed for `R⁻¹ u_q`, whose prior covariance is the identity.
    """
    matrix, (dim, n_features) = inputs.matrix, model.weights.shape
    counts = np.diff(matrix.indptr)
    order = np.argsort(-counts, kind="stable")
    total = SufficientStatistics(np.zeros((n_features,) * 2), np.zeros((dim, n_features)), np.zeros((dim,) * 2), 0.0, 0.0, 0, 0)
    root, inverse_root = _roots(model.covariance)
    dtype = inputs.item_features.dtype
    anchors = np.concatenate([inputs.item_features @ root.astype(dtype), np.zeros((1, dim), dtype)])  # the last one pads
    x = inputs.query_features[order].astype(np.float64)
    means = x @ (inverse_root @ model.weights).T
    shrinkage = np.zeros((dim, dim))
    start = 0
    while start < len(order):
        batch = slice(start, start + max(1, BATCH_NUMBERS // (dim * max(1, int(counts[order[start]])))))
        rows, scores = _pad(inputs, order[batch])
        posterior = _posterior_by_item if rows.shape[1] > dim else _posterior
        correction, shrunk = posterior(anchors[rows], means[batch], scores, model.noise_variance, total)
        total.log_evidence += 0.5 * int((rows == matrix.n_items).sum()) * np.log(2 * np.pi * model.noise_variance)
        means[batch] += correction
        shrinkage += shrunk
        start = batch.stop
    means = means @ root.T
    total.n_queries, total.n_observed = len(order), matrix.n_observed
    total.moment_xx, total.moment_mx = x.T @ x, means.T @ x
    total.spread = total.n_queries * model.covariance - root @ shrinkage @ root.T + means.T @ means
    return total


def _pad(inputs: BayesInputs, queries: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Float64Array]:
    """Observed items (n, most), `n_items` where a query has fewer, and their scaled scores (n, most)."""
    observed = [inputs.matrix.row(query) for query in queries]
    most = max(1, *(len(found) for found, _ in observed))
    rows = np.full((len(queries), most), inputs.matrix.n_items, dtype=np.int64)
    scores = np.zeros((len(queries), most))
    for at, (found, raw) in enumerate(observed):
        rows[at, : len(found)] = found
        scores[at, : len(found)] = inputs.scale.scale(raw)
    return rows, scores


def _posterior(
    anchors: npt.NDArray[np.floating],
    prior: Float64Array,
    scores: Float64Array,
    noise_variance: float,
    total: SufficientStatistics,
) -> tuple[Float64Array, Float64Array]:
    """Posterior means less prior means (n, dim) of n queries at once, and the sum of `Aᵀ K⁻¹ A` (dim, dim).

    Anchors A (n, m, dim) of prior covariance 1, prior means (n, dim), scores (n, m) of covariance K = A Aᵀ + noise. Adds to two
    sums of `total`. In NumPy: on a CPU its products and Cholesky factors of many small matrices are faster than torch's.

    Raises:
        FitError: the scores' covariance K is not positive definite.
    """
    n, m, dim = anchors.shape
    lower, inverse = _factor((anchors @ anchors.mT).astype(np.float64), noise_variance)
    residual = scores - (anchors @ prior.astype(anchors.dtype)[:, :, None])[:, :, 0]
    z = (inverse @ residual[:, :, None])[:, :, 0]
    half = inverse.astype(anchors.dtype) @ anchors
    left = noise_variance * (inverse.mT @ z[:, :, None])[:, :, 0]  # y - A m
    variance = noise_variance * n * m - noise_variance**2 * float(np.vdot(inverse, inverse))  # tr(A P Aᵀ)
    total.squared_error += float(np.vdot(left, left)) + variance
    determinant = float(np.log(np.diagonal(lower, axis1=1, axis2=2)).sum())
    total.log_evidence -= determinant + 0.5 * float(np.vdot(z, z)) + 0.5 * n * m * np.log(2 * np.pi)
    correction = (z.astype(anchors.dtype)[:, None, :] @ half)[:, 0]
    return correction.astype(np.float64), _gram(half.reshape(n * m, dim))


def _posterior_by_item(
    anchors: npt.NDArray[np.floating],
    prior: Float64Array,
    scores: Float64Array,
    noise_variance: float,
    total: SufficientStatistics,
) -> tuple[Float64Array, Float64Array]:
    """The same from S = Aᵀ A + noise (dim, dim), which is smaller than K where a query has more scores than there are numbers."""
    n, m, dim = anchors.shape
    lower, inverse = _factor((anchors.mT @ anchors).astype(np.float64), noise_variance)
    residual = scores - (anchors @ prior.astype(anchors.dtype)[:, :, None])[:, :, 0]
    projected = (anchors.mT @ residual.astype(anchors.dtype)[:, :, None]).astype(np.float64)
    correction: Float64Array = (inverse.mT @ (inverse @ projected))[:, :, 0]
    left = residual - (anchors @ correction.astype(anchors.dtype)[:, :, None])[:, :, 0]
    variance = noise_variance * n * dim - noise_variance**2 * float(np.vdot(inverse, inverse))
    total.squared_error += float(np.vdot(left, left)) + variance
    determinant = float(np.log(np.diagonal(lower, axis1=1, axis2=2)).sum()) + 0.5 * n * (m - dim) * np.log(noise_variance)
    fit = float(np.vdot(left, left)) / noise_variance + float(np.vdot(correction, correction))  # residualᵀ K⁻¹ residual
    total.log_evidence -= determinant + 0.5 * fit + 0.5 * n * m * np.log(2 * np.pi)
    return correction, n * np.eye(dim) - noise_variance * _gram(inverse.reshape(n * dim, dim))


def _factor(products: Float64Array, noise_variance: float) -> tuple[Float64Array, Float64Array]:
    """Cholesky factors of `products` (n, m, m) with the noise on their diagonals, and the factors' inverses."""
    try:
        lower = np.linalg.cholesky(products + noise_variance * np.eye(products.shape[-1]))
    except np.linalg.LinAlgError as error:
        raise FitError(f"{NOT_POSITIVE}, at noise variance {noise_variance:.3g}; {CURE}") from error
    inverse: Float64Array = np.stack([scipy.linalg.lapack.dtrtri(each.T)[0].T for each in lower])
    return lower.astype(np.float64, copy=False), inverse


def _gram(rows: npt.NDArray[np.floating]) -> Float64Array:
    """`XᵀX` of rows X (n, dim) at half the cost: BLAS computes one triangle."""
    syrk = scipy.linalg.blas.ssyrk if rows.dtype == np.float32 else scipy.linalg.blas.dsyrk
    upper = np.triu(syrk(1.0, rows.T)).astype(np.float64)
    return upper + np.triu(upper, 1).T


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
        raise FitError(f"the fit gave noise variance {noise_variance}; {CURE}")
    return BayesModel(weights, (covariance + covariance.T) / 2, noise_variance)


def iterate_em(
    sum_statistics: SumStatistics,
    start: BayesModel,
    prior_weights: Float64Array,
    *,
    iterations: int = 6,
    weight_penalty: float = WEIGHT_PENALTY,
) -> Iterator[BayesModel]:
    """The model after each iteration of EM from `start`; ends early when the evidence hardly grows.

    W is shrunk towards `prior_weights` (dim, n_features). `sum_statistics` is the E-step over all queries: in one process, or
    spread over many hands.

    Raises:
        FitError: the evidence is NaN or infinite, or see `m_step`.
    """
    model, evidence = start, list[float]()
    for iteration in range(1, iterations + 1):
        total = sum_statistics(model)
        evidence.append(total.log_evidence / total.n_observed)
        if not np.isfinite(evidence[-1]):
            raise FitError(f"the log evidence is {evidence[-1]} in iteration {iteration}; {CURE}")
        model = replace(m_step(total, prior_weights, weight_penalty), iterations=model.iterations + 1)
        said = model.iterations, total.n_queries, evidence[-1], model.noise_variance
        logger.info("iteration %d over %d queries: log evidence %.4f per score, noise variance %.6f", *said)
        yield model
        if iteration > 1 and evidence[-1] - evidence[-2] < MIN_GAIN:
            return


def start_model(prior_weights: Float64Array, variance: float) -> BayesModel:
    """Where EM may begin: W = `prior_weights` (dim, n_features), everything else from the scores' `variance`."""
    return BayesModel(prior_weights, variance * np.eye(len(prior_weights)), 0.1 * variance)


def whiten(model: BayesModel) -> tuple[Float64Array, Float64Array]:
    """Maps to coordinates in which the prior covariance is the identity: of items (dim, dim), of queries (dim, n_features).

    With `Sigma = R Rᵀ`: items `V R`, queries `R⁻¹ W x`; inner products are unchanged and `u ~ N(R⁻¹ W x, I)`, so `Ridge`
    with prior variance 1 and this noise variance is the model's posterior mean.
    """
    root, inverse_root = _roots(model.covariance)
    return root, inverse_root @ model.weights


def _roots(covariance: Float64Array) -> tuple[Float64Array, Float64Array]:
    """R with `R Rᵀ = Sigma`, whose smallest directions are raised to `RANK_CUT`, and its inverse."""
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.maximum(values, values.max() * RANK_CUT))
    return vectors * root, (vectors / root).T


def with_constant(embeddings: FloatArray, constant: float) -> FloatArray:
    """Append one constant column: (n, dim) -> (n, dim + 1) float32."""
    return np.column_stack([embeddings, np.full(len(embeddings), constant, dtype=np.float32)]).astype(np.float32, copy=False)
