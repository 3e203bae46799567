import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core.adaptive import run_search, search
from axn_ray.core.estimators import Pinv, Ridge
from axn_ray.core.index import ItemIndex, Retrieve, Retrieved
from axn_ray.core.metrics import exact_top_k, recall_at_k
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.core.stopping import HEAD, Calibration, Stop, forecast_recall
from axn_ray.errors import InputError

HONEST = Calibration()  # takes the forecast as it is


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_forecast_is_the_share_of_the_top_k_that_simulated_scores_leave_among_the_scored(k):
    rng = np.random.default_rng(k)
    scores, means, deviations = rng.normal(1, 1, 30), rng.normal(0, 1, 200), rng.uniform(0.1, 1.0, 200)
    recalls = []
    for _ in range(4000):
        every = np.concatenate([scores, rng.normal(means, deviations)])
        recalls.append(np.mean(np.argpartition(-every, k)[:k] < 30))
    # The threshold is where the expected count is k, not the expectation over thresholds: close, and a little low.
    assert forecast_recall(scores, means, deviations, k) == pytest.approx(np.mean(recalls), abs=0.12 if k == 1 else 0.05)


@settings(deadline=None)
@given(k=st.integers(1, 8), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_without_doubt_the_forecast_is_the_recall(k, n, seed):
    rng = np.random.default_rng(seed)
    every = rng.permutation(60 + n).astype(float)  # no ties
    scores, means = every[:60], every[60:]
    expected = np.mean(np.argsort(-every)[:k] < 60)
    assert forecast_recall(scores, means, np.full(n, 1e-9), k) == pytest.approx(expected, abs=1e-6)


def test_more_doubt_or_higher_unscored_items_lower_the_forecast():
    scores, means = np.linspace(0, 3, 50), np.linspace(-1, 1.5, 100)
    by_doubt = [forecast_recall(scores, means, np.full(100, sd), 10) for sd in (0.1, 0.5, 1.0, 2.0)]
    by_mean = [forecast_recall(scores, means + shift, np.full(100, 0.5), 10) for shift in (-5, 0, 1, 2, 10)]
    assert by_doubt == sorted(by_doubt, reverse=True) and by_mean == sorted(by_mean, reverse=True)
    assert by_mean[0] == pytest.approx(1.0, abs=1e-9) and by_mean[-1] == 0.0


def test_a_calibration_finds_the_line_that_made_the_recalls():
    rng = np.random.default_rng(0)
    forecast = rng.uniform(0.02, 0.98, 4000)
    achieved = 1 / (1 + np.exp(-(0.4 + 0.3 * np.log(forecast / (1 - forecast)))))
    fitted = Calibration.fit(forecast, achieved)
    assert (fitted.offset, fitted.slope) == (pytest.approx(0.4, abs=1e-3), pytest.approx(0.3, abs=1e-3))
    assert fitted.apply(float(forecast[7])) == pytest.approx(achieved[7], abs=1e-3)
    of_counts = Calibration.fit(forecast, rng.binomial(10, achieved) / 10)
    assert of_counts.apply(0.9) == pytest.approx(fitted.apply(0.9), abs=0.02)
    assert HONEST.apply(0.8) == pytest.approx(0.8)
    assert 0.0 < HONEST.apply(0.0) < HONEST.apply(1.0) < 1.0


@pytest.mark.parametrize(
    ("forecast", "achieved", "message"),
    [([], [], "at least one"), ([0.5], [0.5, 0.5], "one for each"), ([0.5], [5.0], "must lie in 0..1")],
)
def test_a_calibration_refuses_what_is_no_recall(forecast, achieved, message):
    with pytest.raises(InputError, match=message):
        Calibration.fit(np.array(forecast), np.array(achieved))


class World:
    """Queries and their scores, drawn from the very model that `Ridge` assumes."""

    def __init__(self, n_items=1500, n_queries=40, dim=12, noise_variance=0.02, seed=0):
        rng = np.random.default_rng(seed)
        self.items = rng.standard_normal((n_items, dim)).astype(np.float32) / np.float32(np.sqrt(dim))
        self.prior = rng.standard_normal((n_queries, dim)).astype(np.float32)
        noise = np.sqrt(noise_variance) * rng.standard_normal((n_queries, n_items))
        self.exact = ((self.prior + rng.standard_normal((n_queries, dim))) @ self.items.T + noise).astype(np.float32)
        self.noise_variance, self.index = noise_variance, ItemIndex(self.items)

    def search(self, query, stop, budget=200, rounds=20):
        ridge = Ridge(self.items, ScoreScale(), self.prior[query], self.noise_variance)
        running = search(ridge, None, n_items=len(self.items), budget=budget, rounds=rounds, stop=stop)
        result = run_search(running, lambda chosen: self.exact[query][chosen], lambda request: self.index.retrieve([request])[0])
        return result.n_ce_calls, recall_at_k(result.item_index, exact_top_k(self.exact[query], 10)), result


def test_a_search_in_the_models_own_world_reaches_its_target_with_fewer_calls():
    world = World()
    calls, recalls = {}, {}
    for target in (0.5, 0.9):
        found = [world.search(query, Stop(target, 10, HONEST)) for query in range(40)]
        calls[target], recalls[target] = np.mean([one[0] for one in found]), np.mean([one[1] for one in found])
    assert 20 <= calls[0.5] < calls[0.9] < 0.7 * 200
    assert recalls[0.5] >= 0.5 and recalls[0.9] >= 0.88


def test_a_stopped_search_is_the_head_of_the_one_that_goes_on():
    world = World()
    whole = world.search(3, None)[2]
    n, _, stopped = world.search(3, Stop(0.6, 10, HONEST))
    assert 10 <= n < whole.n_ce_calls == 200 and n % 10 == 0
    assert {*zip(stopped.item_index, stopped.round, strict=True)} <= {*zip(whole.item_index, whole.round, strict=True)}
    assert stopped.round.max() == n // 10


def test_a_target_out_of_reach_spends_the_budget_and_no_more():
    world = World(noise_variance=2.0)
    assert world.search(0, Stop(0.999999, 10), budget=60, rounds=6)[0] == 60


def test_the_head_it_looks_at_never_exceeds_what_is_left():
    ridge = Ridge(np.eye(30, dtype=np.float32), ScoreScale(), np.zeros(30, np.float32), 0.1)
    running = search(ridge, np.arange(30, dtype=np.int32), n_items=30, budget=8, rounds=2, stop=Stop(0.999, 2))
    next(running)
    request = running.send(np.zeros(4, np.float32))
    assert isinstance(request, Retrieve) and request.n == 26 < HEAD
    reply = Retrieved(np.arange(4, 30, dtype=np.int32), np.zeros(26, np.float32))
    assert running.send(reply).item_index.tolist() == [4, 5, 6, 7]


def test_a_stop_before_k_scores_is_none():
    world = World(n_items=50, noise_variance=1e-6)
    assert world.search(0, Stop(0.01, 10, HONEST), budget=40, rounds=8)[0] >= 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stop(1.0, 10), "target_recall=1.0 must lie between 0 and 1"),
        (lambda: Stop(0.0, 10), "must lie between 0 and 1"),
        (lambda: Stop(0.9, 0), "k=0 must be at least 1"),
    ],
)
def test_stops_that_cannot_be_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_stop_needs_a_posterior_and_a_budget_of_k():
    world, ranking = World(n_items=50), np.arange(50, dtype=np.int32)
    with pytest.raises(InputError, match="needs an estimator that knows its own error"):
        search(Pinv(world.items, ScoreScale()), ranking, n_items=50, budget=20, rounds=4, stop=Stop(0.9, 10))
    ridge = Ridge(world.items, ScoreScale(), world.prior[0], 0.1)
    with pytest.raises(InputError, match="at k=10 needs k scores, budget=8"):
        search(ridge, None, n_items=50, budget=8, rounds=4, stop=Stop(0.9, 10))
