"""A node of the cluster goes while searches run: each is answered, whole, by the replicas that are left."""

import asyncio

import pytest
import ray
from ray.cluster_utils import Cluster

from serve_app.config import AppArgs
from tests.distributed.test_cluster import FAST_HEALTH_CHECK
from tests.serve_app.conftest import KNOWN, free_port, make_index
from tests.serve_app.deploying import deploy
from tests.serve_app.test_chaos import BODY, check, under_load
from tests.serve_app.test_load import run

pytestmark = pytest.mark.cluster
MEMORY = {"object_store_memory": 100 * 2**20}


@pytest.fixture
def nodes():
    """A head for the ingress and two more nodes, each with room for one retriever and one cross-encoder."""
    head = {**MEMORY, "num_cpus": 2, "include_dashboard": False, "resources": {"front": 1}, "_system_config": FAST_HEALTH_CHECK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    others = [cluster.add_node(num_cpus=2, resources={"back": 2}, **MEMORY) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, others
    ray.shutdown()
    cluster.shutdown()


def running():
    """Running replicas of each deployment."""
    from ray import serve

    deployments = serve.status().applications["axn"].deployments
    return {name: status.replica_states.get("RUNNING", 0) for name, status in deployments.items()}


def test_a_node_removed_under_load_costs_no_request(nodes, tmp_path):
    cluster, (doomed, _) = nodes
    index, port = make_index(tmp_path / "index"), free_port()
    args = AppArgs(index=str(index), cross_encoder=KNOWN, cache=tmp_path / "cache", batch_tokens=64, deadline_ms=120_000)
    back = {"num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 1, "resources": {"back": 1}}}
    front = {"name": "Ingress", "num_replicas": 1, "ray_actor_options": {"num_cpus": 1, "resources": {"front": 1}}}
    deploy(args, port, [front, {"name": "Retriever", **back}, {"name": "CrossEncoder", **back}])

    async def ask(client):
        assert running() == {"Ingress": 1, "Retriever": 2, "CrossEncoder": 2}  # one a node, by their resources
        expected = (await client.post("/v1/search", json=BODY, timeout=120)).json()

        async def disturb():
            await asyncio.to_thread(cluster.remove_node, doomed, allow_graceful=False)

        return await under_load(client, disturb), expected

    check(*run(ask, f"http://127.0.0.1:{port}"))
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    assert running() == {"Ingress": 1, "Retriever": 1, "CrossEncoder": 1}
