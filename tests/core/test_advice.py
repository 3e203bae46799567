import pytest

from axn_ray.core.advice import AdviceConfig, advise
from axn_ray.errors import InputError

COUNTS = {"items": 1000, "exact_accuracy": 0.3}


def row(method, budget, recall, *, rounds=1, index=0, accuracy=0.3, calls=None, width=0.05):
    return {
        "method": method,
        "rounds": rounds,
        "budget": budget,
        "k": 10,
        "ce_calls": float(calls or budget),
        "index_ce_calls": index,
        "recall": recall,
        "recall_low": recall - width,
        "recall_high": recall + width,
        "accuracy": accuracy,
    }


SUMMARY = [
    row("RnR, DE", 100, 0.5),
    row("RnR, DE", 500, 0.9),
    row("AXN bayes", 100, 0.88, rounds=10, index=200_000),
    row("AXN bayes", 500, 0.97, rounds=10, index=200_000),
]


def test_the_cheapest_that_reaches_the_recall_is_named_with_its_cost():
    first, second, labels = advise(SUMMARY, COUNTS, AdviceConfig(recall=0.8, queries=100_000))
    assert first == (
        "To find 80 % of the exact top 10, take AXN bayes with B=100 in 10 rounds: it finds 88.0 % (83–93) for 100 CE calls "
        "a query (200,000 for the index, 2.0 a query over 100,000 queries)."
    )
    # 100 + 2 calls in the place of 500.
    assert second == (
        "Retrieve-and-rerank gets there with RnR, DE with B=500: the adaptive search saves 80 % of all calls over "
        "100,000 queries."
    )
    assert labels.endswith("AXN bayes with B=100 in 10 rounds for 30 %: by the labels more CE calls gain little.")


def test_few_queries_do_not_pay_for_an_index():
    sentences = advise(SUMMARY, COUNTS, AdviceConfig(recall=0.8, queries=400))  # 500 calls against 100 + 500
    assert sentences[0].startswith("To find 80 % of the exact top 10, take RnR, DE with B=500: it finds 90.0 %")
    assert "(none offline)" in sentences[0]
    assert sentences[1].startswith("Plain retrieve-and-rerank is enough here")


def test_an_interval_that_reaches_below_is_told():
    sentences = advise(SUMMARY, COUNTS, AdviceConfig(recall=0.85))
    assert sentences[1] == (
        "Its 95 % interval reaches down to 83 %; the cheapest whose whole interval lies above is RnR, DE with B=500, which "
        "finds 90.0 % (85–95)."
    )
    sentences = advise(SUMMARY, COUNTS, AdviceConfig(recall=0.95))
    assert "no row lies above 95 % with its whole interval; evaluate more queries" in sentences[1]
    assert sentences[2] == (
        "Retrieve-and-rerank gets there with no budget that was evaluated: 90.0 % (85–95) is its best, with RnR, DE with B=500."
    )


def test_a_recall_out_of_reach_is_said_to_be():
    sentences = advise(SUMMARY, COUNTS, AdviceConfig(recall=0.99))
    none = "No method that was evaluated finds 99 % of the exact top 10: 97.0 % is the most, with AXN bayes with B=500"
    assert sentences[0].startswith(none)


def test_calls_that_a_search_did_not_spend_are_not_paid_for():
    stopping = row("AXN bayes, adaptive stop", 500, 0.9, rounds=10, index=200_000, calls=60)
    first = advise([*SUMMARY, stopping], COUNTS, AdviceConfig(recall=0.8))[0]
    assert "AXN bayes, adaptive stop with B=500 in 10 rounds" in first and "for 60 CE calls a query" in first


def test_labels_that_the_cross_encoder_contradicts_are_told():
    disagreeing = [row("RnR, DE", 100, 0.9, accuracy=0.41), row("AXN bayes", 100, 0.95, rounds=10, accuracy=0.3)]
    assert advise(disagreeing, COUNTS, AdviceConfig())[-1] == (
        "The CE itself, over all 1,000 items, puts the labelled item first for 30 % of the queries, and RnR, DE with B=100 does "
        "so for 41 %: on these data the CE disagrees with the labels, and a closer copy of it answers no better."
    )
    poor = [row("RnR, DE", 100, 0.9, accuracy=0.1)]
    assert advise(poor, COUNTS, AdviceConfig())[-1].endswith("a larger budget would still answer better.")
    assert len(advise(poor, {"items": 1000}, AdviceConfig())) == 2


def test_a_k_that_was_not_evaluated_is_refused():
    with pytest.raises(InputError, match="k=5 was not evaluated, only 10; name one of these or evaluate again"):
        advise(SUMMARY, COUNTS, AdviceConfig(k=5))
    with pytest.raises(InputError, match="of no method is it known what its index cost in CE calls"):
        advise([row("MF_Ind", 100, 0.9, index=None)], COUNTS, AdviceConfig())


def test_the_truths_speed_becomes_seconds():
    first = advise(SUMMARY, {**COUNTS, "ce_calls_per_second": 1000.0}, AdviceConfig())[0]
    assert "for 100 CE calls a query, about 0.10 s on one worker as the truth was scored (" in first
