import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core.ranking import top_items
from axn_ray.errors import InputError, ModelError

FEW_VALUES = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 2.0, 2.5]), min_size=1, max_size=40)


@settings(deadline=None)
@given(FEW_VALUES, st.data())
def test_equals_a_full_sort_with_ties_by_item_index(values, data):
    scores = np.array(values, dtype=np.float32)
    excluded = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    left = [i for i in range(len(scores)) if not excluded[i]]
    if left:
        k = data.draw(st.integers(1, len(left)))
        expected = sorted(left, key=lambda i: (-scores[i], i))[:k]
        got = top_items(scores, k, excluded)
        assert got.dtype == np.int32
        assert got.tolist() == expected


def test_infinite_scores_are_ranked_and_nan_is_refused():
    scores = np.array([0.0, np.inf, -np.inf, 1.0], dtype=np.float32)
    assert top_items(scores, 4).tolist() == [1, 3, 0, 2]
    scores[2] = np.nan
    with pytest.raises(ModelError, match="item 2 is NaN"):
        top_items(scores, 1)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_items_is_refused(k):
    with pytest.raises(InputError, match=f"k={k} must lie in 1..3"):
        top_items(np.zeros(3, dtype=np.float32), k)
