"""A real Ray cluster of several nodes in one machine: drivers, workers and nodes die or join while it scores."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import ray
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from axn_ray.core.artifact import locate_folder
from axn_ray.core.score_store import load_scores, shard_path
from axn_ray.distributed import score as stage
from axn_ray.distributed.cluster import join_cluster
from axn_ray.errors import ArtifactError
from tests.distributed.scoring_driver import make_config, make_corpus, score_slowly

pytestmark = pytest.mark.cluster

FAST_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
N_SHARDS = 50


@pytest.fixture(scope="module")
def object_store():
    """A local server that speaks S3; its address is in the environment before Ray's workers inherit that."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    yield
    server.stop()


@pytest.fixture
def cluster(object_store):
    """A head and one more node; the driver sits on the head."""
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": FAST_HEALTH_CHECK}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    join_cluster()
    other = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    yield cluster, other
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed():
    return score_slowly(make_corpus())


def n_done(out):
    return len(list(out.glob("shards/*.json")))


def once_done(out, shards, act):
    """Start a thread that acts as soon as so many shards are done; its list holds how many there were."""
    seen = []

    def watch():
        while n_done(out) < shards:
            time.sleep(0.02)
        seen.append(n_done(out))
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread, seen


def kill_a_worker():
    """The process of one cross-encoder is gone, as by the kernel's hand."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "ScoreActor" in " ".join(process.cmdline()):
                process.kill()
                return
        except psutil.Error:
            continue
    raise AssertionError("no worker holds a cross-encoder")


def test_a_driver_killed_at_three_moments(cluster, undisturbed, tmp_path):
    out = tmp_path / "scores"
    command = [sys.executable, "-m", "tests.distributed.scoring_driver", str(out)]
    environment = os.environ | {"RAY_ADDRESS": cluster[0].address}
    done = []
    for shards in (0, 10, N_SHARDS):  # none is done, some are, all are and the manifest is missing
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
            while n_done(out) < shards or not (out.parent / ".scores.lock").exists():
                assert driver.poll() is None, "the driver must still run when it is killed"
                time.sleep(0.01)
            if shards == 10:
                with pytest.raises(ArtifactError, match="another run is writing"):
                    stage.score(make_corpus(), make_config(), out)
            driver.kill()
        done.append(n_done(out))
    assert done == sorted(done)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.parquet")}
    stage.score(make_corpus(), make_config(), out)
    np.testing.assert_array_equal(load_scores(out).dense(), undisturbed)
    assert {path: path.stat().st_mtime_ns for path in out.glob("shards/*.parquet")} == kept


def test_a_killed_worker_and_a_node_that_dies_cost_no_pair(cluster, undisturbed, tmp_path):
    nodes, doomed = cluster
    out = tmp_path / "scores"
    killer, killed_after = once_done(out, 3, kill_a_worker)
    remover, removed_after = once_done(out, 12, lambda: nodes.remove_node(doomed, allow_graceful=False))
    stage.score(make_corpus(), make_config(workers=4), out)
    killer.join(timeout=60)
    remover.join(timeout=60)
    assert killed_after[0] < N_SHARDS and removed_after[0] < N_SHARDS, "both must happen while shards are still to be scored"
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    np.testing.assert_array_equal(load_scores(out).dense(), undisturbed)


def test_a_node_that_joins_is_used(cluster, undisturbed, tmp_path):
    nodes, _ = cluster
    out, before = tmp_path / "scores", {node["NodeID"] for node in ray.nodes()}
    config = make_config("Slower", workers=6)  # four fit on the two nodes
    scoring = threading.Thread(target=stage.score, args=(make_corpus(), config, out))
    scoring.start()
    while n_done(out) < 2:
        assert scoring.is_alive()
        time.sleep(0.02)
    added_after = n_done(out)
    nodes.add_node(**NODE)  # in the main thread: it sets signal handlers
    scoring.join(timeout=300)
    assert added_after < N_SHARDS
    joined = {node["NodeID"][:12] for node in ray.nodes()} - {node[:12] for node in before}
    worked = {json.loads(path.read_text())["node"] for path in out.glob("shards/*.json")}
    assert joined & worked
    np.testing.assert_array_equal(load_scores(out).dense(), undisturbed)


def test_scores_on_an_object_store_are_finished_where_they_were_left(cluster, undisturbed):
    import s3fs

    s3fs.S3FileSystem().mkdir("bucket")
    out = locate_folder("s3://bucket/run/scores")
    stage.score(make_corpus(), make_config(), out)
    (out / "manifest.json").unlink()
    shard_path(out, 4).unlink()
    shard_path(out, 5).write_bytes(b"PAR1")
    stage.score(make_corpus(), make_config(), out)
    np.testing.assert_array_equal(load_scores(out).dense(), undisturbed)
