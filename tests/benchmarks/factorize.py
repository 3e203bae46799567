"""`make bench-factorize`: what the fits cost as matrix and workers grow, and the closed forms against AdamW and `implicit`.

Synthetic worlds: unit embeddings of 384 numbers; scores are inner products after a low-rank distortion, plus noise. Each
row is kept in runs/bench-factorize and not measured again while it is there, so that a run that was cut off goes on:
`make bench-factorize SECTION=NAME` runs one section, without a name all of them, then writes the JSON; `many_items`, which
needs 40 GB of disk, runs only when named, and has a JSON of its own, as `bayes` has, the closed form as all these grow.
"""

import logging
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from axn_ray.core.als import fit_als
from axn_ray.core.closed_form import ItemFeatures, TrainData, embed, fit_model
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.fit_share import share_inputs
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.gradient_fit import GradientFit, read_shared_state
from axn_ray.core.held_out import held_out_rmse
from axn_ray.core.score_store import load_scores
from axn_ray.distributed.als import factorize_by_als
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.train_factorization import train_factorization
from tests.benchmarks.common import record
from tests.benchmarks.factorize_bayes import bayes
from tests.benchmarks.factorize_world import DIM, OUT, kept, make_world
from tests.benchmarks.own_memory import OwnMemory

VERBS = Path("runs/bench-recall/verbs")  # made by `make bench-recall`
MOST_SECONDS = 100
STEP = 16384  # observations per step; more than the default, since ten million of them must pass in a minute


def measure(*case):
    """A row of `one_epoch(method, n_items, n_observed, workers)`."""
    return kept("-".join(map(str, case)), one_epoch, *case)


def one_epoch(method, n_items, n_observed, workers):
    """One epoch of one method on one world; seconds of the epoch and of the whole, memory and bytes sent per worker."""
    join_cluster()
    inputs = make_world(n_items, n_observed)
    config = FactorizationConfig(method=method, epochs=1, batch_size=STEP)
    folder = OUT / "fit"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.args[-1])
    logging.getLogger("axn_ray.core.epochs").addHandler(handler)
    started = time.monotonic()
    with OwnMemory("RayTrainWorker", "_solve", "_open", "_measure", "_join") as memory:
        if method == "als":
            fitted = factorize_by_als(inputs, config, folder.resolve(), workers, 1)
            epoch = seen[0]
        else:
            settings = {"num_workers": workers, "threads": 1, "storage": folder / "storage"}
            fitted = train_factorization(inputs, config, folder.resolve(), name="fit", **settings)
            (state,) = (folder / "storage").rglob("state.pt")
            epoch = read_shared_state(state.parent)["epochs"][0]
    whole = time.monotonic() - started
    logging.getLogger("axn_ray.core.epochs").removeHandler(handler)
    if isinstance(epoch, dict):
        seconds, sent = epoch["seconds"], {"sent_mb_per_worker": round(epoch["sent_bytes"] / 1e6, 1)}
    else:  # als exchanges rows by the object store and the disk, which nobody counts
        seconds, sent = epoch.seconds, {}
    row = {
        "method": method,
        "items": n_items,
        "observations": inputs.n_observed,
        "workers": workers,
        "epoch_seconds": round(seconds, 2),
        "whole_seconds": round(whole, 1),
        "peak_mb_per_worker": round(memory.peak / 1e6),
        **sent,
        "held_out_rmse": round(fitted.record.held_out_rmse, 5),
        "start_rmse": round(fitted.record.start_rmse, 5),
    }
    shutil.rmtree(folder)
    return row


def observations():
    """A hundred thousand items, more and more observations."""
    return [measure(method, 10**5, n, 2) for n in (10**5, 10**6, 10**7) for method in ("mf_trns", "als")]


def items():
    """A million observations, more and more items."""
    return [measure(method, n, 10**6, 4) for n in (10**5, 10**6) for method in ("mf_trns", "als")]


def many_items():
    """Millions of items, on 40 GB of disk: MF_Trns keeps V and two moments in each checkpoint, ALS V alone. Only when named."""
    rows = [measure("mf_trns", 2 * 10**6, 10**6, 4), measure("als", 5 * 10**6, 10**6, 4)]
    seconds = {f"{row['method']}_epoch_seconds": row["epoch_seconds"] for row in rows}
    record("factorize_many_items", {"rows": rows}, "bench-factorize SECTION=many_items", **seconds)


def workers():
    """The same world on one, two and four workers."""
    return [measure(method, 10**6, 10**6, n) for n in (1, 2, 4) for method in ("mf_trns", "als")]


def load_verbs():
    """The verb world's train scores and embeddings, in memory."""
    corpus, scores = load_embedded_corpus(VERBS / "embeddings"), load_scores(VERBS / "g_near")
    rows = [corpus.queries.index_of[query_id] for query_id in scores.query_ids]
    return FitInputs(scores.matrix, np.asarray(corpus.item_embeddings), corpus.query_embeddings[rows])


def rivals():
    """In one thread: CPU seconds since the start of the fit, and the held-out error reached, of every fit.

    Before it is timed, each fit runs one pass: what a process pays once is nobody's.
    """
    cases = [(world, method) for world in WORLDS for method in ("als", "mf_trns", "bayes")] + [("verbs", "mf_ind")]
    return [kept("-".join(("rival", *case)), error_curve, *case) for case in cases]


