"""`make bench-factorize`: what the fits cost as matrix and workers grow, and the closed forms against AdamW and `implicit`.

Synthetic worlds: unit embeddings of 384 numbers; scores are inner products after a low-rank distortion, plus noise. Each
section keeps its figures in runs/bench-factorize and is not run again while they are there:
`python -m tests.benchmarks.factorize SECTION` runs one, without a name all that are missing, then writes the JSON.
"""

import json
import logging
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from axn_ray.core.als import fit_als
from axn_ray.core.artifact import Manifest, seal
from axn_ray.core.closed_form import ItemFeatures, TrainData, embed, fit_model, held_out_rmse
from axn_ray.core.embedded_corpus import ITEM_EMBEDDINGS, QUERY_EMBEDDINGS, load_embedded_corpus
from axn_ray.core.fit_share import StoredInputs, share_inputs
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.gradient_fit import GradientFit, read_shared_state
from axn_ray.core.score_store import load_scores, read_spans, write_ids, write_shard
from axn_ray.distributed.als import factorize_by_als
from axn_ray.distributed.cluster import join_cluster, split_evenly
from axn_ray.distributed.train_factorization import train_factorization
from tests.benchmarks.common import record

OUT = Path("runs/bench-factorize")
VERBS = Path("runs/bench-recall/verbs")  # embeddings and scores of `make bench-recall`
DIM, RANK, PER_QUERY, NOISE = 384, 32, 100, 0.3
STEP = 16384  # observations per step; more than the default, since ten million of them must pass in a minute


def make_world(n_items, n_observed):
    """The artifacts of a synthetic world on disk, made once; `StoredInputs`."""
    folder = OUT / f"world-{n_items}-{n_observed}"
    n_queries = n_observed // PER_QUERY
    scores = folder / "scores"
    if not (scores / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        write_units(folder / QUERY_EMBEDDINGS, n_queries, rng)
        write_units(folder / ITEM_EMBEDDINGS, n_items, rng)
        queries, items = (np.load(folder / name, mmap_mode="r") for name in (QUERY_EMBEDDINGS, ITEM_EMBEDDINGS))
        left, right = (rng.normal(scale=RANK**-0.5, size=shape).astype(np.float32) for shape in ((DIM, RANK), (RANK, DIM)))
        for shard, rows in enumerate(split_evenly(n_queries, 10_000)):
            columns = np.sort(rng.integers(0, n_items, (len(rows), PER_QUERY), dtype=np.int32), axis=1)
            query_index = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), PER_QUERY)
            once = np.diff(columns, axis=1, prepend=-1).ravel() != 0
            distorted = queries[rows.start : rows.stop] + queries[rows.start : rows.stop] @ left @ right
            parts = [items[columns[at]] @ distorted[at] for at in range(len(rows))]
            noise = rng.normal(scale=NOISE * DIM**-0.5, size=len(query_index))
            values = (20 * (np.concatenate(parts) + noise) - 5).astype(np.float32)
            write_shard(scores, shard, query_index[once], columns.ravel()[once], values[once], {})
        write_ids(scores, "queries.parquet", "query_id", ids := [f"q{n}" for n in range(n_queries)], ids)
        pairs = sum(json.loads(path.read_text())["rows"] for path in (scores / "shards").glob("*.json"))
        seal(scores, Manifest(kind="scores", config={}, counts={"pairs": pairs}, made_from={}))
    return StoredInputs(folder.resolve(), scores.resolve(), np.arange(n_queries), read_spans(scores))


def write_units(path, rows, rng):
    """Random unit vectors, a block at a time."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, DIM))
    for block in split_evenly(rows, 1 << 15):
        vectors = rng.standard_normal((len(block), DIM), dtype=np.float32)
        array[block.start : block.stop] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    array.flush()


class OwnMemory:
    """Context: the most memory that any one process named so below this one held for itself (not shared, not mapped files)."""

    def __init__(self, *names):
        self.names, self.peak, self._stop = names, 0, threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    if any(name in " ".join(process.cmdline()) for name in self.names):
                        memory = process.memory_info()
                        self.peak = max(self.peak, memory.rss - memory.shared)
                except psutil.Error:
                    continue


def measure(method, n_items, n_observed, workers):
    """One epoch of one method on one world; seconds of the epoch and of the whole, memory and bytes sent per worker."""
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
    seconds, sent = (epoch["seconds"], epoch["sent_bytes"]) if isinstance(epoch, dict) else (epoch.seconds, 0)
    row = {
        "method": method,
        "items": n_items,
        "observations": inputs.n_observed,
        "workers": workers,
        "epoch_seconds": round(seconds, 2),
        "whole_seconds": round(whole, 1),
        "peak_mb_per_worker": round(memory.peak / 1e6),
        "sent_mb_per_worker": round(sent / 1e6, 1),
        "held_out_rmse": round(fitted.record.held_out_rmse, 5),
        "start_rmse": round(fitted.record.start_rmse, 5),
    }
    sys.stdout.write(f"{row}\n")
    shutil.rmtree(folder)
    return row


def observations():
    """A hundred thousand items, more and more observations."""
    return [measure(method, 10**5, n, 2) for n in (10**5, 10**6, 10**7) for method in ("mf_trns", "als")]


def items():
    """A million observations, more and more items."""
    return [measure(method, n, 10**6, 4) for n in (10**5, 10**6) for method in ("mf_trns", "als")]


def many_items():
    """As many items as the disk of one machine holds: MF_Trns keeps V and two moments in each checkpoint, ALS V alone."""
    return [measure("mf_trns", 2 * 10**6, 10**6, 4), measure("als", 5 * 10**6, 10**6, 4)]


def workers():
    """The same world on one, two and four workers."""
    return [measure(method, 10**6, 10**6, n) for n in (1, 2, 4) for method in ("mf_trns", "als")]


def load_verbs():
    """The verb world's train scores and embeddings, in memory."""
    corpus, scores = load_embedded_corpus(VERBS / "embeddings"), load_scores(VERBS / "g_near")
    rows = [corpus.queries.index_of[query_id] for query_id in scores.query_ids]
    return FitInputs(scores.matrix, np.asarray(corpus.item_embeddings), corpus.query_embeddings[rows])


