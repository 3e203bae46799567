"""Which train pairs deserve a CE call. Knows no CE and no files."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from axn_ray.core.index import nearest_items
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]
PairChoice = Literal["nearest", "random", "all"]


def choose_items(
    choice: PairChoice,
    per_query: int,
    item_embeddings: FloatArray,
    query_embeddings: FloatArray,
    rng: np.random.Generator,
) -> Int32Array:
    """Items to score for each query: items (m, dim), queries (n, dim) -> (n, per_query) indices, ascending per query.

    `nearest`: the dual-encoder's top items (the paper's `per_query`); `random`: uniform without replacement; `all`:
    every item (`per_query` is ignored), for exact truth.

    Raises:
        InputError: per_query exceeds the items.
    """
    n_items, n_queries = len(item_embeddings), len(query_embeddings)
    if choice == "all":
        return np.tile(np.arange(n_items, dtype=np.int32), (n_queries, 1))
    check_per_query(per_query, n_items)
    if choice == "nearest":
        return np.sort(nearest_items(item_embeddings, query_embeddings, per_query)[0], axis=1)
    drawn = [rng.choice(n_items, per_query, replace=False) for _ in range(n_queries)]
    return np.sort(np.array(drawn, dtype=np.int32), axis=1)


def check_per_query(per_query: int, n_items: int) -> None:
    """Refuse to choose more items than there are.

    Raises:
        InputError: per_query exceeds n_items.
    """
    if per_query > n_items:
        raise InputError(f"per_query={per_query} exceeds the {n_items} items; lower per_query or add items")
