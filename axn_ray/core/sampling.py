"""Which train pairs deserve a CE call, before any has been made. Knows no CE and no files."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from axn_ray.core.index import nearest_items
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shares:
    """How the items of a train query are chosen: numbers of items, in the order in which they are chosen."""

    nearest: int
    random: int
    active: int

    @property
    def first(self) -> int:
        """Items that can be chosen before anything has been scored."""
        return self.nearest + self.random

    @classmethod
    def of(cls, per_query: int, random_share: float, active_share: float) -> "Shares":
        """Split `per_query`: what is neither random nor active are the dual-encoder's nearest."""
        active, random = round(active_share * per_query), round(random_share * per_query)
        random = min(random, per_query - active)
        return cls(per_query - active - random, random, active)


def choose_items(
    shares: Shares, item_embeddings: FloatArray, query_embeddings: FloatArray, rng: np.random.Generator
) -> Int32Array:
    """The first items to score for each query: items (m, dim), queries (n, dim) -> (n, shares.first), ascending.

    The dual-encoder's nearest (the paper's `per_query`), and others drawn uniformly without replacement.

    Raises:
        InputError: more items asked for than there are.
    """
    n_items = len(item_embeddings)
    check_per_query(shares.first + shares.active, n_items)
    nearest = np.empty((len(query_embeddings), 0), dtype=np.int32)
    if shares.nearest:
        nearest = nearest_items(item_embeddings, query_embeddings, shares.nearest)[0]
    chosen = np.empty((len(query_embeddings), shares.first), dtype=np.int32)
    for row, near in enumerate(nearest):
        drawn = rng.choice(n_items, shares.first, replace=False) if shares.random else np.empty(0, dtype=np.int32)
        others = drawn[~np.isin(drawn, near)][: shares.random]
        chosen[row] = np.concatenate([near, others])
    return np.sort(chosen, axis=1)


def choose_queries(per_item: int, item_embeddings: FloatArray, query_embeddings: FloatArray) -> tuple[Int32Array, Int32Array]:
    """The pairs that give each item its `per_item` nearest queries of the pool (the paper's `per_item`), by query.

    Items (m, dim), queries (n, dim) -> query indices, item indices, (m * per_item,) each.

    Raises:
        InputError: more queries asked for than there are.
    """
    if per_item > len(query_embeddings):
        raise InputError(f"per_item={per_item} exceeds the {len(query_embeddings)} queries; lower per_item or add queries")
    nearest = nearest_items(query_embeddings, item_embeddings, per_item)[0]
    item_index = np.repeat(np.arange(len(item_embeddings), dtype=np.int32), per_item)
    order = np.lexsort((item_index, nearest.ravel()))
    return nearest.ravel()[order].astype(np.int32), item_index[order]


def check_per_query(per_query: int, n_items: int) -> None:
    """Refuse to choose more items than there are.

    Raises:
        InputError: per_query exceeds n_items.
    """
    if per_query > n_items:
        raise InputError(f"per_query={per_query} exceeds the {n_items} items; lower per_query or add items")


def draw_queries(rows: npt.NDArray[np.int64], n: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Some n rows, ascending (None keeps all); a larger n with the same seed only adds rows.

    Raises:
        InputError: fewer rows than asked for.
    """
    if n is None:
        return rows
    if n > len(rows):
        raise InputError(f"n_queries={n} exceeds the {len(rows)} queries of the split; lower it or add queries")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:n])
