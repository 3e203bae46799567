"""What bench-serve serves: the app in this process's own Ray, a synthetic index of a million items, a peer; and one row."""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet

from axn_ray import sample
from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.closed_form import LARGEST
from axn_ray.core.corpus import Items, read_items, read_queries
from axn_ray.core.cross_encoder import load_adapter_or_model
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.factorization import Factorization, save_factorization
from axn_ray.core.models import MINILM
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.distributed.cluster import join_cluster
from serve_app.index_folder import open_index
from tests.benchmarks.process_tree import cpu_seconds
from tests.serve_app.deploying import deploy

OUT = Path("runs/bench-serve")
PORT, PEER_PORT = 8017, 8018
URL, PEER_URL = f"http://127.0.0.1:{PORT}", f"http://127.0.0.1:{PEER_PORT}"
SECONDS = 12.0
DIM, CHUNK = 384, 100_000


class Served:
    """The app on a Ray of its own; `deployments` as in a Serve config."""

    def __init__(self, args, deployments=()):
        self._args, self._deployments = args, deployments

    def __enter__(self):
        from ray import serve

        open_index(self._args)  # makes the sample's, where it is not kept; a deployment has a minute to start
        join_cluster()
        deploy(self._args, PORT, self._deployments)
        self._cross_encoder = serve.get_deployment_handle("CrossEncoder", app_name="axn")
        self._cross_encoder.statistics.remote().result()
        return self

    def __exit__(self, *_):
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()

    def measure(self, route, clients, bodies, pairs):
        """One row with the batches of the cross-encoder."""
        before, computed = self._cross_encoder.statistics.remote().result(), cpu_seconds()["CrossEncoder"]
        row = measure(URL, route, clients, bodies, pairs)
        after, computed = self._cross_encoder.statistics.remote().result(), cpu_seconds()["CrossEncoder"] - computed
        batches = after["batches"] - before["batches"]
        row["pairs_per_cpu_second"] = round((after["pairs"] - before["pairs"]) / computed, 1)
        row["pairs_per_batch"] = round((after["pairs"] - before["pairs"]) / batches, 1)
        row["share_at_work"] = round((after["seconds_at_work"] - before["seconds_at_work"]) / row.pop("took"), 3)
        row["batch_fill"] = round((after["tokens"] - before["tokens"]) / batches / self._args.batch_tokens, 3)
        sys.stdout.write(f"{row}\n")
        return row


def start_load(url, clients, seconds, bodies):
    """A process of closed-loop clients."""
    command = [sys.executable, "-m", "tests.benchmarks.load", url, str(clients), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(bodies))
    process.stdin.close()
    return process


def end_load(process):
    """What the clients saw; nothing but 200 is let pass."""
    facts = json.loads(process.stdout.read())
    process.wait()
    assert set(facts["statuses"]) == {200}, set(facts["statuses"])
    return facts


def measure(url, route, clients, bodies, pairs, rest="ray"):
    """One row: latency and rate of a closed loop, and how many cores each kind of process took meanwhile (`cpu_seconds`)."""
    before, begun = cpu_seconds(rest), time.monotonic()
    facts = end_load(start_load(f"{url}{route}", clients, SECONDS, bodies))
    elapsed, after = time.monotonic() - begun, cpu_seconds(rest)
    milliseconds = 1000 * np.array(facts["seconds"])
    per_second = len(milliseconds) / facts["took"]
    return {
        "route": route,
        "clients": clients,
        "requests": len(milliseconds),
        "mean_ms": round(float(milliseconds.mean()), 1),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
        "p99_ms": round(float(np.percentile(milliseconds, 99)), 1),
        "per_second": round(per_second, 2),
        "pairs_per_second": round(per_second * pairs, 1),
        "cores": {kind: round((seconds - before.get(kind, 0.0)) / elapsed, 2) for kind, seconds in after.items()},
        "took": round(facts["took"], 2),
    }


def searches(budget, rounds):
    """Bodies of searches with held-out queries of the sample."""
    queries = read_queries(sample.QUERIES, ["verb"], split="dev").texts[:32]
    return [{"query": query, "budget": {"ce_calls": budget, "rounds": rounds}} for query in queries]


def make_million(folder, n_items=1_000_000):
    """The sample's texts, over and over, with random embeddings of items: as large as a real index, and as long to read."""
    known, ids = read_items(sample.ITEMS), tuple(map(str, range(n_items)))
    places = np.arange(n_items) % len(known)
    items = Items(ids, *(tuple(column[place] for place in places) for column in (known.titles, known.texts)))
    queries = read_queries(sample.QUERIES, ["verb"], split="dev").take(range(32))
    rng = np.random.default_rng(0)
    made_from = {"items": items.fingerprint}
    described = Manifest(kind="embeddings", config={"dual_encoder": MINILM}, counts={"items": n_items}, made_from=made_from)
    with new_artifact(folder / "embeddings", described) as aside:
        embeddings = np.lib.format.open_memmap(aside / "item_embeddings.npy", "w+", np.float32, (n_items, DIM))
        for start in range(0, n_items, CHUNK):
            part = rng.standard_normal((min(CHUNK, n_items - start), DIM), dtype=np.float32)
            embeddings[start : start + CHUNK] = part / np.linalg.norm(part, axis=1, keepdims=True)
        columns = {"item_id": items.ids, "title": items.titles, "text": items.texts}
        pyarrow.parquet.write_table(pyarrow.table(columns), aside / "items.parquet")
        columns = {"query_id": queries.ids, "text": queries.texts, "split": ["dev"] * len(queries)}
        pyarrow.parquet.write_table(pyarrow.table(columns), aside / "queries.parquet")
        np.save(aside / "query_embeddings.npy", DualEncoder(MINILM).embed_queries(queries.texts))
    steps = np.max([np.abs(embeddings[start : start + CHUNK]).max(0) for start in range(0, n_items, CHUNK)], 0) / LARGEST
    rounded = np.concatenate([np.rint(embeddings[at : at + CHUNK] / steps).astype(np.int8) for at in range(0, n_items, CHUNK)])
    learned = {"query_map": np.eye(DIM, DIM + 1, dtype=np.float32) * steps[:, None], "prior_variance": np.square(steps)}
    fitted = Factorization(rounded, ScoreScale(0.0, 0.05), noise_variance=0.5, **learned)
    counts = {"items": n_items, "dim": DIM, "scale_alpha": 0.0, "scale_beta": 0.05, "noise_variance": 0.5}
    described = Manifest(kind="factorization", config={"method": "bayes"}, counts=counts, made_from=made_from)
    with new_artifact(folder / "bayes", described) as aside:
        save_factorization(aside, fitted)


def save_merged(folder):
    """The sample's cross-encoder as one ordinary model, which any server loads."""
    model, tokenizer = load_adapter_or_model(sample.CROSS_ENCODER)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Peer:
    """Another server of the same weights, started by a command and ready when it answers."""

    def __init__(self, command, environment):
        self._command, self._environment = command, environment

    def __enter__(self):
        with (OUT / "peer.log").open("w") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        for _ in range(120):
            try:
                if httpx.get(f"{PEER_URL}/health", timeout=2).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            assert self._process.poll() is None, (OUT / "peer.log").read_text()[-2000:]
            time.sleep(1)
        raise SystemExit(f"the peer does not answer; see {OUT / 'peer.log'}")

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait()
