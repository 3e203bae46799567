from dataclasses import replace

import numpy as np
import pytest

from axn_ray.core.adaptive import run_search, search
from axn_ray.core.estimators import Pinv, Ridge, Tour
from axn_ray.core.first_round import Bm25Index, dense_first_round
from axn_ray.core.graph_search import gar, ladr
from axn_ray.core.index import ItemIndex
from axn_ray.core.lexical import LexicalMean
from axn_ray.core.methods import BM25, METHODS, Method, choose_methods
from axn_ray.core.metrics import exact_top_k
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.core.search_space import Embeddings, SearchSpace, build_estimator, cur_embeddings, start_search
from axn_ray.errors import InputError
from tests.examinations import make_world


def found(running, exact, items=None):
    """What a running search asks to score, round by round, and its result; it retrieves among these items (n_items, dim)."""
    asked, retrieve = [], None if items is None else lambda request: ItemIndex(items).retrieve([request])[0]
    result = run_search(running, lambda chosen: asked.append(chosen.tolist()) or exact[chosen], retrieve)
    return asked, result


def search_with(method, space, query, budget, exact):
    items = None if method.graph or method.embeddings is None else space.embeddings[method.embeddings].items
    return found(start_search(method, space, query, budget), exact, items)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_method_of_the_table_spends_exactly_its_budget(method):
    space, exact = make_world()
    space.check_methods([method])
    asked, result = search_with(method, space, 2, 40, exact.scores[2])
    assert result.n_ce_calls == 40 == len(set(result.item_index.tolist()))
    assert (len(asked) == 1) == (method.rounds == 1)
    _, again = search_with(method, space, 2, 40, exact.scores[2])
    np.testing.assert_array_equal(again.item_index, result.item_index)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_with_the_whole_budget_each_method_is_exact_search(method):
    space, exact = make_world()
    _, result = search_with(method, space, 1, 300, exact.scores[1])
    np.testing.assert_array_equal(result.item_index, exact_top_k(exact.scores[1], 300))


def test_a_method_is_the_search_that_it_describes():
    space, exact = make_world()
    de, graph, scores = space.embeddings["de"], space.graphs["de"], exact.scores[3]
    ranking = dense_first_round(de.items, de.queries[3], 40)
    tour = Tour(de.items, de.queries[3], METHODS["tour_de"].learning_rate, METHODS["tour_de"].temperature)
    described = {
        "rnr_de": search(None, ranking, n_items=300, budget=40, rounds=1),
        "axn_pinv_de": search(Pinv(de.items, de.scale, 0.0, de.queries[3]), ranking, n_items=300, budget=40, rounds=10),
        "tour_de": search(tour, ranking, n_items=300, budget=40, rounds=10),
        "gar_de": gar(ranking, graph, budget=40, rounds=10),
        "ladr_de": ladr(ranking, graph, budget=40, rounds=10, depth=METHODS["ladr_de"].depth),
    }
    for key, running in described.items():
        assert search_with(METHODS[key], space, 3, 40, scores)[0] == found(running, scores, de.items)[0], key


def test_the_estimator_gets_the_methods_numbers_and_what_was_fitted_goes_first():
    space, _ = make_world()
    part = space.embeddings["mf_ind"]
    ridge = build_estimator(METHODS["axn_ridge_mf_ind"], part.items, part.scale, part.queries[3])
    assert isinstance(ridge, Ridge) and (ridge.noise_variance, ridge.prior_variance) == (0.5, 1.0)
    np.testing.assert_array_equal(ridge.u_param, part.queries[3])
    assert build_estimator(METHODS["axn_bayes"], part.items, part.scale, part.queries[3], 0.2).noise_variance == 0.2
    variances = np.arange(1, 1 + part.items.shape[1], dtype=np.float32)
    fitted = build_estimator(METHODS["axn_bayes"], part.items, part.scale, part.queries[3], prior_variance=variances)
    assert fitted.prior_variance is variances
    pinv = build_estimator(METHODS["axn_blend_mf_ind"], part.items, part.scale, part.queries[3])
    assert isinstance(pinv, Pinv) and pinv.blend == 0.5 and pinv.scale == part.scale
    with pytest.raises(InputError, match="'TouR, DE' needs a query embedding"):
        build_estimator(METHODS["tour_de"], part.items, part.scale, None)
    with pytest.raises(InputError, match="'AXN bayes' needs a fitted scale"):
        build_estimator(METHODS["axn_bayes"], part.items, None, part.queries[3])


