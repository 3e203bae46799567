"""`make bench-width`: what fewer numbers an item cost, and fewer bits a number, on the verbs.

All features of the default views in float32, as many numbers as the default has in float32, and what the index holds, numbers
of 8 bits, in several widths; over the dual-encoder as it is and over the distilled one. Ten rounds of search for the 100 test
queries of `make bench-recall`; nothing is chosen by them. All rows stand on the same scores, made here in the precision that the
machine is fast in: those of `make bench-recall`'s pairs but for their rounding.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from axn_ray.core.artifact import new_artifact, read_manifest
from axn_ray.core.bayes import whiten
from axn_ray.core.closed_form import ItemFeatures, TrainData, fit_model
from axn_ray.core.comparison import summarize
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.evaluation_store import load_evaluation
from axn_ray.core.factorization import describe_factorization, load_factorization, save_factorization
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.score_store import load_scores
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed_views import open_views
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores, find_queries
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks import recall
from tests.benchmarks.common import record

OUT, WORLD = recall.OUT / "width", recall.WORLDS["verbs"]
SCORES, DISTILLED = OUT / "scores", OUT / "distilled"
DUAL_ENCODERS = (("distilled", DISTILLED), ("as it is", WORLD.folder))
WIDTHS = (768, 512, 256)
ALL = 1 << 16  # numbers, more than there are features
GAIN = ("recall", "gain", "gain_low", "gain_high")


def main():
    """A row per kind of embeddings, kind of numbers, budget and k; the gain is over all features in float32."""
    join_cluster()
    recall.score_world(WORLD, [], ways=())
    corpus = load_embedded_corpus(WORLD.folder / "embeddings")
    recall.make(SCORES, score, corpus, ScoreConfig(per_query=100, **recall.MIX), SCORES)
    recall.teach(WORLD, SCORES, DISTILLED)
    rows, headline = [], {}
    for name, folder in DUAL_ENCODERS:
        embeddings, place = folder / "embeddings", OUT / name.replace(" ", "_")
        for width in WIDTHS:
            rounded = place / f"int8_{width}"
            config = FactorizationConfig(width=width)
            recall.make(rounded / "bayes", factorize_scores, embeddings, SCORES, config, rounded / "bayes")
            items = load_factorization(rounded / "bayes").item_embeddings
            assert items.shape[1] == width and items.dtype == np.int8
        default = FactorizationConfig().width
        known = load_factorization(place / f"int8_{default}" / "bayes")
        tables = []
        for kind, width in (("all, float32", ALL), (f"{default}, float32", default)):
            plain = place / f"float32_{width}"
            recall.make(plain / "bayes", fit_unrounded, embeddings, known, width, plain / "bayes")
            tables.append(search(plain, embeddings, kind))
        tables += [search(place / f"int8_{width}", embeddings, f"{width}, int8") for width in WIDTHS]
        found = [{"dual_encoder": name, "numbers": method, **row} for method, row in compare(tables)]
        for row in found:
            if (row["numbers"], row["k"]) == (f"{default}, int8", 10):
                headline[f"{place.name}_at10_b{row['budget']}"] = round(100 * row["gain"], 1)
        rows += found
    record("width", {"rows": rows}, **headline)


def fit_unrounded(embeddings, known, width, out):
    """The fit with so many numbers an item, in float32 as before they are rounded; the rest as in `known`."""
    corpus, manifest = load_embedded_corpus(embeddings), read_manifest(SCORES, "scores")
    rows, config = find_queries(corpus, embeddings, SCORES, manifest), FactorizationConfig(width=width)
    inputs = FitInputs(load_scores(SCORES).matrix, np.asarray(corpus.item_embeddings), corpus.query_embeddings[rows])
    cross_encoder, folder = manifest.config["cross_encoder"], embeddings.parent / "views"
    features = ItemFeatures(inputs.item_embeddings, open_views(config.views, corpus, cross_encoder, folder, 2, 1))
    features, observed = features.reduce(config.width), inputs.score_matrix.keep(~inputs.held_out(config))
    model = fit_model(TrainData(features, inputs.query_embeddings, observed, inputs.fit_scale()), config.epochs)
    if len(model.covariance) == known.item_embeddings.shape[1]:
        assert np.isclose(model.noise_variance, known.noise_variance, rtol=1e-3), "another fit"
    item_map, query_map = (part.astype(np.float32) for part in whiten(model))
    items = features.take(slice(None)) @ item_map
    learned = {"noise_variance": model.noise_variance, "prior_variance": None, "record": None}
    plain = replace(known, item_embeddings=items, query_map=query_map, **learned)
    with new_artifact(out, describe_factorization(plain, config, manifest.made_from)) as place:
        save_factorization(place, plain)


def search(place, embeddings, name):
    """The rows of the searches in a place's factorization, under a name, so that several can stand side by side."""
    plan = EvaluateConfig(methods=["axn_bayes"], rounds=recall.ROUNDS, budgets=recall.BUDGETS, k=recall.KS)
    recall.make(place / "evaluation", examine, plan, embeddings, WORLD.truth, {"bayes": place / "bayes"}, place / "evaluation")
    table = load_evaluation(place / "evaluation").table
    return table.set_column(table.column_names.index("method"), "method", pa.array([name] * table.num_rows))


def compare(tables):
    """Each name and what it finds at a budget and k, beside what the first of the tables finds."""
    first = tables[0]["method"][0].as_py()
    for row in summarize(pa.concat_tables(tables), baseline=(first, recall.ROUNDS[0])):
        if row["rounds"] == recall.ROUNDS[0]:  # retrieve-and-rerank stands in every evaluation
            yield row["method"], {"budget": row["budget"], "k": row["k"], **{part: round(row[part], 4) for part in GAIN}}


if __name__ == "__main__":
    main()
