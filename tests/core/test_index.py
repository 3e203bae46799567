import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core import index
from axn_ray.core.index import ItemIndex, Retrieve, nearest_items, top_k
from axn_ray.core.ranking import order_by_score
from axn_ray.errors import InputError, ModelError


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_nearest_items_are_those_of_faiss(device):
    if device == "gpu":
        assert hasattr(faiss, "knn_gpu"), "install axn-ray[gpu]"
    rng = np.random.default_rng(1)
    items, queries = rng.normal(size=(500, 16)).astype(np.float32), rng.normal(size=(70, 16)).astype(np.float32)
    scores, index = faiss.knn(queries, items, 30, metric=faiss.METRIC_INNER_PRODUCT)
    found = nearest_items(items, queries, 30)
    np.testing.assert_array_equal(found[0], index)
    np.testing.assert_allclose(found[1], scores, rtol=1e-5)


def slow_retrieve(items, request):
    """Every inner product and a full sort."""
    scores = items.astype(np.float32) @ request.query_embedding
    left = [i for i in np.lexsort((np.arange(len(items)), -scores)) if i not in set(request.excluded.tolist())]
    return left[: request.n], scores[left[: request.n]]


@settings(deadline=None)
@given(
    n_items=st.integers(1, 400),
    n_requests=st.integers(1, 4),
    block=st.sampled_from([8, 100, 1000, 1 << 24]),
    dtype=st.sampled_from([np.float32, np.float16, np.int8]),
    held=st.sampled_from([0, 1 << 28]),
    by_digits=st.booleans(),
    dim=st.sampled_from([1, 5, 64]),
    coarse=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_index_answers_many_requests_as_a_full_sort_does(
    n_items, n_requests, block, dtype, held, by_digits, dim, coarse, seed
):
    rng = np.random.default_rng(seed)
    items, queries = rng.normal(size=(n_items, dim)), rng.normal(size=(n_requests, dim))
    if coarse:  # whole numbers: exact products, and many ties
        items, queries = np.round(items), np.round(queries)
    items = np.round(30 * items).astype(dtype) if dtype == np.int8 else items.astype(dtype)
    requests = []
    for query in queries.astype(np.float32):
        excluded = rng.permutation(n_items)[: rng.integers(0, n_items)].astype(np.int32)
        requests.append(Retrieve(query, int(rng.integers(1, n_items - len(excluded) + 1)), excluded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BLOCK_SCORES", block)
        patch.setattr(index, "HELD", held)
        patch.setattr(index, "PIECE", 70)
        patch.setattr(index, "SUMS", 200)
        if not by_digits:  # as on a CPU that does not multiply int8 exactly
            patch.setattr(index, "_has_exact_int8", lambda dim: False)
        found = ItemIndex(items).retrieve(requests)
    for request, answer in zip(requests, found, strict=True):
        expected, scores = slow_retrieve(items, request)
        assert (answer.item_index.dtype, answer.approx_score.dtype) == (np.int32, np.float32)
        if coarse:
            assert answer.item_index.tolist() == expected
        error = 3e-7 * dim * np.abs(items.astype(np.float64)).max() * np.abs(request.query_embedding).max()
        np.testing.assert_allclose(answer.approx_score, scores, rtol=1e-5, atol=error)
        assert not set(answer.item_index.tolist()) & set(request.excluded.tolist())


def test_products_with_8_bits_have_the_resolution_of_float32():
    rng = np.random.default_rng(2)
    items = rng.integers(-127, 128, (3000, 512), dtype=np.int8)
    queries = rng.standard_normal((20, 512)) * 10.0 ** rng.uniform(-6, 6, (20, 1)) * 10.0 ** rng.uniform(-2, 2, 512)
    queries = np.vstack([np.zeros((1, 512)), np.full((1, 512), 1e30), queries]).astype(np.float32)
    requests = [Retrieve(query, len(items), np.empty(0, np.int32)) for query in queries]
    together = ItemIndex(items).retrieve(requests)
    for request, found in zip(requests, together, strict=True):
        terms = items[found.item_index].astype(np.float64) * request.query_embedding
        assert (np.abs(found.approx_score - terms.sum(1)) <= 2e-6 * np.abs(terms).sum(1)).all()


def test_an_answer_does_not_depend_on_the_company():
    if not index._has_exact_int8(64):
        pytest.skip("this CPU has no exact products of 8 bits")
    rng = np.random.default_rng(3)
    items = ItemIndex(rng.integers(-127, 128, (3000, 64), dtype=np.int8))
    requests = [Retrieve(query, 50, np.empty(0, np.int32)) for query in rng.standard_normal((9, 64)).astype(np.float32)]
    for request, found in zip(requests, items.retrieve(requests), strict=True):
        (alone,) = items.retrieve([request])
        assert found.item_index.tolist() == alone.item_index.tolist()
        assert found.approx_score.tolist() == alone.approx_score.tolist()


@pytest.mark.parametrize("n_items", [5, 300, 5000])
def test_an_offset_is_added_to_the_inner_products(n_items, monkeypatch):
    monkeypatch.setattr("axn_ray.core.index.BLOCK_SCORES", 2000)
    rng = np.random.default_rng(n_items)
    items, queries = rng.standard_normal((n_items, 8)).astype(np.float32), rng.standard_normal((3, 8)).astype(np.float32)
    offsets, excluded = 3 * rng.standard_normal((3, n_items)).astype(np.float32), np.array([1, 4], np.int32)
    requests = [Retrieve(queries[n], 3, excluded, None if n == 1 else offsets[n]) for n in range(3)]
    for n, found in enumerate(ItemIndex(items).retrieve(requests)):
        expected = items @ queries[n] + (0 if n == 1 else offsets[n])
        expected[excluded] = -np.inf
        best = np.argsort(-expected)[:3]
        assert found.item_index.tolist() == best.tolist()
        np.testing.assert_allclose(found.approx_score, expected[best], rtol=1e-5)


def test_the_index_searches_a_file(tmp_path):
    np.save(tmp_path / "items.npy", np.eye(5, dtype=np.float16))
    items = ItemIndex(np.load(tmp_path / "items.npy", mmap_mode="r"))
    found = items.retrieve([Retrieve(np.array([1, 3, 2, 5, 4], np.float32), 2, np.array([3], np.int32))])[0]
    assert (found.item_index.tolist(), found.approx_score.tolist()) == ([4, 1], [4, 3])


def test_requests_that_cannot_be_answered_are_refused():
    items, query = ItemIndex(np.ones((4, 2), np.float32)), np.ones(2, np.float32)
    nothing = np.empty(0, np.int32)
    with pytest.raises(InputError, match=r"n=4 must lie in 1\.\.3, the items to choose from"):
        items.retrieve([Retrieve(query, 4, np.array([0], np.int32))])
    with pytest.raises(InputError, match=r"items \(4, 2\) and query \(3,\)"):
        items.retrieve([Retrieve(query, 1, nothing), Retrieve(np.ones(3, np.float32), 1, nothing)])
    with pytest.raises(InputError, match=r"an offset of shape \(3,\) for 4 items"):
        items.retrieve([Retrieve(query, 1, nothing, np.ones(3, np.float32))])
    with pytest.raises(InputError, match=r"are float32 of shape \(4,\)"):
        ItemIndex(np.ones(4, np.float32))
    with pytest.raises(InputError, match=r"are float64 of shape \(4, 2\)"):
        ItemIndex(np.ones((4, 2)))
    with pytest.raises(ModelError, match="a query embedding is NaN"):
        Retrieve(query * np.nan, 1, nothing)
    for n_items in (3, 300):
        broken = np.ones((n_items, 2), np.float32)
        broken[1] = np.inf, -np.inf
        with pytest.raises(ModelError, match="an inner product is NaN"):
            ItemIndex(broken).retrieve([Retrieve(query, 1, nothing)])


@pytest.mark.parametrize("kept", [7, 60, 700])
def test_most_items_excluded(kept, monkeypatch):
    monkeypatch.setattr("axn_ray.core.index.BLOCK_SCORES", 1000)
    rng = np.random.default_rng(kept)
    items, query = rng.standard_normal((3000, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    inside = np.sort(rng.choice(3000, kept, replace=False))
    excluded = np.setdiff1d(np.arange(3000, dtype=np.int32), inside)
    (found,) = ItemIndex(items).retrieve([Retrieve(query, 7, excluded)])
    np.testing.assert_array_equal(found.item_index, inside[np.argsort(-(items[inside] @ query))[:7]])