def test_directions_of_their_own_spread_are_for_the_ridge_alone():
    space, exact = make_world()
    part = space.embeddings["mf_ind"]
    units = np.linspace(0.5, 2.0, part.items.shape[1]).astype(np.float32)
    other = replace(part, items=part.items / units, queries=part.queries * units, prior_variance=units**2)
    turned = replace(space, embeddings={**space.embeddings, "mf_ind": other})
    ridge = METHODS["axn_ridge_mf_ind"]
    chosen = [search_with(ridge, world, 3, 40, exact.scores[3])[0] for world in (turned, space)]
    assert chosen[0] == chosen[1]
    for wrong in (METHODS["axn_pinv_mf_ind"], replace(METHODS["gar_de"], embeddings="mf_ind")):
        with pytest.raises(InputError, match="takes all directions of 'mf_ind' as equal, which they are not; use the estimator"):
            turned.check_methods([wrong])


def test_a_search_adds_what_the_words_of_its_query_say():
    space, exact = make_world()
    part, scores = space.embeddings["mf_ind"], exact.scores[3]
    lexical = LexicalMean(Bm25Index([f"word{n % 7} item{n}" for n in range(300)]), weight=50.0)
    spoken = replace(space, embeddings={"mf_ind": replace(part, lexical=lexical)}, query_texts=("word3 item17",) * 6)
    method = replace(METHODS["axn_ridge_mf_ind"], rounds=4)
    offset = np.float32(50.0) * np.sqrt(lexical.index.score("word3 item17"))
    ridge = build_estimator(method, part.items, part.scale, part.queries[3], offset=offset)
    running = search(ridge, None, n_items=300, budget=40, rounds=4)
    chosen = search_with(method, spoken, 3, 40, scores)[0]
    assert chosen == found(running, scores, part.items)[0]
    assert chosen[0][0] == 17
    assert chosen != search_with(method, space, 3, 40, scores)[0]


