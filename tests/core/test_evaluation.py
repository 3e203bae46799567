from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest

from axn_ray.core.corpus import Items, Queries
from axn_ray.core.evaluation import (
    SCHEMA,
    EvaluationPlan,
    ExactScores,
    Examination,
    evaluate_in_process,
    evaluate_queries,
    exact_label_metrics,
    index_labels,
)
from axn_ray.core.methods import METHODS
from axn_ray.errors import InputError
from tests.examinations import make_examination, small_rounds, untimed


def test_one_row_per_query_method_budget_and_k():
    examination = make_examination()
    table = evaluate_in_process(examination)
    assert table.schema == SCHEMA
    assert table.num_rows == 6 * len(METHODS) * 2 * 3
    keys = table.select(["query_id", "method", "rounds", "budget", "k"]).to_pylist()
    assert len({tuple(key.values()) for key in keys}) == table.num_rows
    assert pc.all(pc.equal(table["ce_calls"], table["budget"])).as_py()
    assert 0.0 <= pc.min(table["recall"]).as_py() < pc.max(table["recall"]).as_py() <= 1.0


def test_recall_is_the_share_of_the_exact_top_k_among_what_was_scored():
    examination = make_examination()
    de, exact = examination.space.embeddings["de"], examination.exact.scores
    rows = [row for row in evaluate_in_process(examination).to_pylist() if row["method"] == "RnR, DE"]
    assert len(rows) == 6 * 2 * 3
    for row in rows:
        found = set(np.argsort(-(de.items @ de.queries[row["query_index"]]))[: row["budget"]])
        best = set(np.argsort(-exact[row["query_index"]])[: row["k"]])
        assert row["recall"] == pytest.approx(len(found & best) / row["k"])


def test_with_the_whole_budget_every_method_is_exact():
    rows = evaluate_in_process(make_examination(budgets=(300,), ks=(1, 300))).to_pylist()
    assert {row["recall"] for row in rows} == {1.0}
    assert {row["accuracy"] for row in rows} == {0.0}  # the labelled item is the CE's second best
    assert {round(row["ndcg_at_10"], 6) for row in rows} == {round(1 / np.log2(3), 6)}


def test_search_beats_retrieve_and_rerank_here():
    table = evaluate_in_process(make_examination(n_queries=8, ks=(10,), budgets=(60,)))
    mean = {row["method"]: row["recall_mean"] for row in table.group_by("method").aggregate([("recall", "mean")]).to_pylist()}
    assert mean["AXN ridge, MF_Ind"] > mean["RnR, MF_Ind"] > mean["RnR, BM25"]


def test_without_labels_the_label_metrics_are_null_and_not_zero():
    table = evaluate_in_process(make_examination(labels=False))
    assert table["accuracy"].null_count == table["ndcg_at_10"].null_count == table.num_rows


def test_queries_are_evaluated_independently():
    examination = make_examination()
    whole = evaluate_in_process(examination).filter(pc.equal(pc.field("query_index"), 3))
    assert untimed(evaluate_queries(examination, [3])).equals(untimed(whole))


def test_what_is_found_are_the_best_k_that_were_scored():
    examination = make_examination()
    de, exact = examination.space.embeddings["de"], examination.exact.scores
    for row in evaluate_in_process(examination).to_pylist():
        scores = exact[row["query_index"]][row["found"]]
        assert len(row["found"]) == min(row["k"], row["budget"]) and (np.diff(scores) <= 0).all()
        assert len(set(row["found"]) & set(np.argsort(-exact[row["query_index"]])[: row["k"]])) == round(row["recall"] * row["k"])
        if row["method"] == "RnR, DE":
            scored = np.argsort(-(de.items @ de.queries[row["query_index"]]))[: row["budget"]]
            best = scored[np.argsort(-exact[row["query_index"]][scored])]
            assert row["found"] == best[: row["k"]].tolist()
        assert row["search_seconds"] > 0


def test_the_exact_ranking_has_the_labels_second():
    assert exact_label_metrics(make_examination()) == {"accuracy": 0.0, "ndcg_at_10": pytest.approx(1 / np.log2(3))}
    assert exact_label_metrics(make_examination(labels=False)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (20, 301)}, "budget=301 exceeds the 300 items in the index; lower the budget or add items"),
        ({"ks": (301,)}, "k=301 exceeds the 300 items"),
        ({"ks": ()}, "ks .. must name at least one"),
        ({"budgets": (20, 20)}, "budgets .20, 20. must name at least one and none twice"),
        ({"budgets": (0, 20)}, "must all be at least 1"),
        ({"budgets": (3,)}, "budget=3 is too small for the 4 rounds"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        make_examination(**change)


def test_parts_that_do_not_fit_are_refused():
    examination = make_examination()
    with pytest.raises(InputError, match="do not cover 6 queries x 300 items"):
        replace(examination, exact=ExactScores(examination.exact.query_ids, examination.exact.scores[:, 1:]))
    with pytest.raises(InputError, match="5 labels for 6 queries"):
        replace(examination, labels=examination.labels[1:])
    with pytest.raises(InputError, match="6 query ids but exact scores of shape"):
        ExactScores(examination.exact.query_ids, examination.exact.scores[1:])
    with pytest.raises(InputError, match="float64; give float32"):
        ExactScores(examination.exact.query_ids, examination.exact.scores.astype(np.float64))


def test_a_method_twice_is_refused():
    with pytest.raises(InputError, match="none twice"):
        EvaluationPlan((*small_rounds(), small_rounds()[0]), (20,), (1,))


def test_labels_become_item_indices():
    items = Items(("a", "b", "c"), ("", "", ""), ("x", "y", "z"))
    labels = index_labels(items, Queries(("q1", "q2"), ("t", "u"), ("c", "a")))
    assert labels.tolist() == [2, 0] and labels.dtype == np.int32
    assert index_labels(items, Queries(("q1",), ("t",))) is None
    with pytest.raises(InputError, match="1 queries have no label .first: 'q2'.; give each one, or drop the column item_id"):
        index_labels(items, Queries(("q1", "q2"), ("t", "u"), ("c", None)))
    with pytest.raises(InputError, match="1 labels are not among the 3 items .first: query 'q2': 'd'."):
        index_labels(items, Queries(("q1", "q2"), ("t", "u"), ("c", "d")))


def test_an_examination_is_whole_or_nothing():
    examination = make_examination()
    with pytest.raises(InputError, match="needs 'mf_ind'"):
        Examination(
            replace(examination.space, embeddings={"de": examination.space.embeddings["de"]}),
            examination.exact,
            examination.plan,
        )
