"""The section `bayes` of bench-factorize: the closed form as observations, items and workers grow."""

import time

import numpy as np

from axn_ray.core.factorization import fit_closed_form
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.distributed.bayes_fit import spread_on_ray
from axn_ray.distributed.cluster import join_cluster
from tests.benchmarks.common import record
from tests.benchmarks.factorize_world import kept, make_world
from tests.benchmarks.own_memory import OwnMemory


def bayes():
    """The closed form over the dual-encoder's embeddings: ever more observations, items, workers. Its own record; when named."""
    cases = [(10**5, n, 2) for n in (10**5, 10**6, 10**7)] + [(n, 10**6, 4) for n in (10**5, 10**6)]
    rows = [
        kept("-".join(map(str, ("bayes", *case))), closed_form, *case) for case in [*cases, (10**6, 10**6, 1), (10**6, 10**6, 2)]
    ]
    seconds = {f"iteration_seconds_{row['observations']}": row["iteration_seconds"] for row in rows[:3]}
    observed, took = ([row[name] for row in rows[:3]] for name in ("observations", "iteration_seconds"))
    r2 = round(float(np.corrcoef(observed, took)[0, 1] ** 2), 4)
    record("factorize_bayes", {"rows": rows}, "bench-factorize SECTION=bayes", **seconds, r2=r2)


def closed_form(n_items, n_observed, workers):
    """Three iterations of EM, the first over a fourth of the queries: seconds of the last, of all, memory and bytes of a worker.

    A worker is sent its share once, and the model in each iteration; it gives sums back. Bytes are those of the arrays.
    """
    join_cluster()
    whole = make_world(n_items, n_observed).share(0, 1)
    inputs = FitInputs(whole.matrix, whole.item_embeddings, whole.query_embeddings)
    seconds, travelled = [], {}

    def timed(data):
        share = data.share(range(-(-data.matrix.n_queries // workers)))
        travelled["share_mb_once"] = round(count_bytes(share) / 1e6, 1)
        sum_statistics = spread_on_ray(workers, 1)(data)

        def run(model):
            begun = time.monotonic()
            total = sum_statistics(model)
            seconds.append(time.monotonic() - begun)
            travelled["sent_mb_per_worker"] = round((count_bytes(model) + count_bytes(total)) / 1e6, 1)
            return total

        return run

    started = time.monotonic()
    with OwnMemory("_sum_share") as memory:
        fitted = fit_closed_form(inputs, inputs.fit_scale(), FactorizationConfig(epochs=3), spread=timed)
    return {
        "method": "bayes",
        "items": n_items,
        "observations": inputs.score_matrix.n_observed,
        "workers": workers,
        "iteration_seconds": round(seconds[-1], 2),
        "whole_seconds": round(time.monotonic() - started, 1),
        "peak_mb_per_worker": round(memory.peak / 1e6),
        **travelled,
        "held_out_rmse": round(fitted.record.held_out_rmse, 5),
        "start_rmse": round(fitted.record.start_rmse, 5),
    }


def count_bytes(value):
    """Of the arrays in a dataclass, those of its dataclasses included."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(count_bytes, vars(value).values())) if hasattr(value, "__dataclass_fields__") else 0