def low_rank_world(rank=5, n_items=200, n_rows=30, n_queries=4):
    """A space whose CE scores are exactly of low rank, dense train rows among them; and the queries' scores."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((rank, n_items))
    rows, exact = ((rng.standard_normal((n, rank)) @ items).astype(np.float32) for n in (n_rows, n_queries))
    de = Embeddings(rng.standard_normal((n_items, 8)).astype(np.float32), rng.standard_normal((n_queries, 8)), None)
    return SearchSpace({"de": de, "cur": cur_embeddings(rows)}, ("q",) * n_queries), exact


@pytest.mark.parametrize(("key", "rounds"), [("anncur", 2), ("adacur", 2), ("adacur", 4), ("adacur_random", 3)])
def test_cur_is_exact_where_the_scores_are_of_low_rank(key, rounds):
    space, exact = low_rank_world()
    method = Method(**{**vars(METHODS[key]), "rounds": rounds})
    for query, scores in enumerate(exact):
        # Five or more anchors span the space: the second round takes the best of the rest, in order.
        asked, result = search_with(method, space, query, 20, scores)
        rest = [item for item in exact_top_k(scores, 200).tolist() if item not in asked[0]]
        assert asked[1] == rest[: len(asked[1])]
        assert result.item_index[0] == exact_top_k(scores, 1)[0]


def test_cur_is_the_product_of_its_three_matrices():
    rng = np.random.default_rng(1)
    rows, scores = rng.standard_normal((12, 50)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    cur, anchor_items = cur_embeddings(rows), rng.permutation(50)[:8].astype(np.int32)
    pinv = Pinv(cur.items, cur.scale)
    pinv.observe(anchor_items, scores)
    got = cur.items @ pinv.query_embedding
    np.testing.assert_allclose(got, scores @ np.linalg.pinv(rows[:, anchor_items].astype(np.float64)) @ rows, atol=1e-4)
    assert cur.index_ce_calls == 12 * 50


def test_anncurs_anchors_are_the_same_for_every_query_and_adacurs_are_not():
    space, exact = low_rank_world()
    first = {
        key: {tuple(next(start_search(METHODS[key], space, query, 20)).item_index) for query in range(4)}
        for key in ("anncur", "adacur")
    }
    assert len(first["anncur"]) == 1 and len(first["adacur"]) == 4
    assert next(start_search(METHODS["anncur"], space, 0, 30)).item_index[:10].tolist() == list(*first["anncur"])


def test_index_calls_are_those_of_the_embeddings_in_use():
    space, _ = low_rank_world()
    assert space.index_ce_calls(METHODS["anncur"]) == 30 * 200
    assert space.index_ce_calls(METHODS["axn_pinv_de"]) is None  # nobody said what these cost
    de = Embeddings(space.embeddings["de"].items, space.embeddings["de"].queries, None, index_ce_calls=0)
    known = SearchSpace({**space.embeddings, "de": de}, space.query_texts)
    assert known.index_ce_calls(METHODS["adacur"]) == 30 * 200
    assert known.index_ce_calls(METHODS["axn_pinv_de"]) == known.index_ce_calls(METHODS["rnr_bm25"]) == 0


def test_rounds_multiply_the_methods_that_search():
    chosen = choose_methods(["rnr_bm25", "axn_pinv_de", "anncur", "gar_de"], [5, 10])
    assert [(method.name, method.rounds) for method in chosen] == [
        ("RnR, BM25", 1),
        ("AXN pinv, DE", 5),
        ("AXN pinv, DE", 10),
        ("ANNCUR", 2),
        ("GAR, DE", 5),
        ("GAR, DE", 10),
    ]
    with pytest.raises(InputError, match="method 'axn' is not known; choose among rnr_bm25"):
        choose_methods(["axn"], [5])


@pytest.mark.parametrize(
    "wrong",
    [
        {"estimator": "pinv"},
        {"embeddings": "de"},
        {},
        {"embeddings": "de", "estimator": "pinv", "graph": "gar"},
        {"graph": "gar"},
    ],
)
def test_several_rounds_need_embeddings_and_one_way_to_follow_them(wrong):
    with pytest.raises(InputError, match="name its embeddings and either its estimator or its graph"):
        Method(name="m", first_round="de", rounds=2, **wrong)


def test_a_target_recall_ends_the_searches_of_a_ridge_alone():
    space, exact = make_world()
    method = Method(**{**vars(METHODS["axn_ridge_mf_ind"]), "target_recall": 0.5, "k": 3})
    _, whole = search_with(METHODS["axn_ridge_mf_ind"], space, 2, 200, exact.scores[2])
    _, stopped = search_with(method, space, 2, 200, exact.scores[2])
    assert 3 <= stopped.n_ce_calls < whole.n_ce_calls == 200
    with pytest.raises(InputError, match="has a target recall but no posterior"):
        Method(**{**vars(METHODS["axn_pinv_de"]), "target_recall": 0.9})


def test_the_searches_of_a_space_share_an_index_of_each_embeddings():
    space, _ = make_world()
    de, mf_ind = METHODS["axn_pinv_de"], METHODS["axn_pinv_mf_ind"]
    assert space.index_of(de) is space.index_of(replace(de, rounds=2))
    assert space.index_of(mf_ind) is not space.index_of(de)


def test_a_missing_part_is_named():
    space, _ = make_world()
    bare = SearchSpace({"de": space.embeddings["de"]}, space.query_texts)
    with pytest.raises(InputError, match="'RnR, BM25' needs 'bm25', given are de"):
        bare.check_methods([METHODS["rnr_bm25"]])
    with pytest.raises(InputError, match="'AXN pinv, MF_Trns' needs 'mf_trns'"):
        start_search(METHODS["axn_pinv_mf_trns"], bare, 0, 20)
    with pytest.raises(InputError, match="'GAR, DE' needs 16 neighbours of each item in 'de', given are 0; build the graph"):
        bare.check_methods([METHODS["gar_de"]])
    with pytest.raises(InputError, match="'ADACUR, DE first' needs 'cur'"):
        bare.check_methods([METHODS["adacur"]])
    assert BM25 not in bare.embeddings


@pytest.mark.parametrize("needing", [{"first_round": "cur"}, {"estimator": "tour"}, {"blend": 0.5}])
def test_embeddings_without_queries_serve_the_pseudo_inverse_alone(needing):
    space, _ = low_rank_world()
    method = Method(**{**vars(METHODS["adacur"]), **needing})
    with pytest.raises(InputError, match="needs 'cur', given are"):
        start_search(method, space, 0, 20)


def test_parts_that_do_not_fit_are_refused():
    space, _ = make_world()
    de = space.embeddings["de"]
    with pytest.raises(InputError, match=r"'short' hold \(299, 6\) instead of \(300, 6\)"):
        SearchSpace({"de": de, "short": Embeddings(de.items[1:], de.queries, de.scale)}, space.query_texts)
    with pytest.raises(InputError, match="BM25 holds 300 items, the embeddings 299"):
        SearchSpace({"de": Embeddings(de.items[1:], de.queries, de.scale)}, space.query_texts, space.bm25)
    with pytest.raises(InputError, match="graph 'de' holds 299 items, the embeddings 300"):
        SearchSpace({"de": de}, space.query_texts, graphs={"de": space.graphs["de"][1:]})
    with pytest.raises(InputError, match="same dim"):
        Embeddings(de.items, de.queries[:, :3], de.scale)
    with pytest.raises(InputError, match="without embeddings"):
        SearchSpace({}, ())
    broken = de.items.copy()
    broken[4, 0] = np.nan
    with pytest.raises(InputError, match="1 item embeddings are NaN or infinite .first: row 4."):
        Embeddings(broken, de.queries, ScoreScale())
