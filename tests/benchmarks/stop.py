"""`make bench-stop`: does a search that names its recall reach it? Calibrated on dev queries, checked on test queries.

On the verb world of `make bench-recall SECTIONS=verbs` (its embeddings, dev truth and `bayes` fit), no CE call. Rounds of 20
items, at most 500. Per k and target: recall reached, calls spent, and the recall of as many calls for every query.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from axn_ray import sample
from axn_ray.core.adaptive import run_search, search
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.factorization import load_factorization
from axn_ray.core.index import ItemIndex
from axn_ray.core.methods import METHODS
from axn_ray.core.metrics import exact_top_k
from axn_ray.core.score_store import load_scores
from axn_ray.core.search_space import build_estimator
from axn_ray.core.stopping import SAMPLE, Calibration, Stop
from tests.benchmarks.common import record

VERBS = Path("runs/bench-recall/verbs")
KS, TARGETS = (1, 10, 100), (0.6, 0.7, 0.8, 0.9)
BUDGET, ROUNDS = 500, 25
SHARES = np.arange(1, ROUNDS + 1) * (BUDGET // ROUNDS)


class Watch(Stop):
    """Never stops; keeps the forecasts of every k before each round."""

    def is_reached(self, posterior, scores, head, approx_scores):
        if not len(scores):
            return False
        made = [replace(self, k=k) for k in KS]
        self.seen.append(
            [stop.forecast(posterior, scores, head, approx_scores) if len(scores) >= stop.k else 0.0 for stop in made]
        )
        return False


def watch(folder, truth):
    """Forecasts before rounds 2.. and recalls then, each (queries, rounds - 1, ks), recalls after the last round last."""
    corpus, fitted, scores = load_embedded_corpus(folder / "embeddings"), load_factorization(folder / "bayes"), load_scores(truth)
    rows = [corpus.queries.index_of[name] for name in scores.query_ids]
    prior = fitted.embed_queries(corpus.query_embeddings[rows])
    items, method, forecasts, recalls = fitted.item_embeddings, METHODS["axn_bayes"], [], []
    index, exact = ItemIndex(items), scores.dense()
    for row, query, truth_row in zip(rows, prior, exact, strict=True):
        stop = Watch(0.5, max(KS), SAMPLE)
        object.__setattr__(stop, "seen", [])
        offset = fitted.offset(corpus.queries.texts[row])
        known = fitted.noise_variance, offset, fitted.prior_variance
        ridge = build_estimator(method, items, fitted.scale, query, *known)
        running = search(ridge, None, n_items=len(items), budget=BUDGET, rounds=ROUNDS, stop=stop)
        result = run_search(running, truth_row.__getitem__, lambda request: index.retrieve([request])[0])
        forecasts.append([*stop.seen, [0.0] * len(KS)])
        found_in = dict(zip(result.item_index.tolist(), result.round.tolist(), strict=True))
        best = exact_top_k(truth_row, max(KS)).tolist()
        when = np.array([found_in.get(item, ROUNDS + 1) for item in best])
        recalls.append([[np.mean(when[:k] <= done) for k in KS] for done in range(1, ROUNDS + 1)])
    return np.array(forecasts), np.array(recalls)


def fit(forecasts, recalls):
    """One calibration for all k, over the rounds in which it may stop."""
    pairs = [(forecasts[:, SHARES >= max(k, 40), at], recalls[:, SHARES >= max(k, 40), at]) for at, k in enumerate(KS)]
    forecast, achieved = (np.concatenate([part[side][:, :-1].ravel() for part in pairs]) for side in (0, 1))
    return Calibration.fit(forecast, achieved, SAMPLE.shrinkage)


def stated_and_reached(calibration, forecasts, recalls, half):
    """A row per k and target."""
    rows = []
    for at, k in enumerate(KS):
        expected = np.vectorize(calibration.apply)(forecasts[:, :, at])
        for target in TARGETS:
            may = (expected >= target) & (SHARES >= k)
            may[:, -1] = True
            stops = may.argmax(axis=1)
            reached, calls = recalls[np.arange(len(stops)), stops, at], SHARES[stops]
            fixed = np.interp(calls.mean(), SHARES, recalls[:, :, at].mean(axis=0))
            values = {"reached": reached.mean(), "error": reached.std() / len(stops) ** 0.5, "same_calls_for_all": fixed}
            row = {"queries": half, "k": k, "target": target, "calls": round(float(calls.mean()), 1)}
            rows.append(row | {name: round(float(value), 4) for name, value in values.items()})
    return rows


def main():
    """Watch both kinds of queries, fit on dev, judge on test."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else VERBS
    dev, test = watch(folder, folder / "dev_truth"), watch(folder, sample.EXACT_SCORES)
    calibration = fit(*dev)
    rows = stated_and_reached(calibration, *dev, "dev") + stated_and_reached(calibration, *test, "test")
    at = next(row for row in rows if (row["queries"], row["k"], row["target"]) == ("test", 10, 0.8))
    figures = {"offset": round(calibration.offset, 3), "slope": round(calibration.slope, 3), "rows": rows}
    record("stop", figures, test_at10_target=0.8, reached=at["reached"], calls=at["calls"], fixed=at["same_calls_for_all"])


if __name__ == "__main__":
    main()
