"""Alternating least squares around the dual-encoder's embeddings: the closed form of MF_Trns.

    min  sum over observations (u_q . v_i - y_qi)² + ridge (sum_q n_q |u_q - x_q|² + sum_i n_i |v_i - d_i|²)

`x_q`, `d_i` are the dual-encoder's, `n` counts a row's observations: given one side, each row of the other is a small ridge
regression of its own, and a row without observations stays where it was. Knows no file and no Ray.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import scipy.sparse

from axn_ray.core.epochs import Epoch, FitProgress
from axn_ray.core.fitting import FactorizationConfig, FitInputs, Rows
from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.errors import FitError

BLOCK = 1 << 20  # numbers in a block of systems: what stays in a core's cache


class Table(Protocol):
    """Rows by number, ascending: an array, or one that lies on disk in parts."""

    def __getitem__(self, rows: Rows, /) -> FloatArray:
        """(n,) -> (n, dim)."""
        ...


def solve_rows(matrix: ScoreMatrix, scale: ScoreScale, columns: Table, priors: FloatArray, ridge: float) -> FloatArray:
    """The best rows given `columns`: each is a ridge regression around its row of `priors (n_rows, dim)` -> (n_rows, dim).

    With `n` observations of a row, A (n, dim) their columns and y their scaled scores:

        row = prior + Aᵀ (A Aᵀ + ridge n I)⁻¹ (y - A prior)      where n < dim (the dual form), else
        row = prior + (Aᵀ A + ridge n I)⁻¹ Aᵀ (y - A prior)

    Raises:
        FitError: a row has no finite solution.
    """
    solved, dim = np.array(priors), priors.shape[1]
    counts = np.diff(matrix.indptr)
    for rows in _similar_rows(counts, dim):
        place = np.arange(counts[rows].max())
        there = place < counts[rows, None]  # (rows, width)
        at = np.where(there, matrix.indptr[rows, None] + place, 0)
        unique, inverse = np.unique(matrix.item_index[at].astype(np.int64), return_inverse=True)
        a = np.take(columns[unique], inverse.ravel(), axis=0).reshape(*at.shape, dim)
        a *= there[..., None]  # rows of zeros add nothing to either form
        residual = scale.scale(matrix.scores[at]) - (a @ solved[rows][..., None])[..., 0]
        residual *= there
        solved[rows] += _solve(a, residual, ridge * counts[rows].astype(np.float32))
    return solved


def _solve(a: FloatArray, residual: FloatArray, penalty: FloatArray) -> FloatArray:
    """A (k, n, dim), residual (k, n), penalty (k,) -> (k, dim)."""
    n, dim = a.shape[1:]
    gram = a @ a.mT if n < dim else a.mT @ a
    gram[:, range(len(gram[0])), range(len(gram[0]))] += penalty[:, None]
    try:
        if n < dim:
            step = (np.linalg.solve(gram, residual[..., None]).mT @ a)[:, 0]
        else:
            step = np.linalg.solve(gram, (residual[:, None] @ a).mT)[..., 0]
    except np.linalg.LinAlgError:
        step = np.full((1, dim), np.nan)
    if failed := int((~np.isfinite(step)).any(axis=1).sum()):
        raise FitError(f"{failed} of {len(gram)} rows have no solution; raise ridge or check the scores")
    return step


def _similar_rows(counts: Rows, dim: int) -> Iterator[Rows]:
    """Blocks of rows with about equally many observations, none with none, as many as fit into a block of systems."""
    order = np.argsort(counts, kind="stable")
    order = order[np.searchsorted(counts[order], 1) :]
    start = 0
    while start < len(order):
        low = counts[order[start]]
        stop = int(np.searchsorted(counts[order], low + low // 4, side="right"))
        size = max(1, BLOCK // (int(low + low // 4) * dim))
        yield order[start : min(stop, start + size)]
        start = min(stop, start + size)


def transpose(matrix: ScoreMatrix) -> ScoreMatrix:
    """The same observations with items as rows and queries as columns."""
    turned = _to_scipy(matrix).tocsc()
    return ScoreMatrix(turned.indptr.astype(np.int64), turned.indices.astype(np.int32), turned.data, matrix.n_queries)


def join_columns(parts: Sequence[ScoreMatrix]) -> ScoreMatrix:
    """Matrices with the same rows side by side."""
    joined = scipy.sparse.hstack([_to_scipy(part) for part in parts], format="csr")
    return ScoreMatrix(joined.indptr.astype(np.int64), joined.indices.astype(np.int32), joined.data, joined.shape[1])


def _to_scipy(matrix: ScoreMatrix) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix((matrix.scores, matrix.item_index, matrix.indptr), shape=(matrix.n_queries, matrix.n_items))


def sum_squared_errors(matrix: ScoreMatrix, scale: ScoreScale, u: FloatArray, items: Table) -> float:
    """Sum over the observations of `(u_q . v_i - y)²`; `u (n_queries, dim)`."""
    total, width = 0.0, max(1, BLOCK // u.shape[1])
    query_index = matrix.query_index
    for start in range(0, matrix.n_observed, width):
        block = slice(start, start + width)
        unique, inverse = np.unique(matrix.item_index[block].astype(np.int64), return_inverse=True)
        approx = (u[query_index[block]] * items[unique][inverse]).sum(axis=1)
        total += float(np.square(approx - scale.scale(matrix.scores[block]), dtype=np.float64).sum())
    return total


def fit_als(inputs: FitInputs, scale: ScoreScale, config: FactorizationConfig) -> tuple[FloatArray, list[Epoch]]:
    """Item embeddings (n_items, dim) of the best iteration, and all iterations; one solves the queries, then the items.

    Raises:
        FitError: see `solve_rows` and `FitProgress.add`.
    """
    held_out = inputs.held_out(config)
    known, hidden = inputs.score_matrix.keep(~held_out), inputs.score_matrix.keep(held_out)
    by_item = transpose(known)
    items, best, progress = inputs.item_embeddings, inputs.item_embeddings, FitProgress(config)
    while not progress.is_done:
        progress.start()
        queries = solve_rows(known, scale, items, inputs.query_embeddings, config.ridge)
        items = solve_rows(by_item, scale, queries, inputs.item_embeddings, config.ridge)
        squared = [sum_squared_errors(part, scale, queries, items) for part in (known, hidden)]
        progress.add(squared[0] / known.n_observed, squared[1] / hidden.n_observed)
        if progress.is_at_best:
            best = items
    return best, progress.epochs
