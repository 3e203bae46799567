"""`make bench-sampling`: which train pairs deserve a CE call? Six ways to choose them, at equal calls, on the verb world.

2000 train queries, 50 calls each (`per_item`: 7 queries of each item, 3.6 % fewer calls), then the closed-form fit and ten
rounds of search for the 50 dev queries, whose exact scores are made here. No test query is looked at. Pairs that an earlier
way or `make bench-recall` has paid for are looked up; scores are kept in runs/bench-sampling: a run that was cut off goes on.
"""

import time
from pathlib import Path

import numpy as np

from axn_ray.core.fitting import FactorizationConfig
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks.common import read_rows, record

OUT = Path("runs/bench-sampling")
PAID = [Path("runs/bench-recall/verbs") / name for name in ("g_near", "g_mix", "dev_truth")]
TRAIN_QUERIES, PER_QUERY, PER_ITEM = 2000, 50, 7
BUDGETS, KS = (100, 500), (1, 10, 100)
WAYS = {
    "nearest": {"active_share": 0.0, "random_share": 0.0},
    "nearest_random": {"active_share": 0.0, "random_share": 0.1},
    "active": {"active_share": 0.5, "random_share": 0.0},
    "active_random": {"active_share": 0.3, "random_share": 0.1},
    "random": {"active_share": 0.0, "random_share": 1.0},
    "per_item": {"choice": "per_item", "per_item": PER_ITEM},
}


def main():
    """Score, fit and search with each way; a row per way, budget and k."""
    join_cluster()
    corpus = embed(EmbedConfig(world=["verb"], train_queries=TRAIN_QUERIES), OUT / "embeddings")
    score(corpus, ScoreConfig(split="dev", choice="all", known_scores=find_known({})), OUT / "truth")
    recalls, runs = {}, {}
    for way, settings in WAYS.items():
        start, known = time.monotonic(), find_known(runs)
        sealed = score(corpus, ScoreConfig(per_query=PER_QUERY, known_scores=known, **settings), OUT / way / "scores")
        factorize_scores(OUT / "embeddings", OUT / way / "scores", FactorizationConfig(), OUT / way / "bayes")
        plan = EvaluateConfig(choose=True, budgets=[*BUDGETS], rounds=[10], methods=["axn_bayes"])
        examine(plan, OUT / "embeddings", OUT / "truth", {"bayes": OUT / way / "bayes"}, OUT / way / "evaluation")
        runs[way] = {"pairs": sealed.counts["pairs"], "known": sealed.counts["known"], "seconds": round(time.monotonic() - start)}
        recalls[way] = read_recalls(read_rows(OUT / way / "evaluation"))
    rows = [describe(way, cell, found, recalls["nearest"][cell]) for way in WAYS for cell, found in recalls[way].items()]
    mean = {way: float(np.mean([found.mean() for found in recalls[way].values()])) for way in WAYS}
    chosen = max(WAYS, key=mean.__getitem__)
    headline = {f"{way}_at10_b100": round(100 * float(recalls[way][100, 10].mean()), 1) for way in WAYS}
    record("sampling", {"runs": runs, "mean_recall": mean, "rows": rows}, chosen=chosen, **headline)


def find_known(ways):
    """Scores that are there already: of `make bench-recall` and of these ways."""
    paid = [*PAID, *(OUT / way / "scores" for way in ways)]
    return [str(path) for path in paid if (path / "manifest.json").exists()]


def read_recalls(table):
    """Recall of each dev query at each budget and k."""
    budget, k, recall = (table[name].to_numpy() for name in ("budget", "k", "recall"))
    return {(b, at): recall[(budget == b) & (k == at)] for b in BUDGETS for at in KS}


def describe(way, cell, found, nearest):
    """Mean recall, and the gain over `nearest` with a paired 95 % bootstrap interval over queries."""
    drawn = np.random.default_rng(0).choice(found - nearest, (2000, len(found))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    figures = {"recall": found.mean(), "gain": (found - nearest).mean(), "low": low, "high": high}
    return {"way": way, "budget": cell[0], "k": cell[1], **{name: round(float(value), 4) for name, value in figures.items()}}


if __name__ == "__main__":
    main()
