"""The ledger: the observed CE scores as a sparse matrix, queries x items (the paper's G). An unscored pair is absent.

Knows no model and no file format.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]
ItemArray = npt.NDArray[np.floating | np.int8]  # item embeddings: float32, or fewer bits a number


@dataclass(frozen=True)
class ScoreMatrix:
    """CSR of raw CE logits: `indptr int64 (n_queries + 1,)`, `item_index int32 (nnz,)`, `scores float32 (nnz,)`."""

    indptr: npt.NDArray[np.int64]
    item_index: Int32Array
    scores: FloatArray
    n_items: int

    @property
    def n_queries(self) -> int:
        """Rows, those without observations included."""
        return len(self.indptr) - 1

    @property
    def n_observed(self) -> int:
        """Scored pairs."""
        return len(self.scores)

    @property
    def query_index(self) -> Int32Array:
        """The row of each observation, (nnz,)."""
        return np.repeat(np.arange(self.n_queries, dtype=np.int32), np.diff(self.indptr))

    def row(self, query: int) -> tuple[Int32Array, FloatArray]:
        """Observed items and their scores of one query, items ascending."""
        span = slice(self.indptr[query], self.indptr[query + 1])
        return self.item_index[span], self.scores[span]

    def keep(self, chosen: npt.NDArray[np.bool_]) -> "ScoreMatrix":
        """The same rows and items with only the chosen observations, (n_observed,)."""
        kept = np.concatenate([[0], np.cumsum(chosen)])[self.indptr].astype(np.int64)
        return ScoreMatrix(kept, self.item_index[chosen], self.scores[chosen], self.n_items)

    def rows(self, rows: range) -> "ScoreMatrix":
        """Only these rows, a range without gaps, with all columns."""
        first, last = int(self.indptr[rows.start]), int(self.indptr[rows.stop])
        indptr = self.indptr[rows.start : rows.stop + 1] - first
        return ScoreMatrix(indptr, self.item_index[first:last], self.scores[first:last], self.n_items)

    def take(self, rows: npt.NDArray[np.int64]) -> "ScoreMatrix":
        """These rows (n,) in this order, with all columns."""
        indptr = np.concatenate([[0], np.cumsum(np.diff(self.indptr)[rows])]).astype(np.int64)
        taken = np.repeat(self.indptr[rows] - indptr[:-1], np.diff(indptr)) + np.arange(indptr[-1])
        return ScoreMatrix(indptr, self.item_index[taken], self.scores[taken], self.n_items)

    @classmethod
    def from_triples(
        cls, query_index: Int32Array, item_index: Int32Array, scores: FloatArray, n_queries: int, n_items: int
    ) -> "ScoreMatrix":
        """Build from triples (nnz,) each, in any order.

        Raises:
            InputError: lengths that differ, an index out of range, a pair that comes twice, a NaN or infinite score.
        """
        if not len(query_index) == len(item_index) == len(scores):
            raise InputError(f"triples of lengths {len(query_index)}, {len(item_index)}, {len(scores)}; they must be equal")
        _check_range("query_index", query_index, n_queries)
        _check_range("item_index", item_index, n_items)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            pair = f"query index {query_index[bad[0]]}, item index {item_index[bad[0]]}"
            raise InputError(f"{len(bad)} scores are NaN or infinite (first: {pair}); score those pairs again")
        order = np.lexsort((item_index, query_index))
        query_index, item_index, scores = query_index[order], item_index[order], scores[order]
        twice = np.flatnonzero((np.diff(query_index) == 0) & (np.diff(item_index) == 0))
        if len(twice):
            pair = f"query index {query_index[twice[0]]}, item index {item_index[twice[0]]}"
            raise InputError(f"{len(twice)} pairs come twice (first: {pair}); keep one score per pair")
        indptr = np.searchsorted(query_index, np.arange(n_queries + 1)).astype(np.int64)
        return cls(indptr, item_index.astype(np.int32), scores.astype(np.float32), n_items)


def _check_range(name: str, index: Int32Array, n: int) -> None:
    if len(index) and (index.min() < 0 or index.max() >= n):
        wrong = index.min() if index.min() < 0 else index.max()
        raise InputError(f"{name} {wrong} lies outside 0..{n - 1}; the scores belong to another corpus")


@dataclass(frozen=True)
class ScoreScale:
    """The affine map from raw CE scores to the dual-encoder's range: `scaled = beta * (score - alpha)`, beta > 0."""

    alpha: float = 0.0
    beta: float = 1.0

    def scale(self, scores: FloatArray) -> FloatArray:
        """Raw CE scores (n,) -> (n,) float32 in the dual-encoder's range."""
        return (self.beta * (scores - self.alpha)).astype(np.float32)

    @classmethod
    def fit(cls, scores: FloatArray, approx_scores: FloatArray) -> "ScoreScale":
        """Match mean and standard deviation of CE scores and DE inner products of the same pairs, (n,), (n,).

        Raises:
            InputError: fewer than two pairs, or CE scores that are all equal.
        """
        return cls.from_moments(sum_moments(scores, approx_scores))

    @classmethod
    def from_moments(cls, moments: npt.NDArray[np.float64]) -> "ScoreScale":
        """The same from `sum_moments`, which may be added over disjoint pairs.

        Raises:
            InputError: see `fit`.
        """
        n = int(moments[0])
        mean, square, approx_mean, approx_square = moments[1:] / max(n, 1)
        variance = square - mean**2
        if n < 2 or variance <= 1e-12 * square:
            raise InputError(f"{n} CE scores without spread cannot be rescaled; score more pairs or check the CE")
        beta = float(np.sqrt(max(approx_square - approx_mean**2, 0.0) / variance))
        if beta == 0.0:
            raise InputError(f"the dual-encoder gives all {n} pairs the same inner product; check its embeddings")
        return cls(alpha=float(mean - approx_mean / beta), beta=beta)


def sum_moments(scores: FloatArray, approx_scores: FloatArray) -> npt.NDArray[np.float64]:
    """(5,): how many pairs, the sums of their CE scores and of their squares, and both of the DE's inner products."""
    s, a = scores.astype(np.float64), approx_scores.astype(np.float64)
    return np.array([len(s), s.sum(), s @ s, a.sum(), a @ a])
