import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import R

from axn_ray.core.metrics import bootstrap_interval, exact_top_k, label_metrics, recall_at_k
from axn_ray.core.ranking import order_by_score
from axn_ray.errors import InputError


def test_exact_top_k_breaks_ties_by_item_index():
    scores = np.array([0.5, 2.0, 0.5, 2.0, 0.5], dtype=np.float32)
    assert exact_top_k(scores, 4).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(("found", "expected"), [([], 0.0), ([9], 0.0), ([4, 9], 1 / 3), ([2, 4, 1, 9], 1.0), ([1, 2], 2 / 3)])
def test_recall_is_the_share_of_the_exact_top_k(found, expected):
    assert recall_at_k(np.array(found, np.int32), np.array([1, 2, 4], np.int32)) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(1, 30), st.integers(1, 30))
def test_recall_equals_that_of_ir_measures_on_the_best_k_found(seed, budget, k):
    rng = np.random.default_rng(seed)
    exact_scores = rng.integers(0, 8, 40).astype(np.float32)  # many ties
    found = rng.permutation(40)[:budget].astype(np.int32)
    best = found[order_by_score(found, exact_scores[found])][:k]
    exact = exact_top_k(exact_scores, k)
    qrels = {"q": {str(item): 1 for item in exact}}
    run = {"q": {str(item): -float(rank) for rank, item in enumerate(best)}}
    expected = ir_measures.calc_aggregate([R @ k], qrels, run)[R @ k]
    assert recall_at_k(found, exact) == pytest.approx(expected)


def test_label_metrics_are_those_of_the_ranking():
    first, third, late, absent = [7, 1, 2], [1, 2, 7], [*range(10, 20), 7], []
    rankings = [np.array(ranking, np.int32) for ranking in (first, third, late, absent)]
    values = label_metrics(rankings, label=7)
    assert values == [(1.0, 1.0), (0.0, pytest.approx(0.5)), (0.0, 0.0), (0.0, 0.0)]


def test_label_metrics_keep_our_order_among_equal_scores():
    assert label_metrics([np.array([3, 30, 4], np.int32)], label=3) == [(1.0, 1.0)]


def test_the_interval_holds_the_mean_and_is_reproducible():
    values = np.random.default_rng(1).random(80)
    low, high = bootstrap_interval(values, np.random.default_rng(0))
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(80), rel=0.1)
    assert bootstrap_interval(values, np.random.default_rng(0)) == (low, high)


def test_the_interval_of_a_constant_has_no_width():
    assert bootstrap_interval(np.ones(5), np.random.default_rng(0)) == (1.0, 1.0)


@pytest.mark.parametrize("values", [[0.5], [0.5, np.nan, 1.0]])
def test_too_few_values_or_nan_are_refused(values):
    with pytest.raises(InputError, match="give no interval"):
        bootstrap_interval(np.array(values), np.random.default_rng(0))
