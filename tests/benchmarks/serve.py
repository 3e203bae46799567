"""`make bench-serve`: what a search costs over HTTP, beside the bare cross-encoder on the very same pairs.

Sample index, one replica of each deployment, load from a second process on loopback, closed loop. B = 100, R = 5.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import torch

from axn_ray import sample
from axn_ray.core.corpus import read_queries
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.distributed.cluster import join_cluster
from serve_app.config import AppArgs
from serve_app.index_folder import open_index
from tests.benchmarks.common import record

OUT = Path("runs/bench-serve")
URL = "http://127.0.0.1:8017"
CLIENTS = (1, 4, 16, 64)
SECONDS = 6.0
BUDGET, ROUNDS, DOCUMENTS = 100, 5, 32
REPEATS = 2


def main():
    """Serve, load, and replay the same pairs without Serve."""
    threads = os.cpu_count() or 1
    args = AppArgs(cache=OUT / "cache", threads=threads, max_queued_pairs=100_000, deadline_ms=120_000)
    index = open_index(args)
    queries = read_queries(sample.QUERIES, ["verb"], split="dev").texts[:32]
    searches = [{"query": query, "budget": {"ce_calls": BUDGET, "rounds": ROUNDS}} for query in queries]
    texts = index.corpus.items.full_texts
    reranks = [{"query": query, "documents": texts[i * 200 : i * 200 + DOCUMENTS]} for i, query in enumerate(queries)]
    with Served(args) as served:
        traces = [httpx.post(f"{URL}/v1/search", json={**body, "trace": True}, timeout=60).json()["trace"] for body in searches]
        rows = [served.measure("/v1/search", clients, searches, BUDGET) for clients in CLIENTS]
        rows += [served.measure("/v1/rerank", clients, reranks, DOCUMENTS) for clients in (1, 16)]
    rounds = [[index.corpus.items.index_of[item["id"]] for item in part["scored"]] for trace in traces for part in trace]
    bare = replay(args, texts, queries, rounds)
    by_clients = {row["clients"]: row for row in rows if row["route"] == "/v1/search"}
    overhead_ms = by_clients[1]["mean_ms"] - bare["ms_per_search"]
    record(
        "serve",
        {
            "settings": {"budget": BUDGET, "rounds": ROUNDS, "threads": threads, "documents": DOCUMENTS},
            "rows": rows,
            "bare": bare,
        },
        p50_ms_1=by_clients[1]["p50_ms"],
        overhead_ms_1=round(overhead_ms, 1),
        overhead_share_1=round(overhead_ms / bare["ms_per_search"], 3),
        searches_per_second_16=by_clients[16]["per_second"],
        share_of_offline_16=round(by_clients[16]["pairs_per_second"] / bare["offline_pairs_per_second"], 3),
    )


class Served:
    """The app on a Ray of its own."""

    def __init__(self, args):
        self._args = args

    def __enter__(self):
        from ray import serve

        from serve_app.app import build_app

        join_cluster()
        serve.start(http_options={"host": "127.0.0.1", "port": httpx.URL(URL).port}, logging_config={"enable_access_log": False})
        serve.run(build_app(self._args), name="axn")
        self._cross_encoder = serve.get_deployment_handle("CrossEncoder", app_name="axn")
        return self

    def __exit__(self, *_):
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()

    def measure(self, route, clients, bodies, pairs):
        """One row: latency, rate and batch fill of a closed loop."""
        before = self._cross_encoder.statistics.remote().result()
        command = [sys.executable, "-m", "tests.benchmarks.load", f"{URL}{route}", str(clients), str(SECONDS)]
        done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=True)
        after = self._cross_encoder.statistics.remote().result()
        facts = json.loads(done.stdout)
        milliseconds = 1000 * np.array(facts["seconds"])
        assert set(facts["statuses"]) == {200}, set(facts["statuses"])
        batches = after["batches"] - before["batches"]
        per_second = len(milliseconds) / facts["took"]
        row = {
            "route": route,
            "clients": clients,
            "requests": len(milliseconds),
            "mean_ms": round(float(milliseconds.mean()), 1),
            "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
            "p99_ms": round(float(np.percentile(milliseconds, 99)), 1),
            "per_second": round(per_second, 2),
            "pairs_per_second": round(per_second * pairs, 1),
            "pairs_per_batch": round((after["pairs"] - before["pairs"]) / batches, 1),
            "batch_fill": round((after["tokens"] - before["tokens"]) / batches / self._args.batch_tokens, 3),
        }
        sys.stdout.write(f"{row}\n")
        return row


def replay(args, texts, queries, rounds):
    """Bare model, same threads, same pairs: round by round as a search needs them, and all at once as the offline stage does."""
    torch.set_num_threads(args.threads)
    model = open_cross_encoder(args)
    items, prepared = model.tokenize(texts), model.tokenize_queries(queries)
    query_of = np.repeat(np.arange(len(queries), dtype=np.int32), ROUNDS)
    chosen = [np.array(items_of_round, dtype=np.int32) for items_of_round in rounds]
    model.score_pairs(prepared, items, np.zeros_like(chosen[0]), chosen[0])
    by_round, at_once = [], []
    for _ in range(REPEATS):
        start = time.monotonic()
        for query, part in zip(query_of, chosen, strict=True):
            model.score_pairs(prepared, items, np.full_like(part, query), part)
        by_round.append(time.monotonic() - start)
        start = time.monotonic()
        model.score_pairs(prepared, items, np.repeat(query_of, [len(part) for part in chosen]), np.concatenate(chosen))
        at_once.append(time.monotonic() - start)
    pairs = sum(map(len, chosen))
    return {
        "ms_per_search": round(1000 * min(by_round) / len(queries), 1),
        "round_by_round_pairs_per_second": round(pairs / min(by_round), 1),
        "offline_pairs_per_second": round(pairs / min(at_once), 1),
        "repeats": {"by_round_s": [round(s, 2) for s in by_round], "at_once_s": [round(s, 2) for s in at_once]},
    }


if __name__ == "__main__":
    main()
