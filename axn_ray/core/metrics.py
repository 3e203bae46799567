"""The examiner's measures: how much of the exact CE top-k was found, and how good it is by human labels.

Knows no search. Label metrics come from ir_measures, intervals from scipy.
"""

from collections.abc import Sequence

import ir_measures
import numpy as np
import numpy.typing as npt
from ir_measures import Success, nDCG

from axn_ray.core.ranking import top_items
from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

RESAMPLES = 2000
LABEL_CUTOFF = 10


def exact_top_k(exact_scores: FloatArray, k: int) -> Int32Array:
    """The truth of one query: its k best items by CE score, ties by item index: (n_items,) -> (k,), best first.

    Raises:
        InputError: k outside 1..n_items.
        ModelError: a score is NaN.
    """
    return top_items(exact_scores, k)


def recall_at_k(found: Int32Array, exact: Int32Array) -> float:
    """`|found ∩ exact| / k` of one query: all items that were scored (n,), exact top-k (k,). Nothing found is 0.

    Scored items that belong to the exact top-k are always among the best k scored, so no cut-off of `found` is needed.
    """
    return float(np.isin(exact, found).mean())


def label_metrics(rankings: Sequence[Int32Array], label: int) -> list[tuple[float, float]]:
    """(accuracy, nDCG@10) of each ranking (n,), best first, for one query whose labelled item is `label`.

    Accuracy is 1 where the labelled item stands first among what was scored (ir_measures' Success@1).
    """
    accuracy, ndcg = Success @ 1, nDCG @ LABEL_CUTOFF
    qrels = {str(number): {str(label): 1} for number in range(len(rankings))}
    # Ranks as scores: trec_eval would break ties between equal CE scores by its own rule.
    run = {
        str(number): {str(item): -float(rank) for rank, item in enumerate(ranking[:LABEL_CUTOFF])}
        for number, ranking in enumerate(rankings)
    }
    values = {(m.query_id, m.measure): float(m.value) for m in ir_measures.iter_calc([accuracy, ndcg], qrels, run)}
    return [(values[number, accuracy], values[number, ndcg]) for number in qrels]


def bootstrap_interval(
    values: npt.NDArray[np.float64], rng: np.random.Generator, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries: (n_queries,) -> (low, high).

    For the gain of one method over another give the difference of their values query by query (paired bootstrap).

    Raises:
        InputError: fewer than two queries, or a NaN among the values.
    """
    import scipy.stats  # a second to import, and most processes need none

    if len(values) < 2 or np.isnan(values).any():
        n_nan = int(np.isnan(values).sum())
        raise InputError(f"{len(values)} values with {n_nan} NaN give no interval; evaluate two or more queries, none dropped")
    interval = scipy.stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(values)),
        confidence_level=confidence,
        rng=rng,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def permutation_p_value(values: npt.NDArray[np.float64], others: npt.NDArray[np.float64], rng: np.random.Generator) -> float:
    """Two-sided p-value of the difference of two means over the same queries, (n_queries,) each, by swapping pairs."""
    import scipy.stats

    tested = scipy.stats.permutation_test(
        (values, others),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(values)),
        rng=rng,
    )
    return float(tested.pvalue)
