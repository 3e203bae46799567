"""The shelf: which items have the largest inner product with a query embedding. Knows no CE scores and no search.

`ItemIndex` is exact and answers the requests of many searches by one product; `nearest_items` is FAISS's on a GPU.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from axn_ray.core.ranking import order_by_score
from axn_ray.core.score_matrix import FloatArray, ItemArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError, ModelError

BLOCK_SCORES = 1 << 24  # 64 MB of float32
BLOCK_QUERIES = 64
CHUNK = 64
HELD = 1 << 28  # bytes of float32 up to which smaller numbers are converted once; more stay as they are, in a file perhaps
GPU_MOST = 2048  # items that FAISS finds on a GPU
PIECE = 2048  # items that are multiplied at once where they are no float32, so that what is in between stays in the cache
SUMS = 1 << 17  # of whole numbers at once, over all queries, where they have room for more than a piece
PROBED = 32  # times three items, with which exactness is tried
DIGITS, BASE, LARGEST_BITS = 3, 254, 6  # of a query's numbers, all in -127..127; the first's bits


@dataclass(frozen=True, eq=False)
class Retrieve:
    """A request: the `n` items of highest inner product with `query_embedding` float32 (dim,), without `excluded` int32 (m,).

    An `offset` float32 (n_items,) is added to the inner products.

    Raises:
        ModelError: the query embedding is NaN or infinite.
    """

    query_embedding: FloatArray
    n: int
    excluded: Int32Array
    offset: FloatArray | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.query_embedding).all():
            raise ModelError("a query embedding is NaN or infinite; check the dual-encoder and the factorization")


class Retrieved(NamedTuple):
    """The reply: `item_index` int32 (n,) and `approx_score` float32 (n,), best first, ties by item index."""

    item_index: Int32Array
    approx_score: FloatArray


class ItemIndex:
    """Exact search over item embeddings (n_items, dim), float32, float16 or int8, which may be memory-mapped.

    Raises:
        InputError: embeddings that are not a matrix of such numbers.
    """

    def __init__(self, item_embeddings: ItemArray) -> None:
        if item_embeddings.ndim != 2 or item_embeddings.dtype not in (np.float32, np.float16, np.int8):
            described = f"{item_embeddings.dtype} of shape {item_embeddings.shape}"
            raise InputError(f"item embeddings are {described}; give float32, float16 or int8 (n_items, dim)")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
            items = torch.from_numpy(np.ascontiguousarray(item_embeddings))
        self._multiply = _by_digits if items.dtype == torch.int8 and _has_exact_int8(items.shape[1]) else _by_converting
        self._items = items.float() if self._multiply is _by_converting and items.numel() * 4 <= HELD else items

    def retrieve(self, requests: Sequence[Retrieve]) -> list[Retrieved]:
        """Answer many requests by one product over the items. Memory: twice `BLOCK_SCORES` scores, or two for each request.

        Raises:
            InputError: a query embedding of another dim, an offset of other items, n outside 1..the items not excluded.
            ModelError: an inner product is NaN.
        """
        for request in requests:
            self._check(request)
        queries = torch.from_numpy(np.stack([request.query_embedding for request in requests]).astype(np.float32))
        size = max(1, BLOCK_SCORES // len(requests))
        parts: list[list[Retrieved]] = [[] for _ in requests]
        for start in range(0, len(self._items), size):
            products = self._products(queries, start, start + size)
            for request, row in zip(requests, products, strict=True):
                if request.offset is not None:
                    row += torch.from_numpy(request.offset[start : start + size])
                inside = (request.excluded >= start) & (request.excluded < start + size)
                row[torch.from_numpy(request.excluded[inside] - start)] = -torch.inf
            whole = products.shape[1] // CHUNK * CHUNK
            maxima = products[:, :whole].unflatten(1, (-1, CHUNK)).amax(2) if whole else products[:, :0]
            if maxima.isnan().any() or products[:, whole:].isnan().any():
                raise ModelError("an inner product is NaN; check the item embeddings for infinite values")
            for request, scores, highs, part in zip(requests, products.numpy(), maxima.numpy(), parts, strict=True):
                best = _highest(scores, highs, request.n)
                part.append(Retrieved((best + start).astype(np.int32), scores[best]))
        return [_merge(part, request.n) for part, request in zip(parts, requests, strict=True)]

    def _products(self, queries: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Inner products (b, stop - start), in float32."""
        items = self._items[start:stop]
        if items.dtype == torch.float32:
            # BLAS is slower for a single query (also for one that `expand` makes two), and for the few rows of queries @ itemsᵀ.
            several = queries if len(queries) > 1 else queries.repeat(2, 1)
            return (items @ several.T).T[: len(queries)].contiguous()
        return self._multiply(queries, items)

    def _check(self, request: Retrieve) -> None:
        if request.query_embedding.shape != tuple(self._items.shape[1:]):
            shapes = f"items {tuple(self._items.shape)} and query {request.query_embedding.shape}"
            raise InputError(f"{shapes} must be (n, dim) and (dim,), same dim; embed both with one model")
        if request.offset is not None and request.offset.shape != (len(self._items),):
            raise InputError(f"an offset of shape {request.offset.shape} for {len(self._items)} items; give one number an item")
        n_left = len(self._items) - len(request.excluded)
        if not 1 <= request.n <= n_left:
            raise InputError(f"n={request.n} must lie in 1..{n_left}, the items to choose from; lower n or add items")


