"""The search desk's estimators: from the CE scores of a few items to a query embedding that approximates every score.

Each is the state of one search and solves one small problem in float64: least squares, or TouR's gradient steps. Knows no
CE, no budget and not the items it was not shown.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg import lapack
from scipy.special import softmax

from axn_ray.core.score_matrix import FloatArray, ItemArray, ScoreScale
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

Float64Array = npt.NDArray[np.float64]

# The SVD's cut relative to sigma_max is RESOLUTION * max(A.shape): float32 embeddings say nothing about smaller ones.
RESOLUTION = float(np.finfo(np.float32).eps)
# LAPACK only estimates a condition number; Cholesky is used where the estimate is this far from the SVD's cut.
SAFETY = 10.0


class Estimator(Protocol):
    """Estimates one query's embedding, in the space of the items, from the CE scores of some items."""

    @property
    def query_embedding(self) -> FloatArray | None:
        """(dim,) float32, given all that was observed; before that, where the query stands without scores, or None."""
        ...

    def observe(self, items: Int32Array, scores: FloatArray) -> None:
        """Take in newly scored items (n,) and their raw CE scores (n,).

        Raises:
            InputError: no items, lengths that differ, or a NaN or infinite value among them.
        """
        ...


@dataclass(eq=False)
class Pinv:
    """The paper's estimator (Algorithm 1): `u = pinv(V_A) a`, then `u <- (1 - blend) u + blend u_param`, A all items observed.

    `item_embeddings` V (n_items, dim), `u_param` (dim,): the query embedding to blend in; `blend` is the paper's lambda.
    Without a `scale` (nothing was scored offline) each call fits one to the anchors and their inner products with `u_param`;
    as long as either are all equal, `u_param` stands.

    Raises:
        InputError: a wrong shape, a blend outside 0..1, or a blend or a missing scale without `u_param`.
    """

    item_embeddings: ItemArray
    scale: ScoreScale | None
    blend: float = 0.0
    u_param: FloatArray | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.blend <= 1.0:
            raise InputError(f"blend={self.blend} must lie in 0..1; 0 is the plain pseudo-inverse")
        if self.u_param is not None:
            _check_query_embedding(self.item_embeddings, self.u_param)
        elif self.blend:
            raise InputError(f"blend={self.blend} needs a query embedding to blend in; give u_param or set blend=0")
        elif self.scale is None:
            raise InputError("a scale can only be fitted around a query embedding; give u_param or a scale")
        self._anchors, self._scores = _no_anchors(self.item_embeddings)

    def observe(self, items: Int32Array, scores: FloatArray) -> None:
        """See `Estimator`."""
        anchors = _read_anchors(self.item_embeddings, items, scores)
        self._anchors, self._scores = np.concatenate([self._anchors, anchors]), np.concatenate([self._scores, scores])

    @property
    def query_embedding(self) -> FloatArray | None:
        """See `Estimator`."""
        if not len(self._scores):
            return self.u_param
        scale = self.scale
        if scale is None and self.u_param is not None:
            try:
                scale = ScoreScale.fit(self._scores, (self._anchors @ self.u_param).astype(np.float32))
            except InputError:  # scores, or inner products, that do not differ teach nothing
                return self.u_param
        u = least_squares(self._anchors, _scaled(scale or ScoreScale(), self._scores))  # (dim,)
        if self.u_param is not None:
            u = (1.0 - self.blend) * u + self.blend * self.u_param
        return u.astype(np.float32)


