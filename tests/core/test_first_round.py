import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core.first_round import Bm25Index, dense_first_round, random_first_round
from axn_ray.errors import InputError

TEXTS = ["run: move fast on foot", "eat: take in food", "sprint: run very fast", "sing", "dine: eat food in the evening"]


def test_dense_ranks_by_inner_product_with_ties_by_index():
    items = np.array([[1, 0], [3, 0], [1, 9], [0, 1]], dtype=np.float32)
    ranking = dense_first_round(items, np.array([1, 0], np.float32), 4)
    assert ranking.dtype == np.int32
    assert ranking.tolist() == [1, 0, 2, 3]
    assert dense_first_round(items, np.array([1, 0], np.float32), 2).tolist() == [1, 0]


def test_dense_refuses_another_dim():
    with pytest.raises(InputError, match=r"items \(4, 2\) and query \(3,\)"):
        dense_first_round(np.zeros((4, 2), np.float32), np.zeros(3, np.float32), 2)


def test_bm25_ranks_by_shared_words_and_fills_up_in_order():
    index = Bm25Index(TEXTS)
    ranking = index.rank("The girl RUNS, run fast!", 5)
    assert ranking.dtype == np.int32
    assert set(ranking[:2].tolist()) == {0, 2}
    assert ranking[2:].tolist() == [1, 3, 4]


def test_bm25_without_a_known_word_gives_the_items_in_order():
    index = Bm25Index(TEXTS)
    assert index.rank("xylophone", 3).tolist() == [0, 1, 2]
    assert index.rank("the of", 3).tolist() == [0, 1, 2]


def test_bm25_prefers_the_rarer_word():
    assert Bm25Index(TEXTS).rank("evening food", 1).tolist() == [4]


def test_bm25_survives_the_way_to_a_worker():
    index = Bm25Index(TEXTS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(index)).rank("eat food", 5), index.rank("eat food", 5))


def test_bm25_is_read_from_disk_as_it_was_written(tmp_path):
    index = Bm25Index(TEXTS)
    index.save(tmp_path / "bm25")
    loaded = Bm25Index.load(tmp_path / "bm25")
    assert loaded.n_items == 5
    for query in ("eat food", "The girl RUNS, run fast!", "xylophone", ""):
        np.testing.assert_array_equal(loaded.score(query), index.score(query))
        assert (index.score(query).shape, index.score(query).dtype) == ((5,), np.float32)
    assert np.count_nonzero(index.score("eat food")) == 2


def test_bm25_refuses_items_without_words_and_n_out_of_range():
    with pytest.raises(InputError, match="none of the 2 items has a word"):
        Bm25Index(["the", "of a"])
    with pytest.raises(InputError, match=r"k=6 must lie in 1..5"):
        Bm25Index(TEXTS).rank("eat", 6)


@settings(deadline=None)
@given(st.integers(1, 50), st.data())
def test_random_names_each_item_once_and_a_larger_n_appends(n_items, data):
    n = data.draw(st.integers(1, n_items))
    ranking = random_first_round(n_items, n, np.random.default_rng(5))
    assert ranking.dtype == np.int32 and len(set(ranking.tolist())) == n
    assert set(ranking.tolist()) <= set(range(n_items))
    np.testing.assert_array_equal(random_first_round(n_items, n_items, np.random.default_rng(5))[:n], ranking)


def test_random_refuses_more_than_there_are():
    with pytest.raises(InputError, match=r"n=4 must lie in 1..3"):
        random_first_round(3, 4, np.random.default_rng(0))
