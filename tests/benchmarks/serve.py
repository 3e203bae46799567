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
REPEATS = 3
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
    """Searches of the sample index, `others` (route, clients, bodies, pairs), then the bare model on the searches' pairs."""
    args, bodies = arguments(), searches(BUDGET, ROUNDS)
    index = open_index(args)
    with Served(args) as served:
        answers = [httpx.post(f"{URL}/v1/search", json={**body, "trace": True}, timeout=60).json() for body in bodies]
        rows = [served.measure("/v1/search", n, bodies, BUDGET) for n in clients]
        rows += [served.measure(*other) for other in others]
    parts = {name: round(float(np.median([a["timing_ms"][name] for a in answers])), 1) for name in answers[0]["timing_ms"]}
    rounds = [[index.corpus.items.index_of[item["id"]] for item in part["scored"]] for a in answers for part in a["trace"]]
    queries = [body["query"] for body in bodies]
    return {"rows": rows, "timing_ms": parts, "bare": replay(args, index.corpus.items.full_texts, queries, rounds)}


def replay(args, texts, queries, rounds):
    """Bare model, same threads, same pairs: round by round as a search needs them, and all at once as the offline stage does."""
    torch.set_num_threads(args.threads)
    model = open_cross_encoder(args)
    items, prepared = model.tokenize(texts), model.tokenize_queries(queries)
    query_of = np.repeat(np.arange(len(queries), dtype=np.int32), ROUNDS)
    chosen = [np.array(items_of_round, dtype=np.int32) for items_of_round in rounds]
    model.score_pairs(prepared, items, np.zeros_like(chosen[0]), chosen[0])
    by_round, at_once, computed = [], [], []
    for _ in range(REPEATS):
        start = time.monotonic()
        for query, part in zip(query_of, chosen, strict=True):
            model.score_pairs(prepared, items, np.full_like(part, query), part)
        by_round.append(time.monotonic() - start)
        start, begun = time.monotonic(), time.process_time()
        model.score_pairs(prepared, items, np.repeat(query_of, [len(part) for part in chosen]), np.concatenate(chosen))
        at_once.append(time.monotonic() - start)
        computed.append(time.process_time() - begun)
    pairs = sum(map(len, chosen))
    return {
        "ms_per_search": round(1000 * min(by_round) / len(queries), 1),
        "round_by_round_pairs_per_second": round(pairs / min(by_round), 1),
        "offline_pairs_per_second": round(pairs / min(at_once), 1),
        "offline_pairs_per_cpu_second": round(pairs / min(computed), 1),
        "repeats": {"by_round_s": [round(s, 2) for s in by_round], "at_once_s": [round(s, 2) for s in at_once]},
    }


def measure_million():
    """Searches of a synthetic index of 1,000,000 items x 384 in float16."""
    folder = OUT / "million"
    if not (folder / "bayes" / "manifest.json").is_file():
        make_million(folder)
    args = arguments(index=str(folder))
    prepare_items(open_index(args).corpus.items, open_cross_encoder(args), args.cache)  # minutes that a replica would take
    with Served(args) as served:
        timing = [httpx.post(f"{URL}/v1/search", json=body, timeout=60).json()["timing_ms"] for body in searches(BUDGET, ROUNDS)]
        rows = [served.measure("/v1/search", clients, searches(BUDGET, ROUNDS), BUDGET) for clients in CLIENTS]
    return {"rows": rows, "timing_ms": {name: round(float(np.median([t[name] for t in timing])), 1) for name in timing[0]}}


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
    """infinity-emb over the same folder, in bfloat16 as ours and in float32, its default: warm-up, then the same load."""
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
    return measure_sample((1, 16), [("/v1/rerank", 16, rerank_bodies(), DOCUMENTS)])


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
    "tuned": measure_settings,
    "haproxy": measure_settings,
}


def headline(kept):
    """The figures that the targets are about, as far as they were measured."""
    figures = {}
    for name, ends in (("sample", ""), ("tuned", "_tuned"), ("haproxy", "_haproxy")):
        if name in kept:
            rows, bare = {row["clients"]: row for row in kept[name]["rows"] if row["route"] == "/v1/search"}, kept[name]["bare"]
            figures[f"overhead_ms_1{ends}"] = round(rows[1]["mean_ms"] - bare["ms_per_search"], 1)
            figures[f"allowed_ms_1{ends}"] = round(0.15 * bare["ms_per_search"] + 10, 1)
            share = rows[16]["pairs_per_second"] / bare["offline_pairs_per_second"]
            alike = rows[16]["pairs_per_cpu_second"] / bare["offline_pairs_per_cpu_second"]
            figures |= {f"share_of_offline_16{ends}": round(share, 3), f"share_by_cpu_second_16{ends}": round(alike, 3)}
    if "million" in kept:
        figures["million_p50_ms_1"] = kept["million"]["rows"][0]["p50_ms"]
    if {"rerank", "peer"} <= set(kept):
        ours, peer = ({row["clients"]: row["per_second"] for row in kept[name]["rows"][:4]} for name in ("rerank", "peer"))
        figures["rerank_times_peer_16"] = round(ours[16] / peer[16], 2)
        if "haproxy" in kept:
            behind = {(row["route"], row["clients"]): row["per_second"] for row in kept["haproxy"]["rows"]}
            figures["rerank_times_peer_16_haproxy"] = round(behind["/v1/rerank", 16] / peer[16], 2)
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