@dataclass(eq=False)
class Ridge:
    """The posterior for `u ~ N(u_param, T)`, `a = V_A u + N(0, sigma²)`: ridge regression around a query embedding.

    `u = u_param + T Aᵀ K⁻¹ (a - A u_param)` and `var(v . u) = vᵀ T v - vᵀ T Aᵀ K⁻¹ A T v` with `A = V_A`,
    `K = A T Aᵀ + sigma² I`, sigma² = `noise_variance` in the dual-encoder's range, and T diagonal: `prior_variance` is one
    number for all directions or (dim,). As sigma² -> 0 with u_param = 0 and one number it becomes `Pinv`; in the coordinates
    of `core.closed_form.embed` it is the `bayes` fit's.

    An `offset` (n_items,) is what is known of each item's scaled score beside its embedding: the scores less the offset are
    what the embeddings explain.

    With `K = L Lᵀ`, `half = L⁻¹ A` (m, dim) is all that is kept: n new items append n rows to it, in O(m n dim).

    Raises:
        InputError: a wrong shape or a variance that is not positive.
    """

    item_embeddings: ItemArray
    scale: ScoreScale
    u_param: FloatArray
    noise_variance: float
    prior_variance: float | FloatArray = 1.0
    offset: FloatArray | None = None

    def __post_init__(self) -> None:
        _check_query_embedding(self.item_embeddings, self.u_param)
        if self.offset is not None and self.offset.shape != self.item_embeddings.shape[:1]:
            raise InputError(f"an offset of shape {self.offset.shape} for {len(self.item_embeddings)} items; give one each")
        self._prior = np.asarray(self.prior_variance, dtype=np.float64)
        if self._prior.shape not in ((), self.u_param.shape):
            raise InputError(f"a prior variance of shape {self._prior.shape} for dim {len(self.u_param)}; give one, or one each")
        if not (self.noise_variance > 0.0 and (self._prior > 0.0).all()):
            both = f"noise_variance={self.noise_variance}, prior_variance={self._prior.min()}"
            raise InputError(f"{both} must both be positive; use Pinv for an exact fit")
        self._mean = self.u_param.astype(np.float64)
        self._half, _ = _no_anchors(self.item_embeddings)

    def observe(self, items: Int32Array, scores: FloatArray) -> None:
        """See `Estimator`."""
        anchors = _read_anchors(self.item_embeddings, items, scores)  # (n, dim)
        weighted = self._prior * anchors
        shared = self._half @ weighted.T  # the new columns of Lᵀ, (m, n)
        gram = anchors @ weighted.T - shared.T @ shared
        gram[np.diag_indices_from(gram)] += self.noise_variance
        lower = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True)
        residual = _scaled(self.scale, scores) - anchors @ self._mean
        if self.offset is not None:
            residual -= self.offset[items]
        left = np.column_stack([anchors - shared.T @ self._half, residual])
        solved = scipy.linalg.solve_triangular(lower, left, lower=True, overwrite_b=True)
        half = solved[:, :-1]
        self._mean += self._prior * (half.T @ solved[:, -1])
        self._half = np.concatenate([self._half, half])

    @property
    def query_embedding(self) -> FloatArray:
        """See `Estimator`: the posterior mean."""
        return self._mean.astype(np.float32)

    def variance(self, items: Int32Array) -> Float64Array:
        """Posterior variance of the scaled scores, without noise, of these items: (n,) -> (n,)."""
        embeddings = self.item_embeddings[items].astype(np.float64)
        weighted = self._prior * embeddings
        explained = np.square(self._half @ weighted.T).sum(axis=0)
        return np.maximum((embeddings * weighted).sum(axis=1) - explained, 0.0)


@dataclass(eq=False)
class Tour:
    """TouR with soft labels (Sung et al., Findings of ACL 2023): a gradient step on the query embedding after each round.

    `u <- u - learning_rate * grad L(u)`, from `u_param` (dim,), where
    `L(u) = cross_entropy(softmax(a / temperature), softmax(V_A u))` over all anchors A observed by then.

    Raises:
        InputError: a wrong shape, or a learning rate or temperature that is not positive.
    """

    item_embeddings: ItemArray
    u_param: FloatArray
    learning_rate: float
    temperature: float

    def __post_init__(self) -> None:
        _check_query_embedding(self.item_embeddings, self.u_param)
        if not (self.learning_rate > 0.0 and self.temperature > 0.0):
            both = f"learning_rate={self.learning_rate}, temperature={self.temperature}"
            raise InputError(f"{both} must both be positive; raise the lower one")
        self._u = self.u_param.astype(np.float64)
        self._anchors, self._scores = _no_anchors(self.item_embeddings)

    def observe(self, items: Int32Array, scores: FloatArray) -> None:
        """See `Estimator`."""
        anchors = _read_anchors(self.item_embeddings, items, scores)
        self._anchors, self._scores = np.concatenate([self._anchors, anchors]), np.concatenate([self._scores, scores])
        gradient = tour_gradient(self._u, self._anchors, self._scores.astype(np.float64), self.temperature)
        self._u -= self.learning_rate * gradient

    @property
    def query_embedding(self) -> FloatArray:
        """See `Estimator`."""
        return self._u.astype(np.float32)


