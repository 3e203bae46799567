import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core.adaptive import Score, run_search, search, split_budget
from axn_ray.core.estimators import Pinv, Ridge
from axn_ray.core.first_round import dense_first_round, random_first_round
from axn_ray.core.index import ItemIndex, Retrieve, Retrieved
from axn_ray.core.metrics import exact_top_k
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.errors import InputError, ModelError


class World:
    """Items, a query and its exact CE scores, in coarse steps, so that ties are common."""

    def __init__(self, n_items, seed, dim=6):
        rng = np.random.default_rng(seed)
        self.n_items = n_items
        self.items = np.round(rng.standard_normal((n_items, dim)), 1).astype(np.float32)
        self.query = rng.standard_normal(dim).astype(np.float32)
        self.exact = np.round(self.items @ self.query + rng.standard_normal(n_items), 1).astype(np.float32)
        self.first_round = random_first_round(n_items, n_items, rng)
        self.asked = []

    def score(self, chosen):
        assert chosen.dtype == np.int32
        self.asked.append(chosen)
        return self.exact[chosen]

    def search(self, budget, rounds, estimator=None):
        estimator = estimator or Pinv(self.items, ScoreScale())
        running = search(estimator, self.first_round, n_items=self.n_items, budget=budget, rounds=rounds)
        return run_search(running, self.score, self.retrieve)

    def retrieve(self, request):
        return ItemIndex(self.items).retrieve([request])[0]


@st.composite
def settings_of_a_search(draw):
    n_items = draw(st.integers(1, 60))
    budget = draw(st.integers(1, n_items))
    return n_items, budget, draw(st.integers(1, budget)), draw(st.integers(0, 99))


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 50))
def test_the_budget_is_split_equally_with_the_rest_first(budget, rounds):
    shares = split_budget(budget, rounds)
    assert len(shares) == rounds and sum(shares) == budget
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


@settings(deadline=None)
@given(settings_of_a_search())
def test_the_budget_is_exact_and_no_pair_comes_twice(case):
    n_items, budget, rounds, seed = case
    world = World(n_items, seed)
    result = world.search(budget, rounds)
    asked = np.concatenate(world.asked)
    assert len(asked) == budget == result.n_ce_calls == len(np.unique(asked))
    assert [len(chosen) for chosen in world.asked] == split_budget(budget, rounds)
    assert sorted(asked) == sorted(result.item_index)
    np.testing.assert_array_equal(result.score, world.exact[result.item_index])
    for item, found_in in zip(result.item_index, result.round, strict=True):
        assert item in world.asked[found_in - 1]
    assert [(-s, i) for s, i in zip(result.score, result.item_index, strict=True)] == sorted((-world.exact[i], i) for i in asked)
    assert (result.item_index.dtype, result.score.dtype, result.round.dtype) == (np.int32, np.float32, np.int32)


@settings(deadline=None)
@given(settings_of_a_search())
def test_with_the_whole_budget_it_equals_exact_search(case):
    n_items, _, rounds, seed = case
    world = World(n_items, seed)
    result = world.search(n_items, rounds)
    np.testing.assert_array_equal(result.item_index, exact_top_k(world.exact, n_items))


@settings(deadline=None)
@given(settings_of_a_search())
def test_one_round_equals_retrieve_and_rerank(case):
    n_items, budget, _, seed = case
    world = World(n_items, seed)
    shortlist = dense_first_round(world.items, world.query, budget)
    running = search(None, shortlist, n_items=n_items, budget=budget, rounds=1)
    result = run_search(running, world.score)
    assert result.item_index.tolist() == sorted(shortlist, key=lambda i: (-world.exact[i], i))
    assert len(world.asked) == 1 and set(result.round) == {1}


@settings(deadline=None, max_examples=30)
@given(settings_of_a_search(), st.booleans())
def test_the_same_input_gives_the_same_result(case, ridge):
    n_items, budget, rounds, seed = case
    results = []
    for _ in range(2):
        world = World(n_items, seed)
        estimator = Ridge(world.items, ScoreScale(), world.query, 0.5) if ridge else None
        results.append(world.search(budget, rounds, estimator))
    for name in ("item_index", "score", "round"):
        np.testing.assert_array_equal(getattr(results[0], name), getattr(results[1], name))


