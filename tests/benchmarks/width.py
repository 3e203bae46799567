"""`make bench-width`: what fewer numbers an item cost, on the verbs, over the dual-encoder as it is and over the distilled one.

The closed form with other widths, ten rounds of search for the 100 test queries of `make bench-recall`, whose scores and
distilled dual-encoder it takes, or makes where they are missing. Nothing is chosen by it.
"""

import pyarrow as pa

from axn_ray.core.comparison import summarize
from axn_ray.core.evaluation_store import load_evaluation
from axn_ray.core.factorization import load_factorization
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from tests.benchmarks import recall
from tests.benchmarks.common import record

WIDTHS = (512, 384, 256)  # the first is the default
GAIN = ("recall", "gain", "gain_low", "gain_high")


def main():
    """A row per kind of embeddings, width, budget and k."""
    join_cluster()
    world = recall.WORLDS["verbs"]
    scores, distilled = world.folder / recall.FITS["bayes"], world.folder / "distilled"
    recall.score_world(world, [])
    recall.distil(world, scores, distilled)
    rows = []
    for name, folder in (("as it is", world.folder), ("distilled", distilled)):
        tables = []
        for width in WIDTHS:
            place = recall.OUT / "width" / f"{name.replace(' ', '_')}_{width}"
            config = FactorizationConfig(width=width)
            recall.make(place / "bayes", factorize_scores, folder / "embeddings", scores, config, place / "bayes")
            plan = EvaluateConfig(methods=["axn_bayes"], rounds=recall.ROUNDS, budgets=recall.BUDGETS, k=recall.KS)
            inputs = folder / "embeddings", world.truth, {"bayes": place / "bayes"}
            recall.make(place / "evaluation", examine, plan, *inputs, place / "evaluation")
            assert load_factorization(place / "bayes").item_embeddings.shape[1] <= width
            tables.append(name_after(width, load_evaluation(place / "evaluation").table))
        found = summarize(pa.concat_tables(tables), baseline=(str(WIDTHS[0]), recall.ROUNDS[0]))
        for row in found:
            if row["rounds"] != recall.ROUNDS[0]:  # retrieve-and-rerank stands in every evaluation
                continue
            cell = {"dual_encoder": name, "width": int(row["method"]), "budget": row["budget"], "k": row["k"]}
            rows.append(cell | {part: round(row[part], 4) for part in GAIN})
    headline = {
        f"{row['dual_encoder'].replace(' ', '_')}_256_at10_b{row['budget']}": round(100 * row["gain"], 1)
        for row in rows
        if (row["width"], row["k"]) == (256, 10)
    }
    record("width", {"rows": rows}, **headline)


def name_after(width, table):
    """The rows of an evaluation under the name of its width, so that several can stand side by side."""
    return table.set_column(table.column_names.index("method"), "method", pa.array([str(width)] * table.num_rows))


if __name__ == "__main__":
    main()
