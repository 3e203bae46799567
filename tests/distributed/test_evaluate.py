import numpy as np
import pytest
from pydantic import ValidationError

from axn_ray.core.evaluation import evaluate_in_process
from axn_ray.core.methods import METHODS
from axn_ray.distributed.evaluate import EvaluateConfig, evaluate
from axn_ray.errors import InputError
from tests.examinations import make_examination, untimed


@pytest.mark.parametrize(("workers", "shard_queries"), [(2, 2), (1, 100)])
def test_ray_gives_the_rows_of_one_process(ray_session, workers, shard_queries):
    examination = make_examination(n_queries=7)
    table = evaluate(examination, workers=workers, shard_queries=shard_queries)
    assert untimed(table).equals(untimed(evaluate_in_process(examination)))


def test_without_labels_the_columns_stay_null(ray_session):
    examination = make_examination(n_queries=3, labels=False, budgets=(20,), ks=(5,))
    table = evaluate(examination, workers=1)
    assert table["accuracy"].null_count == table.num_rows == 3 * len(METHODS)


def test_an_error_on_a_worker_is_raised(ray_session):
    examination = make_examination(n_queries=3, budgets=(300,), ks=(1,))
    examination.exact.scores[1, 5] = np.nan
    with pytest.raises(Exception, match="score of item 5 is NaN"):
        evaluate(examination, workers=1)


def test_the_config_makes_the_plan():
    config = EvaluateConfig(methods=["rnr_de", "axn_ridge_mf_ind"], rounds=[5, 10], budgets=[50], k=[1, 10])
    plan = config.plan(["de", "mf_ind"])
    assert [(method.name, method.rounds) for method in plan.methods] == [
        ("RnR, DE", 1),
        ("AXN ridge, MF_Ind", 5),
        ("AXN ridge, MF_Ind", 10),
    ]
    assert (plan.budgets, plan.ks, plan.rows_per_query) == ((50,), (1, 10), 6)


def test_without_named_methods_all_that_are_possible_are_compared():
    named = {method.name for method in EvaluateConfig().plan(["de"]).methods}
    assert named == {"RnR, DE", "RnR, BM25", "AXN pinv, DE", "GAR, DE", "LADR, DE", "TouR, DE"}


def test_the_baseline_takes_part_with_its_last_number_of_rounds():
    config = EvaluateConfig(methods=["axn_ridge_mf_ind"], budgets=[50])
    assert [method.name for method in config.plan(["de", "mf_ind"]).methods] == ["RnR, DE", "AXN ridge, MF_Ind"]
    assert config.find_baseline() == ("RnR, DE", 1)
    config = EvaluateConfig(methods=["rnr_de", "axn_ridge_mf_ind"], rounds=[5, 10], baseline="axn_ridge_mf_ind")
    assert config.find_baseline() == ("AXN ridge, MF_Ind", 10)


def test_methods_with_a_posterior_stop_at_each_target():
    config = EvaluateConfig(methods=["rnr_de", "axn_bayes"], budgets=[50], target_recall=[0.8, 0.9], baseline="axn_bayes")
    plan = config.plan(["de", "bayes"])
    assert [(method.name, method.target_recall, method.k) for method in plan.methods] == [
        ("RnR, DE", None, 10),
        ("AXN bayes", None, 10),
        ("AXN bayes, stop at 80%", 0.8, 10),
        ("AXN bayes, stop at 90%", 0.9, 10),
    ]
    assert config.find_baseline() == ("AXN bayes", 10)
    assert EvaluateConfig(k=[1, 5], target_recall=[0.8], methods=["axn_bayes"]).plan(["bayes"]).methods[-1].k == 5


def test_a_bad_config_is_refused():
    with pytest.raises(InputError, match="method 'bm26' is not known"):
        EvaluateConfig(methods=["bm26"]).plan(["de"])
    with pytest.raises(ValidationError):
        EvaluateConfig(workers=0)