class Observed:
    """An estimator whose embedding is fixed, and which remembers what it was shown."""

    def __init__(self, embedding):
        self.query_embedding = embedding
        self.seen = []

    def observe(self, items, scores):
        self.seen.append((items.tolist(), scores.tolist()))


def test_later_rounds_retrieve_near_the_estimators_embedding():
    estimator = Observed(np.array([0, 1], np.float32))
    running = search(estimator, np.array([5, 0, 9], np.int32), n_items=10, budget=6, rounds=3)
    assert next(running).item_index.tolist() == [5, 0]
    request = running.send(np.array([1, 2], np.float32))
    assert isinstance(request, Retrieve) and request.n == 2
    assert request.query_embedding is estimator.query_embedding and request.excluded.tolist() == [5, 0]
    assert running.send(Retrieved(np.array([8, 1], np.int32), np.zeros(2, np.float32))).item_index.tolist() == [8, 1]
    assert running.send(np.array([3, 4], np.float32)).excluded.tolist() == [5, 0, 8, 1]
    assert estimator.seen == [([5, 0], [1, 2]), ([8, 1], [3, 4])]


def test_without_a_first_round_the_search_opens_with_the_estimators_own_embedding():
    world = World(40, 0)
    ranking = dense_first_round(world.items, world.query, 40)
    results = []
    for first_round in (None, ranking):
        estimator = Ridge(world.items, ScoreScale(), world.query, 0.5)
        running = search(estimator, first_round, n_items=40, budget=20, rounds=4)
        assert isinstance(next(running), Score if first_round is not None else Retrieve)
        running.close()
        running = search(estimator, first_round, n_items=40, budget=20, rounds=4)
        results.append(run_search(running, world.score, world.retrieve))
    np.testing.assert_array_equal(results[0].item_index, results[1].item_index)
    np.testing.assert_array_equal(results[0].round, results[1].round)
    with pytest.raises(InputError, match="nothing to start the search from"):
        search(Pinv(world.items, ScoreScale()), None, n_items=40, budget=20, rounds=4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros(2, np.float32), "asked for 2 items and got array"),
        (Retrieved(np.array([8], np.int32), np.zeros(1, np.float32)), "asked for 2 items and got Retrieved"),
        (Retrieved(np.array([8, 8], np.int32), np.zeros(2, np.float32)), "scored before or come twice"),
        (Retrieved(np.array([8, 5], np.int32), np.zeros(2, np.float32)), "scored before or come twice"),
    ],
)
def test_a_wrong_answer_to_retrieve_is_refused(answer, message):
    running = search(Observed(np.ones(2, np.float32)), np.array([5, 0], np.int32), n_items=10, budget=4, rounds=2)
    next(running)
    running.send(np.zeros(2, np.float32))
    with pytest.raises(InputError, match=message):
        running.send(answer)


def test_a_search_that_retrieves_needs_an_index():
    running = search(Observed(np.ones(2, np.float32)), None, n_items=10, budget=4, rounds=2)
    with pytest.raises(InputError, match="wants items from an index"):
        run_search(running, lambda chosen: np.zeros(len(chosen), np.float32))


def test_search_finds_more_than_retrieve_and_rerank():
    rng = np.random.default_rng(0)
    items = rng.standard_normal((3000, 32)).astype(np.float32)
    truth = rng.standard_normal(32).astype(np.float32)
    seen = (truth + 1.5 * rng.standard_normal(32)).astype(np.float32)
    exact = (items @ truth + rng.standard_normal(3000)).astype(np.float32)
    best = set(exact_top_k(exact, 50))
    found = {}
    for rounds in (1, 10):
        first_round = dense_first_round(items, seen, 200)
        running = search(Pinv(items, ScoreScale()), first_round, n_items=3000, budget=200, rounds=rounds)
        result = run_search(running, lambda chosen: exact[chosen], lambda request: ItemIndex(items).retrieve([request])[0])
        found[rounds] = len(best & set(result.item_index))
    assert found[10] > 1.3 * found[1]