@threadpool_limits.wrap(limits=1)
def error_curve(world, method):
    """Held-out error against CPU seconds; MF_Trns and MF_Ind run as many epochs as they would, or for `MOST_SECONDS`."""
    torch.set_num_threads(1)
    inputs = WORLDS[world]()
    scale, curve = inputs.fit_scale(), []
    if method == "bayes":
        curve = bayes_curve(inputs, scale)
    elif method == "als":
        fit_als(inputs, scale, FactorizationConfig(method="als", epochs=1))
        for epochs in (1, 2):
            started = time.process_time()
            record_of = fit_als(inputs, scale, FactorizationConfig(method="als", epochs=epochs, patience=9))[1]
            curve.append((round(time.process_time() - started, 2), round(record_of[-1].held_out_rmse, 5)))
    else:
        GradientFit(share_inputs(inputs), FactorizationConfig(method=method)).run_epoch()
        run, started = GradientFit(share_inputs(inputs), FactorizationConfig(method=method)), time.process_time()
        while not run.progress.is_done and time.process_time() - started < MOST_SECONDS:
            error = run.run_epoch().held_out_rmse
            curve.append((round(time.process_time() - started, 2), round(error, 5)))
    start_rmse = round(inputs.start_rmse(FactorizationConfig(method=method), scale), 5)
    return {"world": world, "method": method, "start_rmse": start_rmse, "seconds_and_held_out_rmse": curve}


def bayes_curve(inputs, scale):
    """The closed-form fit after one to six iterations, the first over a fourth of the queries; the posterior mean's error."""
    config = FactorizationConfig(method="bayes")
    held_out = inputs.held_out(config)
    known, hidden = inputs.score_matrix.keep(~held_out), inputs.score_matrix.keep(held_out)
    features, curve = ItemFeatures(inputs.item_embeddings), []
    fit_model(TrainData(features, inputs.query_embeddings, known, scale), 1)
    for iterations in (1, 2, 4, 6):
        started = time.process_time()
        model = fit_model(TrainData(features, inputs.query_embeddings, known, scale), iterations)
        seconds = time.process_time() - started
        embedded = embed(model, features)
        error = held_out_rmse(embedded, inputs.query_embeddings, scale, known, hidden)
        curve.append((round(seconds, 2), round(error, 5)))
    return curve


def synthetic():
    """A synthetic world in memory."""
    share = make_world(10**5, 10**6).share(0, 1)
    return FitInputs(share.matrix, np.asarray(share.item_embeddings), share.query_embeddings)


WORLDS = {"verbs": load_verbs, "synthetic": synthetic}


def implicit():
    """CPU seconds of one iteration of `implicit`'s ALS and of ours, in one thread, same observations, 384 factors.

    `implicit` fits clicks: every unseen pair counts as a zero of low confidence, so it has no held-out error to compare.
    """
    return [kept(f"implicit-{world}", one_iteration, world) for world in WORLDS]


@threadpool_limits.wrap(limits=1)
def one_iteration(world):
    """CPU seconds of one iteration: ours, and `implicit`'s two solvers."""
    import scipy.sparse
    from implicit.als import AlternatingLeastSquares

    torch.set_num_threads(1)
    inputs = WORLDS[world]()
    matrix, scale = inputs.score_matrix, inputs.fit_scale()
    started = time.process_time()
    fit_als(inputs, scale, FactorizationConfig(method="als", epochs=1))
    row = {"world": world, "observations": matrix.n_observed, "ours": round(time.process_time() - started, 2)}
    positive = scipy.sparse.csr_matrix(
        (np.exp(scale.scale(matrix.scores)), matrix.item_index, matrix.indptr), shape=(matrix.n_queries, matrix.n_items)
    )
    for name, uses_cg in (("implicit_conjugate_gradient", True), ("implicit_cholesky", False)):
        model = AlternatingLeastSquares(factors=DIM, iterations=1, num_threads=1, use_gpu=False, use_cg=uses_cg)
        started = time.process_time()
        model.fit(positive, show_progress=False)
        row[name] = round(time.process_time() - started, 2)
    return row


SECTIONS = {f.__name__: f for f in (rivals, implicit, workers, items, observations)}


def linear_r2(rows, method):
    """R² of a straight line through seconds of an epoch against observations."""
    points = [(row["observations"], row["epoch_seconds"]) for row in rows if row["method"] == method]
    x, y = np.array(points, dtype=float).T
    return round(float(np.corrcoef(x, y)[0, 1] ** 2), 4)


def speed_up(rows, world, method):
    """AdamW's (MF_Trns) seconds to its best held-out error over a fit's seconds to at most that error; None if never."""
    curves = {row["method"]: row["seconds_and_held_out_rmse"] for row in rows if row["world"] == world}
    seconds, best = min(curves["mf_trns"], key=lambda point: point[1])
    reached = [at for at, rmse in curves[method] if rmse <= best]
    return round(seconds / reached[0], 1) if reached else None


def main():
    """One section, or all and the record."""
    logging.getLogger("axn_ray").setLevel("INFO")
    if len(sys.argv) > 1:
        (SECTIONS | {"many_items": many_items, "bayes": bayes})[sys.argv[1]]()
        return
    found = {name: section() for name, section in SECTIONS.items()}
    memory = {row["workers"]: row["peak_mb_per_worker"] for row in found["workers"] if row["method"] == "mf_trns"}
    record(
        "factorize",
        found,
        r2_mf_trns=linear_r2(found["observations"], "mf_trns"),
        r2_als=linear_r2(found["observations"], "als"),
        memory_1_to_4_workers=round(memory[1] / memory[4], 2),
        als_over_adamw_verbs=speed_up(found["rivals"], "verbs", "als"),
        als_over_adamw_synthetic=speed_up(found["rivals"], "synthetic", "als"),
        bayes_over_adamw_verbs=speed_up(found["rivals"], "verbs", "bayes"),
        bayes_over_adamw_synthetic=speed_up(found["rivals"], "synthetic", "bayes"),
    )


if __name__ == "__main__":
    main()
