"""`make bench-serve`: what a search costs over HTTP, beside the bare cross-encoder on the very same pairs, and beside a peer.

One replica of each deployment, load from a second process on loopback, closed loop. Each section runs in a process of its
own, is kept in runs/bench-serve, and is not run again: delete its file there, or name it (SECTIONS="sample peer").
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import torch

from axn_ray.core.corpus import read_items
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.sample import ITEMS
from serve_app.config import AppArgs
from serve_app.index_folder import open_index, prepare_items
from tests.benchmarks.common import DOCS, record
from tests.benchmarks.serve_world import (
    OUT,
    PEER_PORT,
    PEER_URL,
    URL,
    Peer,
    Served,
    end_load,
    make_million,
    measure,
    save_merged,
    searches,
    start_load,
)

CLIENTS = (1, 4, 16, 64)
BUDGET, ROUNDS, DOCUMENTS = 100, 5, 32
REPEATS = 4
TUNED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}
# As in cluster/rayservice.yaml; no balancer has to hear that the app ends.
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("axn-haproxy")),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}
ENVIRONMENTS = {"tuned": TUNED, "haproxy": TUNED | HAPROXY}
PEER = Path(".venv-peer/bin/infinity_emb")
REPLICAS, STEP_CLIENTS, BEFORE_S, STEP_S, AFTER_S = 3, 32, 12, 45, 40


def arguments(**changes):
    """Every core for the cross-encoder, no shedding: a closed loop waits for itself."""
    plain = {"cache": OUT / "cache", "threads": os.cpu_count(), "max_queued_pairs": 100_000, "deadline_ms": 120_000}
    return AppArgs(**plain | changes)


def measure_sample(clients=CLIENTS, others=()):
    """Searches of the sample index, `others` (route, clients, bodies, pairs), and the bare model on the searches' pairs.

    One and sixteen clients are measured between two runs of the bare model, whose mean counts, again and again, since a machine's
    speed drifts; the app, idle by then, is there all the while.
    """
    args, bodies = arguments(), searches(BUDGET, ROUNDS)
    index = open_index(args)
    with Served(args) as served:
        answers = [httpx.post(f"{URL}/v1/search", json={**body, "trace": True}, timeout=60).json() for body in bodies]
        rounds = [[index.corpus.items.index_of[item["id"]] for item in part["scored"]] for a in answers for part in a["trace"]]
        replay = Replay(args, index.corpus.items.full_texts, [body["query"] for body in bodies], rounds)
        beside, bare = [], replay.measure()
        for _ in range(REPEATS):
            loads = {str(n): served.measure("/v1/search", n, bodies, BUDGET) for n in (1, 16)}
            before, bare = bare, replay.measure()
            beside.append({"bare": {name: round((before[name] + bare[name]) / 2, 1) for name in bare}} | loads)
        rows = [served.measure("/v1/search", n, bodies, BUDGET) for n in clients]
        rows += [served.measure(*other) for other in others]
    timing = medians([answer["timing_ms"] for answer in answers])
    return {"rows": rows, "timing_ms": timing, "beside_the_bare_model": beside}


def measure_house():
    """One client's searches with a cross-encoder that costs nothing: what the app around it takes."""
    args, bodies = arguments(cross_encoder="python:tests.benchmarks.stand_in:SharedWords"), searches(BUDGET, ROUNDS)
    with Served(args) as served:
        served.measure("/v1/search", 1, bodies, BUDGET)
        rows = [served.measure("/v1/search", 1, bodies, BUDGET) for _ in range(REPEATS)]
        timing = [httpx.post(f"{URL}/v1/search", json=body, timeout=60).json()["timing_ms"] for body in bodies]
    return {"rows": rows, "timing_ms": medians(timing)}


def medians(timing):
    """Of the parts of several searches, in milliseconds."""
    return {name: round(float(np.median([parts[name] for parts in timing])), 1) for name in timing[0]}


class Replay:
    """The bare model on the same pairs, with the same threads, in this process."""

    def __init__(self, args, texts, queries, rounds):
        torch.set_num_threads(args.threads)
        self._model = open_cross_encoder(args)
        self._items, self._queries = self._model.tokenize(texts), self._model.tokenize_queries(queries)
        self._rounds = [np.array(items_of_round, dtype=np.int32) for items_of_round in rounds]
        self._query_of = np.repeat(np.arange(len(queries), dtype=np.int32), ROUNDS)
        self._score(0, self._rounds[0])

    def _score(self, query, items):
        self._model.score_pairs(self._queries, self._items, np.broadcast_to(query, items.shape).astype(np.int32), items)

    def measure(self):
        """Round by round as a search needs them, and all at once as the offline stage does."""
        start = time.monotonic()
        for query, part in zip(self._query_of, self._rounds, strict=True):
            self._score(query, part)
        by_round = time.monotonic() - start
        whole = np.repeat(self._query_of, [len(part) for part in self._rounds])
        start, begun = time.monotonic(), time.process_time()
        self._score(whole, np.concatenate(self._rounds))
        at_once, computed = time.monotonic() - start, time.process_time() - begun
        return {
            "ms_per_search": round(1000 * by_round * ROUNDS / len(self._rounds), 1),
            "offline_pairs_per_second": round(len(whole) / at_once, 1),
            "offline_pairs_per_cpu_second": round(len(whole) / computed, 1),
        }


