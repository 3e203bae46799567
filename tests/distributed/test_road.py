"""The whole road on a cluster of three nodes, one with (logical) GPUs, and through `ray job submit` under a token."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.factorization import fit_closed_form
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.score_store import load_scores
from axn_ray.core.searcher import SearchConfig, Searcher
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.embed_views import open_views
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from serve_app.app import build_app
from serve_app.config import AppArgs

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parent.parent.parent
WORLD = EmbedConfig(world=["adj.ppl"], train_queries=20, workers=2)
NODE = {"object_store_memory": 100 * 2**20}


@pytest.fixture
def three_nodes():
    """A head, a node with CPUs and one with two logical GPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    join_cluster()
    cluster.add_node(**NODE, num_cpus=4)
    gpu_node = cluster.add_node(**NODE, num_cpus=2, num_gpus=2)
    cluster.wait_for_nodes()
    yield gpu_node.node_id
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def test_embed_score_factorize_evaluate_serve_on_three_nodes(three_nodes, tmp_path):
    corpus = embed(WORLD, tmp_path / "embeddings")
    sealed = score(corpus, ScoreConfig(per_query=20, shard_pairs=100), tmp_path / "scores")
    assert sealed.counts["pairs"] == 400
    worked_on = {json.loads(path.read_text())["node"] for path in (tmp_path / "scores/shards").glob("*.json")}
    assert worked_on == {three_nodes[:12]}, "cross-encoders belong on the node that has GPUs"
    observed = load_scores(tmp_path / "scores")
    rows = [corpus.queries.index_of[query_id] for query_id in observed.query_ids]
    items, scores = observed.matrix.row(3)
    alone = CrossEncoder(ScoreConfig()).score_texts(
        [corpus.queries.texts[rows[3]]] * len(items), [corpus.items.full_texts[item] for item in items]
    )
    np.testing.assert_allclose(scores, alone, atol=0.15)  # bfloat16 rounds other batches otherwise

    settings = FactorizationConfig(method="bayes")
    fitted = factorize_scores(tmp_path / "embeddings", tmp_path / "scores", settings, tmp_path / "bayes", num_workers=3)
    views = open_views(None, corpus, ScoreConfig().cross_encoder, tmp_path / "views", workers=1, threads=1)  # not made again
    inputs = FitInputs(observed.matrix, np.asarray(corpus.item_embeddings), np.asarray(corpus.query_embeddings[rows]))
    twin = fit_closed_form(inputs, inputs.fit_scale(), settings, views)
    mine, theirs = (
        part.embed_queries(corpus.query_embeddings) @ np.asarray(part.item_embeddings, np.float32).T for part in (fitted, twin)
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-2)

    score(corpus, ScoreConfig(split="test", choice="all"), tmp_path / "truth")
    plan = EvaluateConfig(methods=["rnr_de", "axn_bayes"], budgets=[20], rounds=[4], k=[1, 10])
    summary = examine(plan, tmp_path / "embeddings", tmp_path / "truth", {"bayes": tmp_path / "bayes"}, tmp_path / "evaluation")
    assert {row["ce_calls"] for row in summary} == {20}
    assert all(0 <= row["recall"] <= 1 for row in summary)

    query = corpus.queries.texts[int(corpus.rows_of("test")[0])]
    exact = {"dtype": "float32"}  # bfloat16 rounds otherwise on another number of threads
    searcher = Searcher(corpus, tmp_path / "bayes", SearchConfig(budget=20, rounds=4, top_k=20, **exact))
    expected = searcher.hits(searcher.search(query))
    answer = ask_served(AppArgs(index=str(tmp_path), cache=tmp_path / "cache", **exact), query, budget=20, rounds=4)
    assert answer["usage"]["ce_calls"] == 20
    assert answer["degraded"] == {"deadline": False, "scorer_error": False, "rounds_done": 4}
    assert [(hit["id"], hit["round"]) for hit in answer["results"]] == [(hit.item_id, hit.round) for hit in expected]
    np.testing.assert_allclose([hit["score"] for hit in answer["results"]], [hit.score for hit in expected], atol=1e-4)


def ask_served(args, query, budget, rounds):
    """The reply of the app on the cluster of the test to one search over HTTP."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    serve.run(build_app(args), name="axn")
    body = {"query": query, "top_k": budget, "budget": {"ce_calls": budget, "rounds": rounds}}
    return httpx.post(f"http://127.0.0.1:{port}/v1/search", json=body, timeout=60).raise_for_status().json()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def started_cluster(tmp_path):
    """A cluster as `ray start` makes it, with token authentication on: (dashboard address, environment with the token)."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-and-of-no-other-cluster"}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port", str(free_port()), "--num-cpus=8"]
    command += [
        "--dashboard-port",
        str(port),
        "--dashboard-agent-listen-port",
        str(free_port()),
        "--object-store-memory",
        str(200 * 2**20),
        "--disable-usage-stats",
    ]
    with (tmp_path / "ray.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        yield address, environment
    finally:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()
        process.wait()


def submit(address, environment, entrypoint):
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address, "--working-dir", str(ROOT)]
    command += ["--", "bash", "-c", entrypoint]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def test_jobs_submitted_to_a_started_cluster_with_a_token(started_cluster, tmp_path):
    address, environment = started_cluster
    stages = [
        f"embed --world adj.ppl --train-queries 20 --out {tmp_path}/embeddings",
        f"score --embeddings {tmp_path}/embeddings --per-query 20 --out {tmp_path}/scores",
        f"factorize --embeddings {tmp_path}/embeddings --scores {tmp_path}/scores --views ce --out {tmp_path}/bayes",
    ]
    entrypoint = " && ".join(f"{sys.executable} -m jobs.{stage}" for stage in stages)
    begun = time.monotonic()
    while "submitted successfully" not in (done := submit(address, environment, entrypoint)).stdout:
        assert time.monotonic() - begun < 90, done.stderr  # the cluster is still coming up until then
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert load_scores(tmp_path / "scores").matrix.n_observed == 400
    assert (tmp_path / "bayes/manifest.json").exists()
    refused = submit(address, environment | {"RAY_AUTH_TOKEN": "another-token-of-as-many-characters-as-the-first"}, "true")
    assert refused.returncode != 0 and "submitted successfully" not in refused.stdout
