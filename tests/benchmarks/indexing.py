"""`make bench-indexing`: the whole of indexing side by side on the verb world: CE calls, seconds, recall at B=100.

The closed form, distillation (`axn distill`, cross-entropy on the CE's softmax over 24 of a query's scored items) and both
together have the scores of 100, 500 and 2000 train queries x 100 items: the nearest, some found by search, some random. MF_Trns,
ALS and MF_Ind have as many of the nearest items; ANNCUR and ADACUR have dense rows of 50 dev queries instead. What `make
bench-recall SECTIONS=distilled` makes is made first where it is not there; every step is kept and not done again.
"""

import shutil
import time

from axn_ray import sample
from axn_ray.core.artifact import read_manifest
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.evaluation_store import load_evaluation
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed_views import open_views
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks import recall
from tests.benchmarks.common import record
from tests.benchmarks.recall_record import RNR, percent, table, write_page

OUT, WORLD, BUDGET, KS = recall.OUT.with_name("bench-indexing"), recall.WORLDS["verbs"], 100, (1, 10, 100)
# Train queries and epochs of distillation: on fewer queries more passes, up to the steps of one over 500.
SIZES = {100: 5, 500: 1, 2000: 1}
# The methods that search with each; ALS gives embeddings of MF_Trns's kind.
OTHERS = {
    "mf_trns": ("mf_trns", ["axn_pinv_mf_trns"]),
    "als": ("mf_trns", ["axn_pinv_mf_trns"]),
    "mf_ind": ("mf_ind", ["rnr_mf_ind", "axn_pinv_mf_ind", "axn_ridge_mf_ind"]),
}
MEASURED = ("recall", "recall_low", "recall_high")
PAGE = """# Indexing: what each index costs, and what it finds

Made by `make bench-indexing`; `indexing.json` beside this file has every row. Percent of the exact top k that is found with
B=100 CE calls per query (100 test queries, 13,767 verbs, 95 % bootstrap intervals over queries). CE calls and seconds are
those of making the index; the seconds leave out the CE's own, and the first embedding of the items, which all share. The closed
form's are those of the item views and of the fit. The CE's seconds are its calls at the pace of the 200,000 that were timed.
"""


def search(out, methods, embeddings=WORLD.folder / "embeddings", factorizations=None, dense_rows=None):
    """Judge the methods on the test queries with the budget."""
    plan = EvaluateConfig(budgets=[BUDGET], rounds=recall.ROUNDS, k=KS, methods=methods)
    recall.make(out, examine, plan, embeddings, sample.EXACT_SCORES, factorizations or {}, out, dense_rows=dense_rows)


def time_views():
    """Make the views of all items anew, for their seconds: the closed form's fits find them made."""
    if not (OUT / "views.seconds").exists():
        corpus, model = load_embedded_corpus(WORLD.folder / "embeddings"), read_manifest(WORLD.folder / "g_mix", "scores")
        shutil.rmtree(OUT / "views", ignore_errors=True)
        start = time.monotonic()
        open_views(None, corpus, model.config["cross_encoder"], OUT / "views", workers=2, threads=1)
        (OUT / "views.seconds").write_text(f"{time.monotonic() - start:.1f}\n")


