import numpy as np
import pytest

from axn_ray.core import index
from axn_ray.core.index import nearest_items, top_k
from axn_ray.core.ranking import order_by_score
from axn_ray.errors import InputError


@pytest.mark.parametrize("block", [70, 1 << 18])
def test_equals_a_full_sort_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(index, "BLOCK_SCORES", block)
    rng = np.random.default_rng(0)
    items, queries = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)
    found, scores = top_k(items, queries, 20)
    full = queries @ items.T
    np.testing.assert_array_equal(found, np.argsort(-full, axis=1)[:, :20])
    np.testing.assert_allclose(scores, np.take_along_axis(full, found, axis=1), rtol=1e-5)


def test_ties_go_to_the_smaller_index():
    assert order_by_score(np.array([5, 2, 9], dtype=np.int32), np.array([1, 1, 3], dtype=np.float32)).tolist() == [2, 1, 0]


def test_bad_k_and_shapes():
    items = np.zeros((3, 2), dtype=np.float32)
    with pytest.raises(InputError, match=r"k=4 must lie in 1\.\.3"):
        top_k(items, items, 4)
    with pytest.raises(InputError, match="same dim"):
        top_k(items, np.zeros((1, 5), dtype=np.float32), 1)


def test_ties_at_the_cut_go_to_the_smaller_index_too():
    items = np.repeat(np.eye(4, dtype=np.float32), 25, axis=0)
    found, scores = top_k(items, np.array([[0, 1, 0, 0]], dtype=np.float32), 40)
    assert found[0].tolist() == [*range(25, 50), *range(15)]
    assert scores[0].tolist() == [1.0] * 25 + [0.0] * 15


def test_faiss_and_its_twin_find_the_same(monkeypatch):
    faiss = pytest.importorskip("faiss")
    calls = []
    monkeypatch.setattr(faiss, "knn", lambda *args, knn=faiss.knn, **kwargs: calls.append(1) or knn(*args, **kwargs))
    rng = np.random.default_rng(1)
    items, queries = rng.normal(size=(500, 16)).astype(np.float32), rng.normal(size=(7, 16)).astype(np.float32)
    by_faiss = nearest_items(items, queries, 30)
    assert calls == [1]
    exact = top_k(items, queries, 30)
    np.testing.assert_array_equal(by_faiss[0], exact[0])
    np.testing.assert_allclose(by_faiss[1], exact[1], rtol=1e-5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.testing.assert_array_equal(nearest_items(items, queries, 30)[0], exact[0])
    assert calls == [1]