@cache
def _has_exact_int8(dim: int) -> bool:
    """Whether this CPU multiplies int8 fast, and without error: without VNNI it saturates, and torch errs where dim is 1."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    extremes = torch.tensor([127, -127, -128], dtype=torch.int8)
    left, right = extremes[:, None].repeat(1, dim), extremes.repeat(PROBED)[:, None].repeat(1, dim)
    return torch.equal(torch._int_mm(left, right.T).long(), left.long() @ right.long().T)


def _by_converting(queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Inner products (b, m) of float32 queries (b, dim) with items (m, dim) of smaller numbers."""
    products = torch.empty(len(queries), len(items))
    room = torch.empty(PIECE, items.shape[1])
    for first in range(0, len(items), PIECE):
        piece = items[first : first + PIECE]
        products[:, first : first + PIECE] = queries @ room[: len(piece)].copy_(piece).T
    return products


def _by_digits(queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """The same with int8 items as they are: each number of a query is a sum of digits, int8 too, over powers of `BASE`.

    So the sums are of whole numbers, without error; a query's numbers are rounded to 2.5e-7 of its largest, or less.
    """
    exponent = torch.frexp(queries.abs().amax(1, keepdim=True)).exponent - LARGEST_BITS
    rest = torch.ldexp(queries.double(), -exponent)
    digits = []
    for _ in range(DIGITS):
        digits.append(rest.round())
        rest = BASE * (rest - digits[-1])
    left = torch.cat(digits).to(torch.int8)  # (DIGITS * b, dim)
    products = torch.empty(len(queries), len(items))
    size = max(PIECE, SUMS // len(queries))
    for first in range(0, len(items), size):
        sums = torch._int_mm(left, items[first : first + size].T).unflatten(0, (DIGITS, -1))
        part = products[:, first : first + size].copy_(sums[-1])
        for higher in sums[:-1].flip(0):
            part.div_(BASE).add_(higher)
    return torch.ldexp(products, exponent, out=products)


def _highest(scores: FloatArray, maxima: FloatArray, n: int) -> npt.NDArray[np.int64]:
    """Positions of the n highest scores (m,) and of all that tie with the last, in no order; fewer where the rest is excluded.

    `maxima` (m // CHUNK,) are the chunks' highest: the n-th highest of them bounds the n-th highest score from below.
    """
    if n >= len(maxima):
        bound = np.partition(scores, len(scores) - n)[len(scores) - n] if n < len(scores) else -np.inf
        return np.flatnonzero((scores >= bound) & (scores > -np.inf))
    bound = np.partition(maxima, len(maxima) - n)[len(maxima) - n]
    chunks = np.flatnonzero(maxima >= bound)
    rest = np.arange(len(maxima) * CHUNK, len(scores))
    candidates = np.concatenate([(chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel(), rest])
    return candidates[(scores[candidates] >= bound) & (scores[candidates] > -np.inf)]


def _merge(parts: list[Retrieved], n: int) -> Retrieved:
    items = np.concatenate([part.item_index for part in parts])
    scores = np.concatenate([part.approx_score for part in parts])
    best = order_by_score(items, scores)[:n]
    return Retrieved(items[best], scores[best])


def nearest_items(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> tuple[Int32Array, FloatArray]:
    """Top-k by inner product, exhaustively: items (m, dim), queries (n, dim) -> indices (n, k), scores (n, k), best first.

    On a GPU by FAISS (extra `gpu`), else by `top_k`, which on a CPU is faster than FAISS's exhaustive search. They differ in
    ties and rounding alone.

    Raises:
        InputError: see `top_k`.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("faiss") is None:
        return top_k(item_embeddings, query_embeddings, k)
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or k > GPU_MOST:
        return top_k(item_embeddings, query_embeddings, k)
    _check_shapes(item_embeddings, query_embeddings, k)
    items, queries = (np.ascontiguousarray(array, dtype=np.float32) for array in (item_embeddings, query_embeddings))
    scores, index = faiss.knn_gpu(faiss.StandardGpuResources(), queries, items, k, metric=faiss.METRIC_INNER_PRODUCT)
    return index.astype(np.int32), scores


def top_k(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> tuple[Int32Array, FloatArray]:
    """Exact top-k by inner product: items (m, dim), queries (n, dim) -> indices (n, k), scores (n, k), best first.

    Ties go to the smaller index. Memory beyond the result: see `ItemIndex.retrieve`.

    Raises:
        InputError: shapes that do not fit, or k outside 1..m.
    """
    _check_shapes(item_embeddings, query_embeddings, k)
    index = np.empty((len(query_embeddings), k), dtype=np.int32)
    best = np.empty((len(query_embeddings), k), dtype=np.float32)
    items, nothing = ItemIndex(item_embeddings), np.empty(0, dtype=np.int32)
    for start in range(0, len(query_embeddings), BLOCK_QUERIES):
        requests = [Retrieve(query, k, nothing) for query in query_embeddings[start : start + BLOCK_QUERIES]]
        for row, found in enumerate(items.retrieve(requests), start):
            index[row], best[row] = found
    return index, best


def _check_shapes(item_embeddings: FloatArray, query_embeddings: FloatArray, k: int) -> None:
    if item_embeddings.ndim != 2 or query_embeddings.ndim != 2 or item_embeddings.shape[1] != query_embeddings.shape[1]:
        raise InputError(f"items {item_embeddings.shape} and queries {query_embeddings.shape} must both be (n, dim), same dim")
    if not 1 <= k <= len(item_embeddings):
        raise InputError(f"k={k} must lie in 1..{len(item_embeddings)}, the number of items; lower k or add items")
