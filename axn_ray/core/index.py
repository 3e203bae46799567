"""The shelf: which items have the largest inner product with a query embedding. Knows no scores and no search.

`nearest_items` goes through FAISS where it is installed; `top_k` is its exact twin without it.
"""

import importlib.util

import numpy as np
import numpy.typing as npt

from axn_ray.core.ranking import top_items
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]
BLOCK_SCORES = 1 << 26  # 256 MB of float32


def nearest_items(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> tuple[Int32Array, FloatArray]:
    """Top-k by inner product, exhaustively: items (m, dim), queries (n, dim) -> indices (n, k), scores (n, k), best first.

    FAISS (extra `cpu` or `gpu`) where it is installed, `top_k` where it is not. They differ in ties and rounding alone.

    Raises:
        InputError: see `top_k`.
    """
    if importlib.util.find_spec("faiss") is None:
        return top_k(item_embeddings, query_embeddings, k)
    import faiss

    _check_shapes(item_embeddings, query_embeddings, k)
    items, queries = (np.ascontiguousarray(array, dtype=np.float32) for array in (item_embeddings, query_embeddings))
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        scores, index = faiss.knn_gpu(faiss.StandardGpuResources(), queries, items, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        scores, index = faiss.knn(queries, items, k, metric=faiss.METRIC_INNER_PRODUCT)
    return index.astype(np.int32), scores


def top_k(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> tuple[Int32Array, FloatArray]:
    """Exact top-k by inner product: items (m, dim), queries (n, dim) -> indices (n, k), scores (n, k), best first.

    Ties go to the smaller index. Memory beyond the result: `BLOCK_SCORES` scores, or one query's row if that is more.

    Raises:
        InputError: shapes that do not fit, or k outside 1..m.
    """
    _check_shapes(item_embeddings, query_embeddings, k)
    index = np.empty((len(query_embeddings), k), dtype=np.int32)
    best = np.empty((len(query_embeddings), k), dtype=np.float32)
    block = max(1, BLOCK_SCORES // len(item_embeddings))
    for start in range(0, len(query_embeddings), block):
        scores = query_embeddings[start : start + block] @ item_embeddings.T
        for row, row_scores in enumerate(scores, start):
            index[row] = top_items(row_scores, k)
            best[row] = row_scores[index[row]]
    return index, best


def _check_shapes(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> None:
    if item_embeddings.ndim != 2 or query_embeddings.ndim != 2 or item_embeddings.shape[1] != query_embeddings.shape[1]:
        raise InputError(f"items {item_embeddings.shape} and queries {query_embeddings.shape} must both be (n, dim), same dim")
    if not 1 <= k <= len(item_embeddings):
        raise InputError(f"k={k} must lie in 1..{len(item_embeddings)}, the number of items; lower k or add items")
