import json

import numpy as np
import pytest
import scipy.stats

from axn_ray.core.comparison import calls_to_reach, list_methods, per_query, summarize
from axn_ray.core.evaluation import evaluate_in_process
from axn_ray.core.methods import METHODS
from axn_ray.core.metrics import permutation_p_value
from axn_ray.errors import InputError
from tests.examinations import make_examination, small_rounds


@pytest.fixture(scope="module")
def table():
    return evaluate_in_process(make_examination(budgets=(20, 60), ks=(1, 10)))


@pytest.fixture(scope="module")
def summary(table):
    return summarize(table)


def test_the_summary_is_the_mean_over_all_queries_with_bounds(table, summary):
    assert len(summary) == len(METHODS) * 2 * 2
    assert json.loads(json.dumps(summary)) == summary
    row = next(r for r in summary if (r["method"], r["budget"], r["k"]) == ("RnR, DE", 60, 10))
    values = [r["recall"] for r in table.to_pylist() if (r["method"], r["budget"], r["k"]) == ("RnR, DE", 60, 10)]
    assert row["n_queries"] == len(values) == 6
    assert row["recall"] == pytest.approx(np.mean(values))
    assert row["recall_low"] < row["recall"] < row["recall_high"]
    assert row["ce_calls"] == 60
    assert {"accuracy", "accuracy_low", "ndcg_at_10", "ndcg_at_10_high"} <= row.keys()


def test_the_summary_keeps_the_plans_order_and_is_reproducible(table, summary):
    methods = list(dict.fromkeys(row["method"] for row in summary))
    assert methods == [method.name for method in small_rounds()]
    assert summarize(table) == summary


def test_without_labels_only_recall_is_reported():
    rows = summarize(evaluate_in_process(make_examination(labels=False, budgets=(20,), ks=(10,))))
    assert "recall" in rows[0] and "accuracy" not in rows[0]


def test_gains_are_paired_and_tested_against_the_baseline(table):
    rows = summarize(table, baseline=("RnR, DE", 1))
    recalls = per_query(table, "recall")
    for row in rows:
        at = row["budget"], row["k"]
        ours, theirs = recalls[row["method"], row["rounds"], *at], recalls["RnR, DE", 1, *at]
        assert row["gain"] == pytest.approx((ours - theirs).mean())
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        # Six queries have 2^6 sign patterns: scipy tries them all, and so does the twin.
        signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
        means = ((ours - theirs) @ signs) / 6
        assert row["p_value"] == pytest.approx(min(1.0, 2 * np.mean(means >= abs(row["gain"]) - 1e-12)))
    same = [row for row in rows if row["method"] == "RnR, DE"]
    assert {(row["gain"], row["p_value"]) for row in same} == {(0.0, 1.0)}


def test_the_p_value_of_many_queries_is_close_to_the_t_tests():
    rng = np.random.default_rng(0)
    values = rng.random(100)
    others = values - 0.02 + 0.1 * rng.standard_normal(100)
    p_value = permutation_p_value(values, others, np.random.default_rng(1))
    assert p_value == pytest.approx(scipy.stats.ttest_rel(values, others).pvalue, abs=0.02)
    assert permutation_p_value(values, others, np.random.default_rng(1)) == p_value


def test_a_baseline_that_was_not_evaluated_is_refused(table):
    with pytest.raises(InputError, match="baseline 'RnR, DE' with 7 rounds was not evaluated"):
        summarize(table, baseline=("RnR, DE", 7))


def test_calls_to_reach_a_recall_lie_on_the_line_between_budgets():
    points = [(50, 0.4), (100, 0.6), (200, 0.55), (400, 0.9)]
    summary = [{"method": "M", "rounds": 5, "budget": b, "k": 10, "ce_calls": float(b), "recall": r} for b, r in points]
    expected = {0.4: 50, 0.5: 75, 0.6: 100, 0.75: 300, 0.9: 400, 0.2: 25}
    for recall, calls in expected.items():
        assert calls_to_reach(summary, ("M", 5), 10, recall) == pytest.approx(calls)
    assert calls_to_reach(summary, ("M", 5), 10, 0.91) is None
    assert list_methods(summary) == [("M", 5)]
