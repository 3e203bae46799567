"""The search desk's estimators: from the CE scores of a few items to an approximate score of every item.

Each solves one small problem in float64: least squares, or TouR's gradient steps. Knows no CE and no budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg import lapack
from scipy.special import softmax

from axn_ray.core.score_matrix import FloatArray, ScoreScale
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

Float64Array = npt.NDArray[np.float64]

# The SVD's cut relative to sigma_max is RESOLUTION * max(A.shape): float32 embeddings say nothing about smaller ones.
RESOLUTION = float(np.finfo(np.float32).eps)
# LAPACK only estimates a condition number; Cholesky is used where the estimate is this far from the SVD's cut.
SAFETY = 10.0


class Estimator(Protocol):
    """Approximates the scores of all items from the CE scores of some."""

    def approx_scores(self, anchor_items: Int32Array, scores: FloatArray) -> FloatArray:
        """Anchor items (m,) and their raw CE scores (m,) -> (n_items,) float32 in the dual-encoder's range."""
        ...


@dataclass(frozen=True)
class Pinv:
    """The paper's estimator (Algorithm 1): `u = pinv(V_A) a`, then `u <- (1 - blend) u + blend u_param`, scores `V u`.

    `item_embeddings` V (n_items, dim), `u_param` (dim,): the query embedding to blend in; `blend` is the paper's lambda.
    Without a `scale` (nothing was scored offline) each call fits one to the anchors and their inner products with `u_param`.

    Raises:
        InputError: a wrong shape, a blend outside 0..1, or a blend or a missing scale without `u_param`.
    """

    item_embeddings: FloatArray
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

    def approx_scores(self, anchor_items: Int32Array, scores: FloatArray) -> FloatArray:
        """See `Estimator`.

        Raises:
            InputError: see `_read_anchors`.
        """
        scale = self.scale
        if scale is None and self.u_param is not None:
            scale = ScoreScale.fit(scores, self.item_embeddings[anchor_items] @ self.u_param)
        anchors, targets = _read_anchors(self.item_embeddings, scale or ScoreScale(), anchor_items, scores)
        u = least_squares(anchors, targets)  # (dim,)
        if self.u_param is not None:
            u = (1.0 - self.blend) * u + self.blend * self.u_param
        return self.item_embeddings @ u.astype(np.float32)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression around a query embedding: the posterior mean for `u ~ N(u_param, tau² I)`, `a = V_A u + N(0, sigma²)`.

    `u = u_param + tau² Aᵀ (tau² A Aᵀ + sigma² I)⁻¹ (a - A u_param)` with `A = V_A`, tau² = `prior_variance` and
    sigma² = `noise_variance`, in the dual-encoder's range. As sigma² -> 0 with u_param = 0 it becomes `Pinv`.

    Raises:
        InputError: a wrong shape or a variance that is not positive.
    """

    item_embeddings: FloatArray
    scale: ScoreScale
    u_param: FloatArray
    noise_variance: float
    prior_variance: float = 1.0

    def __post_init__(self) -> None:
        _check_query_embedding(self.item_embeddings, self.u_param)
        if not (self.noise_variance > 0.0 and self.prior_variance > 0.0):
            both = f"noise_variance={self.noise_variance}, prior_variance={self.prior_variance}"
            raise InputError(f"{both} must both be positive; use Pinv for an exact fit")

    def approx_scores(self, anchor_items: Int32Array, scores: FloatArray) -> FloatArray:
        """See `Estimator`.

        Raises:
            InputError: see `_read_anchors`.
        """
        anchors, targets = _read_anchors(self.item_embeddings, self.scale, anchor_items, scores)
        u_param = self.u_param.astype(np.float64)
        correction = least_squares(anchors, targets - anchors @ u_param, self.noise_variance / self.prior_variance)
        return self.item_embeddings @ (u_param + correction).astype(np.float32)


@dataclass(frozen=True)
class Tour:
    """TouR with soft labels (Sung et al., Findings of ACL 2023): gradient steps on the query embedding, one a round.

    `u <- u - learning_rate * grad L(u)`, from `u_param` (dim,), where
    `L(u) = cross_entropy(softmax(a / temperature), softmax(V_A u))` over all anchors A scored by the end of that round.
    `shares` are the numbers of anchors of the rounds in their order: each call takes the steps from the first on anew.

    Raises:
        InputError: a wrong shape, no shares, or a learning rate or temperature that is not positive.
    """

    item_embeddings: FloatArray
    u_param: FloatArray
    shares: Sequence[int]
    learning_rate: float
    temperature: float

    def __post_init__(self) -> None:
        _check_query_embedding(self.item_embeddings, self.u_param)
        if not (self.learning_rate > 0.0 and self.temperature > 0.0):
            both = f"learning_rate={self.learning_rate}, temperature={self.temperature}"
            raise InputError(f"{both} must both be positive; raise the lower one")
        if not len(self.shares):
            raise InputError("TouR takes a step for each round; give the rounds' shares of the budget")

    def approx_scores(self, anchor_items: Int32Array, scores: FloatArray) -> FloatArray:
        """See `Estimator`.

        Raises:
            InputError: see `_read_anchors`.
        """
        anchors, targets = _read_anchors(self.item_embeddings, ScoreScale(), anchor_items, scores)
        u = self.u_param.astype(np.float64)
        for end in np.cumsum(self.shares):
            if end <= len(anchors):
                u -= self.learning_rate * tour_gradient(u, anchors[:end], targets[:end], self.temperature)
        return self.item_embeddings @ u.astype(np.float32)


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


def _read_anchors(
    item_embeddings: FloatArray, scale: ScoreScale, anchor_items: Int32Array, scores: FloatArray
) -> tuple[Float64Array, Float64Array]:
    """Embeddings (m, dim) and scaled scores (m,) of the anchors, in float64.

    Raises:
        InputError: no anchors, lengths that differ, or a NaN or infinite value among them.
    """
    if not len(anchor_items) == len(scores) or not len(scores):
        raise InputError(f"{len(anchor_items)} anchor items with {len(scores)} scores; give one score per item, at least one")
    anchors = item_embeddings[anchor_items].astype(np.float64)
    targets = scale.scale(scores).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(anchors).all(axis=1) | ~np.isfinite(targets))
    if len(bad):
        item = anchor_items[bad[0]]
        raise InputError(f"item {item} has a score or an embedding that is NaN or infinite; score or embed it again")
    return anchors, targets


def _check_query_embedding(item_embeddings: FloatArray, u_param: FloatArray) -> None:
    if item_embeddings.ndim != 2 or u_param.shape != item_embeddings.shape[1:]:
        raise InputError(f"items {item_embeddings.shape} and u_param {u_param.shape} must be (n, dim) and (dim,), same dim")
    if not np.isfinite(u_param).all():
        raise InputError("u_param is NaN or infinite; embed the query again")
