"""`make bench-width`: what fewer numbers an item cost, and fewer bits a number, on the verbs. Sections run alone or together.

    make bench-width SECTIONS=bits

numbers  the closed form with other widths, over the dual-encoder as it is and over the distilled one: width.json
bits     all features of the default views in float32, 512 numbers in float32 and in 8 bits, over both: width_bits.json

Ten rounds of search for the 100 test queries of `make bench-recall`, whose scores and distilled dual-encoder both take, or
make where they are missing. Nothing is chosen by them.
"""

import argparse
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
from tests.benchmarks import recall
from tests.benchmarks.common import record

OUT, WORLD = recall.OUT / "width", recall.WORLDS["verbs"]
SCORES, DISTILLED = WORLD.folder / recall.FITS["bayes"], WORLD.folder / "distilled"
DUAL_ENCODERS = (("as it is", WORLD.folder), ("distilled", DISTILLED))
WIDTHS = (512, 384, 256)  # the first is the default
ALL = 1 << 16  # numbers, more than there are features
SECTIONS = ("numbers", "bits")
GAIN = ("recall", "gain", "gain_low", "gain_high")


def main():
    """Run the sections named on the command line, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: both")
    sections = parser.parse_args().sections or SECTIONS
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"section {unknown.pop()!r} is none of {', '.join(SECTIONS)}")
    join_cluster()
    if "numbers" in sections:
        numbers()
    if "bits" in sections:
        bits()


def numbers():
    """A row per kind of embeddings, width, budget and k."""
    recall.score_world(WORLD, [])
    recall.distil(WORLD, SCORES, DISTILLED)
    rows = []
    for name, folder in DUAL_ENCODERS:
        tables = []
        for width in WIDTHS:
            place = OUT / f"{name.replace(' ', '_')}_{width}"
            config = FactorizationConfig(width=width)
            recall.make(place / "bayes", factorize_scores, folder / "embeddings", SCORES, config, place / "bayes")
            assert load_factorization(place / "bayes").item_embeddings.shape[1] <= width
            tables.append(search(place, folder / "embeddings", str(width)))
        rows += [{"dual_encoder": name, "width": int(method), **row} for method, row in compare(tables)]
    headline = {
        f"{row['dual_encoder'].replace(' ', '_')}_256_at10_b{row['budget']}": round(100 * row["gain"], 1)
        for row in rows
        if (row["width"], row["k"]) == (256, 10)
    }
    record("width", {"rows": rows}, **headline)


def bits():
    """A row per kind of embeddings, kind of numbers, budget and k; the gain is over all features in float32."""
    recall.score_world(WORLD, [], ["g_mix"])
    recall.distil(WORLD, SCORES, DISTILLED)
    rows, headline = [], {}
    for name, folder in DUAL_ENCODERS:
        embeddings, place = folder / "embeddings", OUT / name.replace(" ", "_")
        rounded = place / "int8"
        recall.make(rounded / "bayes", factorize_scores, embeddings, SCORES, FactorizationConfig(), rounded / "bayes")
        known = load_factorization(rounded / "bayes")
        tables, n = [], known.item_embeddings.shape[1]
        for kind, width in (("all, float32", ALL), (f"{n}, float32", n)):
            plain = place / f"float32_{width}"
            recall.make(plain / "bayes", fit_unrounded, embeddings, known, width, plain / "bayes")
            tables.append(search(plain, embeddings, kind))
        assert known.item_embeddings.dtype == np.int8
        tables.append(search(rounded, embeddings, f"{n}, int8"))
        found = [{"dual_encoder": name, "numbers": method, **row} for method, row in compare(tables)]
        last = {row["budget"]: row["gain"] for row in found if (row["numbers"], row["k"]) == (f"{n}, int8", 10)}
        headline |= {f"{place.name}_at10_b{budget}": round(100 * gain, 1) for budget, gain in last.items()}
        rows += found
    record("width_bits", {"rows": rows}, "bench-width SECTIONS=bits", **headline)


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