def on_scores(n_queries, epochs):
    """Rows of the closed form, of distillation and of both, from the scores of so many train queries."""
    folder, embeddings = WORLD.folder, WORLD.folder / "embeddings"
    scores, distilled = folder / "g_mix", folder / "distilled"
    if n_queries < WORLD.train_queries:
        folder = OUT / f"{n_queries}x100"
        scores, distilled = folder / "scores", folder / "distilled"
        known = [str(WORLD.folder / name) for name in ("g_near", "g_mix")]
        config = ScoreConfig(n_queries=n_queries, per_query=100, known_scores=known, **recall.MIX)
        recall.make(scores, score, load_embedded_corpus(embeddings), config, scores)
        recall.fit(embeddings, scores, "bayes", folder / "bayes")
        recall.distil(WORLD, scores, distilled, epochs)
    search(OUT / f"{n_queries}x100" / "closed_form", ["axn_bayes"], factorizations={"bayes": folder / "bayes"})
    trained = {"distil": distilled / "dual_encoder", "embed": distilled / "embeddings"}
    fitted = {"views": OUT / "views", "fit": folder / "bayes"}
    both = {**trained, "views and fit": distilled / "bayes"}
    return [
        cost_and_recall("closed form", n_queries, scores, fitted, OUT / f"{n_queries}x100" / "closed_form"),
        cost_and_recall("distillation", n_queries, scores, trained, distilled / "evaluation", ("RnR, DE", "AXN pinv, DE")),
        cost_and_recall("both", n_queries, scores, both, distilled / "evaluation", ("AXN bayes",)),
    ]


def cost_and_recall(index, n_queries, scores, steps, evaluation, methods=None):
    """An index: what it cost, and what the methods find with it (None: all, but for the baseline that needs no index)."""
    seconds = {name: float(made.with_suffix(".seconds").read_text()) for name, made in steps.items()}
    found = {}
    for cell in load_evaluation(evaluation).summary:
        is_shown = cell["method"] in methods if methods else scores is None or cell["method"] != RNR[0]
        if cell["budget"] == BUDGET and is_shown:
            found.setdefault(cell["method"], {})[cell["k"]] = {name: cell[name] for name in MEASURED}
    calls = 0 if scores is None else read_manifest(scores, "scores").counts["pairs"]
    return {"index": index, "train_queries": n_queries, "ce_calls": calls, "seconds": seconds, "found": found}


def main():
    """Every step that is missing, then the record."""
    join_cluster()
    recall.distilled([])
    time_views()
    embeddings, near, truth = (WORLD.folder / name for name in ("embeddings", "g_near", "dev_truth"))
    search(OUT / "de", ["rnr_de", "axn_pinv_de"])
    rows = [cost_and_recall("none", 0, None, {}, OUT / "de")]
    for method, (name, methods) in OTHERS.items():
        fitted, judged = (WORLD.folder if method in recall.FITS else OUT) / method, OUT / f"{method}_evaluation"
        recall.fit(embeddings, near, method, fitted)
        search(judged, methods, factorizations={name: fitted})
        rows.append(cost_and_recall(method, WORLD.train_queries, near, {"fit": fitted}, judged))
    search(OUT / "cur", ["anncur", "adacur"], dense_rows=truth)
    rows.append(cost_and_recall("dense rows", 50, truth, {}, OUT / "cur"))
    for n_queries, epochs in SIZES.items():
        rows += on_scores(n_queries, epochs)
    pace = read_manifest(near, "scores").counts["pairs"] / float(near.with_suffix(".seconds").read_text())  # pairs a second
    rows = [row | {"ce_seconds": round(row["ce_calls"] / pace)} for row in rows]
    write_page("indexing", [PAGE, page_table(rows)])
    record("indexing", {"rows": rows}, **headline(rows))


def page_table(rows):
    """A line per index and method."""
    header = ["index", "train queries", "CE calls", "CE seconds", "other seconds", "search", *(f"recall@{k}" for k in KS)]
    lines = [header, ["---", "---:", "---:", "---:", "---:", "---", *["---:"] * len(KS)]]
    for row in rows:
        cost = f"{row['ce_calls']:,}", f"{row['ce_seconds']:,}", f"{sum(row['seconds'].values()):.0f}"
        for method, cells in row["found"].items():
            lines.append([row["index"], str(row["train_queries"]), *cost, method, *(percent(cells[k]) for k in KS)])
    return table(lines)


def headline(rows):
    """recall@10 of the best search over each index, in percent."""
    best = {}
    for row in rows:
        name = f"{row['index'].replace(' ', '_')}_{row['ce_calls']}"
        best[name] = round(100 * max(cells[10]["recall"] for cells in row["found"].values()), 1)
    return best


if __name__ == "__main__":
    main()