def measure_million():
    """Searches of a synthetic index of 1,000,000 items x 384 in 8 bits."""
    folder = OUT / "million"
    if not (folder / "bayes" / "manifest.json").is_file():
        make_million(folder)
    args = arguments(index=str(folder))
    prepare_items(open_index(args).corpus.items, open_cross_encoder(args), args.cache)  # minutes that a replica would take
    with Served(args) as served:
        timing = [httpx.post(f"{URL}/v1/search", json=body, timeout=60).json()["timing_ms"] for body in searches(BUDGET, ROUNDS)]
        rows = [served.measure("/v1/search", clients, searches(BUDGET, ROUNDS), BUDGET) for clients in CLIENTS]
    return {"rows": rows, "timing_ms": medians(timing)}


def rerank_bodies():
    """Requests to rerank 32 documents, which both servers read."""
    texts = read_items(ITEMS, ["verb"]).full_texts
    bodies = [{"query": body["query"], "model": "merged"} for body in searches(BUDGET, ROUNDS)]
    return [{**body, "documents": texts[i * 200 : i * 200 + DOCUMENTS]} for i, body in enumerate(bodies)]


def measure_rerank():
    """`/v1/rerank` with the sample's cross-encoder merged into one model."""
    save_merged(OUT / "merged")
    with Served(arguments(cross_encoder=str(OUT / "merged"))) as served:
        return {"rows": [served.measure("/v1/rerank", clients, rerank_bodies(), DOCUMENTS) for clients in CLIENTS]}