def tour_gradient(u: Float64Array, anchors: Float64Array, scores: Float64Array, temperature: float) -> Float64Array:
    """`Aᵀ (softmax(A u) - softmax(a / temperature))`, TouR's gradient: u (dim,), A (m, dim), a (m,) -> (dim,)."""
    return anchors.T @ (softmax(anchors @ u) - softmax(scores / temperature))


def least_squares(anchors: Float64Array, targets: Float64Array, penalty: float = 0.0) -> Float64Array:
    """`argmin_u |A u - y|² + penalty |u|²`, the shortest u where there are several: A (m, dim), y (m,) -> (dim,).

    The smaller Gram matrix by Cholesky: `Aᵀ (A Aᵀ + penalty I)⁻¹ y = (Aᵀ A + penalty I)⁻¹ Aᵀ y`. Where it is singular
    or close to it (items with the same embedding, m near dim), the SVD of A, as in `np.linalg.pinv`.
    """
    m, dim = anchors.shape
    gram = anchors @ anchors.T if m < dim else anchors.T @ anchors
    gram[np.diag_indices_from(gram)] += penalty
    factor, failed = lapack.dpotrf(gram, lower=1)
    if failed:
        return _least_squares_by_svd(anchors, targets, penalty)
    # In the 1-norm the estimate bounds the 2-norm's from below: cond(A) < 1 / cut follows, nothing would be cut off.
    reciprocal_condition, _ = lapack.dpocon(factor, np.linalg.norm(gram, 1), uplo="L")
    if reciprocal_condition < SAFETY * (RESOLUTION * max(m, dim)) ** 2:
        return _least_squares_by_svd(anchors, targets, penalty)
    if m < dim:
        return anchors.T @ lapack.dpotrs(factor, targets, lower=1)[0]
    return lapack.dpotrs(factor, anchors.T @ targets, lower=1)[0]


def _least_squares_by_svd(anchors: Float64Array, targets: Float64Array, penalty: float) -> Float64Array:
    """The same u by LAPACK's gelsd; a penalty becomes dim more rows, `sqrt(penalty) u = 0`."""
    dim = anchors.shape[1]
    if penalty:
        anchors = np.vstack([anchors, np.sqrt(penalty) * np.eye(dim)])
        targets = np.concatenate([targets, np.zeros(dim)])
    return scipy.linalg.lstsq(anchors, targets, cond=RESOLUTION * max(anchors.shape), lapack_driver="gelsd")[0]


def _no_anchors(item_embeddings: ItemArray) -> tuple[Float64Array, FloatArray]:
    """Room for embeddings (0, dim) and raw scores (0,)."""
    return np.empty((0, item_embeddings.shape[1])), np.empty(0, dtype=np.float32)


def _read_anchors(item_embeddings: ItemArray, items: Int32Array, scores: FloatArray) -> Float64Array:
    """Embeddings (n, dim) of newly scored items, in float64.

    Raises:
        InputError: see `Estimator.observe`.
    """
    if not len(items) == len(scores) or not len(scores):
        raise InputError(f"{len(items)} anchor items with {len(scores)} scores; give one score per item, at least one")
    anchors = item_embeddings[items].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(anchors).all(axis=1) | ~np.isfinite(scores))
    if len(bad):
        raise InputError(f"item {items[bad[0]]} has a score or an embedding that is NaN or infinite; score or embed it again")
    return anchors


def _scaled(scale: ScoreScale, scores: FloatArray) -> Float64Array:
    return scale.scale(scores).astype(np.float64)


def _check_query_embedding(item_embeddings: ItemArray, u_param: FloatArray) -> None:
    if item_embeddings.ndim != 2 or u_param.shape != item_embeddings.shape[1:]:
        raise InputError(f"items {item_embeddings.shape} and u_param {u_param.shape} must be (n, dim) and (dim,), same dim")
    if not np.isfinite(u_param).all():
        raise InputError("u_param is NaN or infinite; embed the query again")
