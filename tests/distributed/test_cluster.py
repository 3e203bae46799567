"""A real Ray cluster of several nodes in one machine: a node is killed while it scores, and not one score is lost."""

import threading
import time

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from axn_ray.core.corpus import Items, Queries
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.score_store import load_scores
from axn_ray.distributed import score as stage
from axn_ray.distributed.score import ScoreConfig

pytestmark = pytest.mark.cluster

FAST_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}


@pytest.fixture
def cluster():
    """A head and two more nodes; the driver sits on the head."""
    node = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": FAST_HEALTH_CHECK}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    others = [cluster.add_node(**node) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, others
    ray.shutdown()
    cluster.shutdown()


def score(corpus, config, out):
    """Run the stage and read what it wrote."""
    stage.score(corpus, config, out)
    return load_scores(out)


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    words = "run walk close open bank dog house river slow fast eat drink speak shut move stand".split()
    texts = tuple(" ".join(rng.choice(words, rng.integers(4, 30))) for _ in range(400))
    items, queries = Items(tuple(f"i{n}" for n in range(300)), ("",) * 300, texts[:300]), texts[300:]
    embeddings = rng.normal(size=(400, 8)).astype(np.float32)
    ids = tuple(f"q{n}" for n in range(100))
    return EmbeddedCorpus(items, Queries(ids, queries), ("train",) * 100, embeddings[:300], embeddings[300:], "given")


def test_a_node_that_dies_while_it_scores_costs_no_pair(cluster, corpus, tiny_cross_encoder, tmp_path):
    nodes, (doomed, _) = cluster
    config = ScoreConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32", choice="all", shard_pairs=600, workers=6)
    out, died_after = tmp_path / "scores", []

    def kill_once_shards_arrive():
        while len(list(out.glob("shards/*.json"))) < 3:
            time.sleep(0.05)
        died_after.append(len(list(out.glob("shards/*.json"))))
        nodes.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill_once_shards_arrive)
    killer.start()
    disturbed = score(corpus, config, out)
    killer.join(timeout=60)
    assert 3 <= died_after[0] < 50, "the node must die while shards are still to be scored"
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    undisturbed = score(corpus, config, tmp_path / "again")
    np.testing.assert_array_equal(disturbed.matrix.item_index, undisturbed.matrix.item_index)
    np.testing.assert_allclose(disturbed.dense(), undisturbed.dense(), atol=1e-6)
