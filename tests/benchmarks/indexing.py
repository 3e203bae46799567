"""`make bench-indexing`: the whole of indexing side by side on the verb world: CE calls, seconds, recall at B=100.

As many calls, 2000 x 100, are there for each: MF_Trns, ALS, MF_Ind and a dual-encoder that is distilled with
sentence-transformers (cross-entropy on the CE's softmax over a query's scored items, for at most 270 s) take the nearest
items; the closed form takes the nearest, some found by search, some random. ANNCUR and ADACUR have dense rows of 50 dev
queries instead. Artifacts are those of `make bench-recall`, which runs first; each step is kept in runs/bench-indexing and
not done again.
"""

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from axn_ray import sample
from axn_ray.core.distillation import choose_listed
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.models import MINILM, locate_model
from axn_ray.core.score_store import load_scores
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from tests.benchmarks.common import record

OUT, RECALL = Path("runs/bench-indexing"), Path("runs/bench-recall/verbs")
WORLD = EmbedConfig(world=["verb"], train_queries=2000)
# The fit's scores, and the methods that search with it; ALS gives embeddings of MF_Trns's kind.
FITS = {
    "mf_trns": ("g_near", "mf_trns", ["axn_pinv_mf_trns"]),
    "als": ("g_near", "mf_trns", ["axn_pinv_mf_trns"]),
    "mf_ind": ("g_near", "mf_ind", ["rnr_mf_ind", "axn_pinv_mf_ind", "axn_ridge_mf_ind"]),
    "bayes": ("g_mix", "bayes", ["axn_bayes"]),
}
ITEMS_PER_STEP, QUERIES_PER_STEP, RATE, TEMPERATURE = 24, 8, 5e-5, 20.0


def distil(embeddings, scores, folder, seconds_allowed=270):
    """Fine-tune the dual-encoder: softmax over a query's items of 20 cos(q, i) towards the softmax of their CE scores."""
    corpus, observed = load_embedded_corpus(embeddings), load_scores(scores)
    model = SentenceTransformer(locate_model(MINILM), device="cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rng, started, losses = np.random.default_rng(0), time.monotonic(), []
    order = rng.permutation(observed.matrix.n_queries)
    starts = range(0, len(order), QUERIES_PER_STEP)
    warm_up = max(1, len(starts) // 10)
    for number, start in enumerate(starts):
        if time.monotonic() - started > seconds_allowed:
            break
        queries = order[start : start + QUERIES_PER_STEP]
        texts, targets = [], []
        for query in queries.tolist():
            items, values = observed.matrix.row(query)
            chosen = choose_listed(values, ITEMS_PER_STEP, rng)
            texts += [corpus.items.full_texts[item] for item in items[chosen]]
            targets.append(torch.from_numpy(values[chosen]))
        asked = [corpus.queries.texts[corpus.queries.index_of[observed.query_ids[query]]] for query in queries]
        u, v = (torch.nn.functional.normalize(model(model.tokenize(part))["sentence_embedding"]) for part in (asked, texts))
        similar = TEMPERATURE * torch.einsum("qd,qid->qi", u, v.view(len(queries), -1, v.shape[1]))
        loss = -(torch.softmax(torch.stack(targets), 1) * torch.log_softmax(similar, 1)).sum(1).mean()
        optimizer.param_groups[0]["lr"] = RATE * min((number + 1) / warm_up, 1 - number / len(starts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(str(folder))
    quarter = max(1, len(losses) // 4)
    return {
        "steps": len(losses),
        "queries": min(len(order), len(losses) * QUERIES_PER_STEP),
        "first_loss": round(float(np.mean(losses[:quarter])), 4),
        "last_loss": round(float(np.mean(losses[-quarter:])), 4),
    }


def step(name, work):
    """Do `work` once: its seconds and what it returned, kept in NAME.json."""
    path = OUT / f"{name}.json"
    if not path.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        returned = work()
        path.write_text(json.dumps({"seconds": round(time.monotonic() - started, 1), "returned": returned}))
        sys.stdout.write(f"{name} {path.read_text()}\n")
    return json.loads(path.read_text())


def search(embeddings, methods, name, factorizations=None, dense_rows=None):
    """Recall of the methods on the test queries at B=100 and the calls of their indexes."""
    config = EvaluateConfig(budgets=[100], rounds=[10], k=[1, 10, 100], methods=methods)
    summary = examine(config, embeddings, sample.EXACT_SCORES, factorizations or {}, OUT / f"evaluation-{name}", dense_rows)
    kept = ("method", "rounds", "k", "recall", "low", "high")
    return [{key: row[key] for key in kept if key in row} for row in summary]


def main():
    """Every step that is missing, then the record."""
    join_cluster()
    embeddings, near, found = RECALL / "embeddings", RECALL / "g_near", {}

    def done(name, work):
        found[name] = step(name, work)

    done("distil", lambda: distil(embeddings, near, OUT / "distilled"))
    distilled = WORLD.model_copy(update={"dual_encoder": str((OUT / "distilled").resolve())})
    done("embed-distilled", lambda: embed(distilled, OUT / "embeddings-distilled") and None)
    done("search-distilled", lambda: search(OUT / "embeddings-distilled", ["rnr_de", "axn_pinv_de"], "distilled"))
    done("search-de", lambda: search(embeddings, ["rnr_de", "axn_pinv_de"], "de"))
    for method, (scores, name, methods) in FITS.items():
        config, out = FactorizationConfig.model_validate({"method": method}), OUT / method
        done(f"fit-{method}", partial(fit, embeddings, RECALL / scores, config, out))
        done(f"search-{method}", partial(search, embeddings, methods, method, {name: out}))
    rows = RECALL / "dev_truth"
    done("search-cur", lambda: search(embeddings, ["anncur", "adacur"], "cur", dense_rows=rows))
    calls = {name: load_scores(RECALL / name).matrix.n_observed for name in ("g_near", "g_mix", "dev_truth")}
    record("indexing", {"ce_calls": calls, "steps": found}, **headline(found))


def fit(embeddings, scores, config, out):
    """One factorization, from the start."""
    shutil.rmtree(OUT / "train", ignore_errors=True)
    factorize_scores(embeddings, scores, config, out, num_workers=2, storage=OUT / "train")


def headline(found):
    """Recall@10 of each search."""
    values = {}
    for name, kept in found.items():
        if name.startswith("search-"):
            for row in kept["returned"]:
                if row["k"] == 10:
                    key = f"{name.removeprefix('search-')}_{row['method'].split(',')[0]}".lower().replace(" ", "_")
                    values[key] = round(100 * row["recall"], 1)
    return values


if __name__ == "__main__":
    main()
