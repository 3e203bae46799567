"""`make bench-recall`: the paper's comparison on the held-out verb world, 2000 train queries x 100 items.

Everything is made here (embeddings, scores, factorizations); the exact truth is the shipped one. Scores are kept in
runs/bench-recall, so that a run that was cut off goes on. ANNCUR and ADACUR take part where their dense rows are there:
`axn score --embeddings runs/bench-recall/embeddings --choice all --n-queries 100 --out runs/bench-recall/dense_rows`.
"""

import shutil
import time
from pathlib import Path

from axn_ray import sample
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.report import markdown_table
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks.common import DOCS, record

OUT = Path("runs/bench-recall")
TRAIN_QUERIES, PER_QUERY = 2000, 100
BUDGETS = [50, 100, 200, 500]


def main():
    """Run every stage, timed, and record the table."""
    join_cluster()
    shutil.rmtree(OUT / "train", ignore_errors=True)  # or a fit would go on where an earlier one ended, in no time
    seconds = {}
    reused = (OUT / "scores" / "manifest.json").exists()

    def timed(name, stage, *arguments, **settings):
        start = time.monotonic()
        result = stage(*arguments, **settings)
        seconds[name] = round(time.monotonic() - start, 1)
        return result

    corpus = timed("embed", embed, EmbedConfig(world=["verb"], train_queries=TRAIN_QUERIES), OUT / "embeddings")
    sealed = timed("score", score, corpus, ScoreConfig(per_query=PER_QUERY), OUT / "scores")
    factorizations = {name: OUT / name for name in ("mf_trns", "mf_ind", "bayes")}
    for name, folder in factorizations.items():
        settings = FactorizationConfig.model_validate({"method": name})
        timed(name, factorize_scores, OUT / "embeddings", OUT / "scores", settings, folder, storage=OUT / "train")
    config = EvaluateConfig(budgets=BUDGETS, rounds=[5, 10])
    rows = OUT / "dense_rows" if (OUT / "dense_rows" / "manifest.json").exists() else None
    inputs = OUT / "embeddings", sample.EXACT_SCORES, factorizations
    summary = timed("evaluate", examine, config, *inputs, OUT / "evaluation", dense_rows=rows)
    DOCS.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        shutil.copy(OUT / "evaluation" / f"recall.{ending}", DOCS / f"recall.{ending}")
    (DOCS / "recall.md").write_text(markdown_table(summary))

    def at(method, rounds, budget, k):
        row = next(r for r in summary if (r["method"], r["rounds"], r["budget"], r["k"]) == (method, rounds, budget, k))
        return round(100 * row["recall"], 1)

    record(
        "recall",
        {"seconds": seconds, "scores_reused": reused, "index_ce_calls": sealed.counts["pairs"], "summary": summary},
        rnr_de_at10_b100=at("RnR, DE", 1, 100, 10),
        pinv_mf_ind_at10_b100=at("AXN pinv, MF_Ind", 10, 100, 10),
        ridge_mf_ind_at10_b100=at("AXN ridge, MF_Ind", 10, 100, 10),
        bayes_at10_b100=at("AXN bayes", 10, 100, 10),
        bayes_at10_b500=at("AXN bayes", 10, 500, 10),
    )


if __name__ == "__main__":
    main()
