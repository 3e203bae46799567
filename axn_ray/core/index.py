"""The shelf: which items have the largest inner product with a query embedding. Knows no scores and no search.

FAISS where it is installed, an exact torch product otherwise; `top_k` is always exact.
"""

import numpy as np
import numpy.typing as npt
import torch

from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]
BLOCK = 1 << 18


def order_by_score(item_index: Int32Array, scores: FloatArray) -> npt.NDArray[np.int64]:
    """Positions sorted by descending score, ties by ascending item index: (n,), (n,) -> (n,)."""
    return np.lexsort((item_index, -scores))


def top_k(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> tuple[Int32Array, FloatArray]:
    """Exact top-k by inner product: items (m, dim), queries (n, dim) -> indices (n, k), scores (n, k), best first.

    Blocks of items bound the memory. Ties go to the smaller index.

    Raises:
        InputError: shapes that do not fit, or k outside 1..m.
    """
    if item_embeddings.ndim != 2 or query_embeddings.ndim != 2 or item_embeddings.shape[1] != query_embeddings.shape[1]:
        raise InputError(f"items {item_embeddings.shape} and queries {query_embeddings.shape} must both be (n, dim), same dim")
    if not 1 <= k <= len(item_embeddings):
        raise InputError(f"k={k} must lie in 1..{len(item_embeddings)}, the number of items; lower k or add items")
    best_scores = torch.empty((len(query_embeddings), 0))
    best_index = torch.empty((len(query_embeddings), 0), dtype=torch.long)
    queries = torch.from_numpy(np.ascontiguousarray(query_embeddings))
    for start in range(0, len(item_embeddings), BLOCK):
        block = torch.from_numpy(np.ascontiguousarray(item_embeddings[start : start + BLOCK]))
        scores, index = torch.topk(queries @ block.T, min(k, len(block)), dim=1)
        best_scores = torch.cat([best_scores, scores], dim=1)
        best_index = torch.cat([best_index, index + start], dim=1)
        if best_scores.shape[1] > k:
            best_scores, keep = torch.topk(best_scores, k, dim=1)
            best_index = torch.gather(best_index, 1, keep)
    index, scores = best_index.numpy().astype(np.int32), best_scores.numpy()
    order = np.lexsort((index, -scores), axis=1)
    return np.take_along_axis(index, order, axis=1), np.take_along_axis(scores, order, axis=1)
