"""`make bench-sampling`: which train pairs deserve a CE call? Ways to choose them, at equal calls, on the verb world.

2000 train queries, 50 calls each (`per_item`: 7 queries of each item, 3.6 % fewer calls), then the closed-form fit and ten
rounds of search. The test queries are split: the better way is chosen on the first half, and judged on the second.
Pairs that an earlier benchmark has paid for are looked up.
"""

import time
from pathlib import Path

import numpy as np

from axn_ray import sample
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks.common import read_rows, record

OUT = Path("runs/bench-sampling")
PAID = [Path("runs/bench-recall/scores")]
TRAIN_QUERIES, PER_QUERY, PER_ITEM = 2000, 50, 7
WAYS = {
    "nearest": {},
    "nearest_random": {"random_share": 0.1},
    "active": {"active_share": 0.5},
    "active_random": {"active_share": 0.3, "random_share": 0.1},
    "random": {"random_share": 1.0},
    "per_item": {"choice": "per_item", "per_item": PER_ITEM},
}


def main():
    """Score, fit and search with each way; a row per way, half, budget and k."""
    join_cluster()
    corpus = embed(EmbedConfig(world=["verb"], train_queries=TRAIN_QUERIES), OUT / "embeddings")
    rows, runs = [], {}
    for way, settings in WAYS.items():
        start = time.monotonic()
        paid = [*PAID, *(OUT / done / "scores" for done in runs)]
        known = [str(path) for path in paid if (path / "manifest.json").exists()]
        config = ScoreConfig(per_query=PER_QUERY, known_scores=known, **settings)
        sealed = score(corpus, config, OUT / way / "scores")
        fit = FactorizationConfig(method="bayes", epochs=6)
        factorize_scores(OUT / "embeddings", OUT / way / "scores", fit, OUT / way / "bayes")
        plan = EvaluateConfig(budgets=[100, 500], rounds=[10], methods=["axn_bayes"])
        examine(plan, OUT / "embeddings", sample.EXACT_SCORES, {"bayes": OUT / way / "bayes"}, OUT / way / "evaluation")
        runs[way] = {"pairs": sealed.counts["pairs"], "known": sealed.counts["known"], "seconds": round(time.monotonic() - start)}
        rows += halves(way, read_rows(OUT / way / "evaluation"))
    chosen = max(WAYS, key=lambda way: mean_at(rows, way, "choose", 10))
    gain = difference(rows, chosen)
    record(
        "sampling",
        {"runs": runs, "rows": [{k: v for k, v in row.items() if k != "recalls"} for row in rows], "gain_over_nearest": gain},
        chosen=chosen,
        chosen_at10_b100=round(100 * mean_at(rows, chosen, "judge", 10), 1),
        nearest_at10_b100=round(100 * mean_at(rows, "nearest", "judge", 10), 1),
    )


def halves(way, table):
    """Mean recall of each half of the queries at each budget and k, with the recalls themselves for the differences."""
    found = []
    query = table["query_index"].to_numpy()
    middle = (query.max() + 1) // 2
    for half, inside in {"choose": query < middle, "judge": query >= middle}.items():
        for budget in (100, 500):
            for k in (1, 10, 100):
                at = inside & (table["budget"].to_numpy() == budget) & (table["k"].to_numpy() == k)
                recalls = table["recall"].to_numpy()[at]
                mean = float(recalls.mean())
                found.append({"way": way, "half": half, "budget": budget, "k": k, "recall": round(mean, 4), "recalls": recalls})
    return found


def row_of(rows, way, half, k, budget=100):
    return next(r for r in rows if (r["way"], r["half"], r["k"], r["budget"]) == (way, half, k, budget))


def mean_at(rows, way, half, k):
    return row_of(rows, way, half, k)["recall"]


def difference(rows, chosen):
    """Gain of the chosen way over `nearest` on the judging half, with a paired 95 % bootstrap interval over queries."""
    gains = []
    rng = np.random.default_rng(0)
    for budget in (100, 500):
        for k in (1, 10, 100):
            paired = row_of(rows, chosen, "judge", k, budget)["recalls"] - row_of(rows, "nearest", "judge", k, budget)["recalls"]
            drawn = rng.choice(paired, (2000, len(paired))).mean(axis=1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            values = {"gain": paired.mean(), "low": low, "high": high}
            gains.append({"budget": budget, "k": k, **{name: round(float(value), 4) for name, value in values.items()}})
    return gains


if __name__ == "__main__":
    main()