@pytest.mark.parametrize(
    ("budget", "rounds", "message"),
    [
        (500, 5, "budget=500 exceeds the 300 items in the index; lower the budget or add items"),
        (10, 11, "rounds=11 exceeds budget=10"),
        (0, 1, "must both be at least 1"),
        (5, 0, "must both be at least 1"),
    ],
)
def test_impossible_budgets_are_refused_before_the_first_round(budget, rounds, message):
    world = World(300, 0)
    with pytest.raises(InputError, match=message):
        search(Pinv(world.items, ScoreScale()), world.first_round, n_items=300, budget=budget, rounds=rounds)


@pytest.mark.parametrize(
    ("first_round", "message"),
    [
        ([0, 1], "ranks 2 items and scores 3"),
        ([0, 1, 20], r"names item 20, which lies outside 0..19"),
        ([-1, 0, 1], r"names item -1, which lies outside 0..19"),
        ([4, 5, 4], "names 1 items twice"),
    ],
)
def test_a_bad_first_round_is_refused(first_round, message):
    world = World(20, 0)
    with pytest.raises(InputError, match=message):
        search(Pinv(world.items, ScoreScale()), np.array(first_round, np.int32), n_items=20, budget=6, rounds=2)


def test_several_rounds_need_an_estimator():
    with pytest.raises(InputError, match="rounds=2 needs an estimator"):
        search(None, np.arange(5, dtype=np.int32), n_items=5, budget=4, rounds=2)


@pytest.mark.parametrize("scores", [[np.inf, 0.0], [-np.inf, 0.0], [np.nan, np.nan]])
def test_a_score_that_is_no_number_names_the_item(scores):
    running = search(None, np.array([3, 7], np.int32), n_items=9, budget=2, rounds=1)
    next(running)
    with pytest.raises(ModelError, match="gave item 3 the score"):
        running.send(np.array(scores, np.float32))


def test_an_item_that_cannot_be_scored_spends_its_call_teaches_nothing_and_is_not_asked_again():
    world = World(200, 3)
    bad = set(range(0, 200, 5))
    asked, observed = [], []

    class Watched(Pinv):
        def observe(self, items, scores):
            observed.extend(items.tolist())
            super().observe(items, scores)

    def score(items):
        asked.extend(items.tolist())
        return np.where(np.isin(items, list(bad)), np.nan, world.score(items)).astype(np.float32)

    running = search(Watched(world.items, ScoreScale()), np.arange(10, dtype=np.int32), n_items=200, budget=60, rounds=6)
    result = run_search(running, score, world.retrieve)
    assert len(asked) == len(set(asked)) == result.n_ce_calls == 60
    assert set(result.item_index.tolist()) == set(asked) - bad
    assert result.n_failed == len(set(asked) & bad) >= 2
    assert set(observed) == set(asked[:50]) - bad


def test_a_later_round_of_which_nothing_can_be_scored_ends_no_search():
    world = World(200, 3)
    asked = []

    def score(items):
        asked.append(items)
        return np.full(len(items), np.nan, np.float32) if len(asked) == 3 else world.score(items)

    running = search(Pinv(world.items, ScoreScale()), np.arange(10, dtype=np.int32), n_items=200, budget=60, rounds=6)
    result = run_search(running, score, world.retrieve)
    assert (result.n_ce_calls, result.n_failed) == (60, 10)
    assert set(result.round[np.argsort(result.round)].tolist()) == {1, 2, 4, 5, 6}


@pytest.mark.parametrize("received", [np.zeros(3, np.float32), np.zeros((2, 1), np.float32), None, Retrieved(None, None)])
def test_a_wrong_number_of_scores_is_refused(received):
    running = search(None, np.array([7, 3], np.int32), n_items=9, budget=2, rounds=1)
    next(running)
    with pytest.raises(InputError, match="received for 2 items"):
        running.send(received)


def test_an_estimator_that_gives_nan_is_refused():
    running = search(Observed(np.array([1, np.nan], np.float32)), np.arange(9, dtype=np.int32), n_items=9, budget=4, rounds=2)
    next(running)
    with pytest.raises(ModelError, match="a query embedding is NaN"):
        running.send(np.zeros(2, np.float32))


def test_an_error_of_the_scoring_function_comes_through():
    def broken(_):
        raise StopIteration

    running = search(None, np.arange(3, dtype=np.int32), n_items=3, budget=3, rounds=1)
    with pytest.raises(StopIteration):
        run_search(running, broken)
