import numpy as np
import pytest

from axn_ray.core.estimators import Pinv, Ridge
from axn_ray.core.methods import BM25, METHODS, Embeddings, Method, SearchSpace, choose_methods, prepare
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.errors import InputError
from tests.examinations import make_world


def test_each_method_of_the_table_can_be_prepared():
    space, _ = make_world()
    space.check_methods(METHODS.values())
    for method in METHODS.values():
        ranking, estimator = prepare(method, space, query=2, n_first=7)
        assert len(set(ranking.tolist())) == 7
        assert (estimator is None) == (method.rounds == 1)


def test_the_estimator_gets_the_methods_numbers_and_the_querys_embedding():
    space, _ = make_world()
    ridge = prepare(METHODS["axn_ridge_mf_ind"], space, 3, 5)[1]
    assert isinstance(ridge, Ridge) and (ridge.noise_variance, ridge.prior_variance) == (0.5, 1.0)
    np.testing.assert_array_equal(ridge.u_param, space.embeddings["mf_ind"].queries[3])
    pinv = prepare(METHODS["axn_blend_mf_ind"], space, 3, 5)[1]
    assert isinstance(pinv, Pinv) and pinv.blend == 0.5 and pinv.scale == space.embeddings["mf_ind"].scale


def test_rounds_multiply_the_methods_that_search():
    chosen = choose_methods(["rnr_bm25", "axn_pinv_de"], [5, 10])
    assert [(method.name, method.rounds) for method in chosen] == [("RnR, BM25", 1), ("AXN pinv, DE", 5), ("AXN pinv, DE", 10)]
    with pytest.raises(InputError, match="method 'axn' is not known; choose among rnr_bm25"):
        choose_methods(["axn"], [5])


@pytest.mark.parametrize("lacking", [{"estimator": "pinv"}, {"embeddings": "de"}, {}])
def test_a_search_needs_estimator_and_embeddings(lacking):
    with pytest.raises(InputError, match="name its estimator and embeddings"):
        Method(name="m", first_round="de", rounds=2, **lacking)


def test_a_missing_part_is_named():
    space, _ = make_world()
    bare = SearchSpace({"de": space.embeddings["de"]}, space.query_texts)
    with pytest.raises(InputError, match="'RnR, BM25' needs 'bm25', given are de"):
        bare.check_methods([METHODS["rnr_bm25"]])
    with pytest.raises(InputError, match="'AXN pinv, MF_Trns' needs 'mf_trns'"):
        prepare(METHODS["axn_pinv_mf_trns"], bare, 0, 5)
    assert BM25 not in bare.embeddings


def test_parts_that_do_not_fit_are_refused():
    space, _ = make_world()
    de = space.embeddings["de"]
    with pytest.raises(InputError, match=r"'short' hold \(299, 6\) instead of \(300, 6\)"):
        SearchSpace({"de": de, "short": Embeddings(de.items[1:], de.queries, de.scale)}, space.query_texts)
    with pytest.raises(InputError, match="BM25 holds 300 items, the embeddings 299"):
        SearchSpace({"de": Embeddings(de.items[1:], de.queries, de.scale)}, space.query_texts, space.bm25)
    with pytest.raises(InputError, match="same dim"):
        Embeddings(de.items, de.queries[:, :3], de.scale)
    with pytest.raises(InputError, match="without embeddings"):
        SearchSpace({}, ())
    broken = de.items.copy()
    broken[4, 0] = np.nan
    with pytest.raises(InputError, match="1 item embeddings are NaN or infinite .first: row 4."):
        Embeddings(broken, de.queries, ScoreScale())