def rivals():
    """In one process: when does each fit reach the held-out error that AdamW ends at? Seconds since the start of the fit."""
    rows = []
    for world, inputs in {"verbs": load_verbs(), "synthetic": in_memory(make_world(10**5, 10**6))}.items():
        scale = inputs.fit_scale()
        for method in ("mf_trns", "mf_ind", "als"):
            config = FactorizationConfig(method=method)
            started = time.monotonic()
            if method == "als":
                epochs = fit_als(inputs, scale, config)[1]
            else:
                run = GradientFit(share_inputs(inputs), config)
                while not run.progress.is_done and time.monotonic() - started < 150:
                    run.run_epoch()
                epochs = run.progress.epochs
            clock = np.cumsum([epoch.seconds for epoch in epochs])
            curve = [(round(float(at), 2), round(epoch.held_out_rmse, 5)) for at, epoch in zip(clock, epochs, strict=True)]
            rows.append({"world": world, "method": method, "seconds_and_held_out_rmse": curve})
            sys.stdout.write(f"{rows[-1]}\n")
        if world == "verbs":
            rows.append({"world": world, "method": "bayes", "seconds_and_held_out_rmse": bayes_curve(inputs, scale)})
            sys.stdout.write(f"{rows[-1]}\n")
    return rows


def bayes_curve(inputs, scale):
    """The closed-form fit after one to six iterations; its error is the posterior mean's."""
    config = FactorizationConfig(method="bayes")
    held_out = inputs.held_out(config)
    known, hidden = inputs.score_matrix.keep(~held_out), inputs.score_matrix.keep(held_out)
    features, curve = ItemFeatures(inputs.item_embeddings), []
    for iterations in (1, 2, 4, 6):
        started = time.monotonic()
        model = fit_model(TrainData(features, inputs.query_embeddings, known, scale), iterations)
        seconds = time.monotonic() - started
        embedded = embed(model, features, inputs.query_embeddings, config.width)
        error = held_out_rmse(embedded, inputs.query_embeddings, scale, known, hidden)
        curve.append((round(seconds, 2), round(error, 5)))
    return curve


def in_memory(stored):
    """The inputs of a world on disk as arrays."""
    share = stored.share(0, 1)
    return FitInputs(share.matrix, np.asarray(share.item_embeddings), share.query_embeddings)


def implicit():
    """Seconds of one iteration of `implicit`'s ALS and of ours, on the same observations with 384 factors.

    `implicit` fits clicks: every unseen pair counts as a zero of low confidence, so it has no held-out error to compare.
    """
    import scipy.sparse
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    rows, threads = [], torch.get_num_threads()
    for world, inputs in {"verbs": load_verbs(), "synthetic": in_memory(make_world(10**5, 10**6))}.items():
        matrix, scale = inputs.score_matrix, inputs.fit_scale()
        started = time.monotonic()
        fit_als(inputs, scale, FactorizationConfig(method="als", epochs=1))
        row = {"world": world, "observations": matrix.n_observed, "ours": round(time.monotonic() - started, 2)}
        positive = scipy.sparse.csr_matrix(
            (np.exp(scale.scale(matrix.scores)), matrix.item_index, matrix.indptr), shape=(matrix.n_queries, matrix.n_items)
        )
        for name, uses_cg in (("implicit_cholesky", False), ("implicit_conjugate_gradient", True)):
            model = AlternatingLeastSquares(factors=DIM, iterations=1, num_threads=threads, use_gpu=False, use_cg=uses_cg)
            started = time.monotonic()
            with threadpool_limits(1, "blas"):
                model.fit(positive, show_progress=False)
            row[name] = round(time.monotonic() - started, 2)
        rows.append(row)
        sys.stdout.write(f"{row}\n")
    return rows


SECTIONS = {f.__name__: f for f in (observations, workers, items, many_items, rivals, implicit)}
ON_RAY = ("observations", "workers", "items", "many_items")


def run_section(name):
    """Run a section, or take its figures from an earlier run."""
    path = OUT / f"{name}.json"
    if not path.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        if name in ON_RAY:
            join_cluster()
        path.write_text(json.dumps(SECTIONS[name](), indent=1))
    return json.loads(path.read_text())


def linear_r2(rows, method):
    """R² of a straight line through seconds of an epoch against observations."""
    points = [(row["observations"], row["epoch_seconds"]) for row in rows if row["method"] == method]
    x, y = np.array(points, dtype=float).T
    return round(float(np.corrcoef(x, y)[0, 1] ** 2), 4)


def speed_up(rows, world, method):
    """AdamW's (MF_Trns) seconds to its best held-out error over the seconds to at most that error; None if never."""
    curves = {row["method"]: row["seconds_and_held_out_rmse"] for row in rows if row["world"] == world}
    seconds, best = min(curves["mf_trns"], key=lambda point: point[1])
    reached = [at for at, rmse in curves[method] if rmse <= best]
    return round(seconds / reached[0], 1) if reached else None


def main():
    """One section, or all and the record."""
    logging.getLogger("axn_ray").setLevel("INFO")
    if len(sys.argv) > 1:
        run_section(sys.argv[1])
        return
    found = {name: run_section(name) for name in SECTIONS}
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
    )


if __name__ == "__main__":
    main()