def measure_peer():
    """infinity-emb over the same folder, in bfloat16 and in float32, its default: warm-up, then the same load."""
    if not (OUT / "merged").is_dir():
        save_merged(OUT / "merged")
    rows = []
    for dtype in ("bfloat16", "float32"):
        settings = ["--model-id", str(OUT / "merged"), "--served-model-name", "merged", "--engine", "torch", "--device", "cpu"]
        where = ["--host", "127.0.0.1", "--port", str(PEER_PORT), "--dtype", dtype, "--no-bettertransformer"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
        with Peer([str(PEER), "v2", *settings, *where], environment):
            measured = [measure(PEER_URL, "/rerank", clients, rerank_bodies(), DOCUMENTS, "peer") for clients in CLIENTS]
        rows += [{"dtype": dtype, **row} for row in measured]
        sys.stdout.write("".join(f"{row}\n" for row in rows[-len(CLIENTS) :]))
    return {"server": "infinity-emb 0.0.78", "rows": rows}


def measure_settings():
    """Searches and reranks under the settings of Serve that this process has in its environment, beside the bare model."""
    return measure_sample((), [("/v1/rerank", 16, rerank_bodies(), DOCUMENTS)])


def measure_autoscaling():
    """A step of load from 1 client to 32 and back, 1 to 3 cross-encoder replicas of one thread each, by pairs in the house."""
    from ray import serve

    scaling = {"min_replicas": 1, "max_replicas": REPLICAS, "policy": {"policy_function": "serve_app.scaling:by_pending_pairs"}}
    scaling |= {"upscale_delay_s": 2, "downscale_delay_s": 10, "look_back_period_s": 4}
    deployments = [{"name": "CrossEncoder", "autoscaling_config": scaling}]
    samples, stop, start = [], threading.Event(), time.time()

    def watch():
        while not stop.wait(0.5):
            states = serve.status().applications["axn"].deployments["CrossEncoder"].replica_states
            samples.append((round(time.time() - start, 2), states.get("RUNNING", 0)))

    with Served(arguments(threads=1), deployments):
        watcher = threading.Thread(target=watch)
        start = time.time()
        watcher.start()
        steady = start_load(f"{URL}/v1/search", 1, BEFORE_S + STEP_S + AFTER_S, searches(BUDGET, ROUNDS))
        time.sleep(BEFORE_S)
        step = end_load(start_load(f"{URL}/v1/search", STEP_CLIENTS, STEP_S, searches(BUDGET, ROUNDS)))
        loads = [end_load(steady), step]
        stop.set()
        watcher.join()
    answers = sorted(
        (round(e - start, 2), round(1000 * s)) for load in loads for e, s in zip(load["ended"], load["seconds"], strict=True)
    )
    return {"scaling": scaling, "replicas": samples, "answers": answers}


def draw_autoscaling(kept):
    """Replicas over time, above the latency of every answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.step(*zip(*kept["replicas"], strict=True), where="post", color="#4477AA")
    above.set(ylabel="CE replicas running", yticks=range(REPLICAS + 1), ylim=(0, REPLICAS + 0.3))
    below.plot(*zip(*kept["answers"], strict=True), ".", markersize=3, color="#EE6677")
    below.set(ylabel="ms of a search", yscale="log", xlabel="seconds")
    for axes in (above, below):
        axes.axvspan(BEFORE_S, BEFORE_S + STEP_S, color="#BBBBBB", alpha=0.3, linewidth=0)
        axes.grid(alpha=0.3, linewidth=0.6)
    above.set_title(f"1 client, with {STEP_CLIENTS} more from {BEFORE_S} s on for {STEP_S} s (grey)", fontsize=10)
    figure.savefig(DOCS / "serve_autoscaling.png", dpi=120)


SECTIONS = {
    "sample": measure_sample,
    "rerank": measure_rerank,
    "peer": measure_peer,
    "million": measure_million,
    "autoscaling": measure_autoscaling,
    "house": measure_house,
    "tuned": measure_settings,
    "haproxy": measure_settings,
}


def headline(kept):
    """The figures that the targets are about, as far as they were measured: medians of what stood beside each other."""
    figures = {}
    for name, ends in (("sample", ""), ("tuned", "_tuned"), ("haproxy", "_haproxy")):
        if name in kept:
            beside = kept[name]["beside_the_bare_model"]
            found = {
                "overhead_ms_1": [part["1"]["mean_ms"] - part["bare"]["ms_per_search"] for part in beside],
                "allowed_ms_1": [0.15 * part["bare"]["ms_per_search"] + 10 for part in beside],
                "share_of_offline_16": [
                    part["16"]["pairs_per_second"] / part["bare"]["offline_pairs_per_second"] for part in beside
                ],
                "share_by_cpu_second_16": [
                    part["16"]["pairs_per_cpu_second"] / part["bare"]["offline_pairs_per_cpu_second"] for part in beside
                ],
            }
            for figure, values in found.items():
                low, middle, high = np.quantile(values, (0, 0.5, 1)).round(1 if "_ms_" in figure else 3).tolist()
                figures[f"{figure}{ends}"] = middle
                figures[f"{figure}{ends}_range"] = [low, high]
    if "house" in kept:
        figures["house_ms_1"] = round(float(np.median([row["mean_ms"] for row in kept["house"]["rows"]])), 1)
    if "million" in kept:
        figures["million_p50_ms_1"] = kept["million"]["rows"][0]["p50_ms"]
    if {"rerank", "peer"} <= set(kept):
        ours, peer = (max(r["per_second"] for r in kept[name]["rows"] if r["clients"] == 16) for name in ("rerank", "peer"))
        figures["rerank_times_peer_16"] = round(ours / peer, 2)  # in the dtype that the peer is faster in
        if "haproxy" in kept:
            behind = {(row["route"], row["clients"]): row["per_second"] for row in kept["haproxy"]["rows"]}
            figures["rerank_times_peer_16_haproxy"] = round(behind["/v1/rerank", 16] / peer, 2)
    if "autoscaling" in kept:
        figures["most_replicas"] = max(n for _, n in kept["autoscaling"]["replicas"])
    return figures


def main():
    """Run the sections that are named, or missing, then record all that are kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--here", action="store_true", help="measure the one section in this process")
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if asked.here:
        (name,) = asked.sections
        (OUT / f"{name}.json").write_text(json.dumps(SECTIONS[name]()))
        return
    for name in asked.sections or [name for name in SECTIONS if not (OUT / f"{name}.json").is_file()]:
        command = [sys.executable, "-m", "tests.benchmarks.serve", "--here", name]
        subprocess.run(command, env=os.environ | ENVIRONMENTS.get(name, {}), check=True)
    kept = {name: json.loads((OUT / f"{name}.json").read_text()) for name in SECTIONS if (OUT / f"{name}.json").is_file()}
    if "autoscaling" in kept:
        draw_autoscaling(kept["autoscaling"])
    note = "share_at_work counts the batches of the uncounted first requests too, and so may exceed 1"
    settings = {
        "note": note,
        "budget": BUDGET,
        "rounds": ROUNDS,
        "documents": DOCUMENTS,
        "threads": os.cpu_count(),
        "environments": {"tuned": TUNED, "haproxy": TUNED | HAPROXY | {"RAY_SERVE_HAPROXY_BINARY_PATH": "axn-haproxy"}},
    }
    record("serve", {"settings": settings, **kept}, **headline(kept))


if __name__ == "__main__":
    main()
