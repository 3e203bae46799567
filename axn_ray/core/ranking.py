"""Which of these scores are the highest: exact, in linear time, ties to the smaller item index.

Knows no embeddings and no CE.
"""

import numpy as np
import numpy.typing as npt

from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError, ModelError


def order_by_score(item_index: Int32Array, scores: FloatArray) -> npt.NDArray[np.int64]:
    """Positions sorted by descending score, ties by ascending item index: (n,), (n,) -> (n,)."""
    return np.lexsort((item_index, -scores))


def top_items(scores: FloatArray, k: int, excluded: npt.NDArray[np.bool_] | None = None) -> Int32Array:
    """Indices of the k highest scores, best first, ties by item index: scores (n_items,), excluded (n_items,) -> (k,).

    O(n_items): one partition finds the k-th highest score; only the k winners are sorted.

    Raises:
        InputError: k outside 1..the number of items that are not excluded.
        ModelError: a score is NaN.
    """
    candidates = np.arange(len(scores)) if excluded is None else np.flatnonzero(~excluded)
    if not 1 <= k <= len(candidates):
        raise InputError(f"k={k} must lie in 1..{len(candidates)}, the items to choose from; lower k or add items")
    values = scores[candidates]
    if np.isnan(values).any():
        wrong = candidates[np.flatnonzero(np.isnan(values))[0]]
        raise ModelError(f"the score of item {wrong} is NaN; check the embeddings or the model that it comes from")
    kth_highest = np.partition(values, len(values) - k)[len(values) - k]
    above = candidates[values > kth_highest]
    tied = candidates[values == kth_highest][: k - len(above)]
    chosen = np.concatenate([above, tied]).astype(np.int32)
    return chosen[order_by_score(chosen, scores[chosen])]
