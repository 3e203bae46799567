"""Fits on a real Ray cluster of two nodes, one of which goes or comes on the way: they end where an undisturbed one does."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from axn_ray.core.closed_form import ItemFeatures, TrainData, fit_model
from axn_ray.core.factorization import fit
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.distributed import train_factorization
from axn_ray.distributed.bayes_fit import spread_on_ray
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.factorize import factorize_scores
from tests.distributed.fit_world import make_world, save_world
from tests.distributed.killing import training_workers, wait_until
from tests.distributed.test_bayes_fit import assert_same
from tests.distributed.test_cluster import FAST_HEALTH_CHECK, NODE
from tests.distributed.test_factorize import seconds_of_epochs

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(monkeypatch):
    """A head and one more node, each with room for one worker; the driver sits on the head."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
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


@pytest.mark.parametrize("method", ["mf_trns", "mf_ind"])
def test_a_lost_node_costs_no_epoch(cluster, tmp_path, method):
    nodes, doomed = cluster
    torch.set_num_threads(1)
    world, storage = make_world(), tmp_path / "storage"
    config = FactorizationConfig(method=method, learning_rate=3e-3, batch_size=256, epochs=10, patience=10)
    seen = []

    def lose_a_node():
        wait_until(lambda: list(storage.glob("*/checkpoint_manager_snapshot.json")) and len(training_workers()) == 2)
        seen.append(len(seconds_of_epochs(storage)))
        nodes.remove_node(doomed, allow_graceful=False)

    remover = threading.Thread(target=lose_a_node, daemon=True)
    remover.start()
    stored = save_world(tmp_path, *world)
    threads = NODE["num_cpus"]
    fitted = factorize_scores(*stored, config, tmp_path / "out", num_workers=(1, 2), threads=threads, storage=storage)
    remover.join(timeout=60)
    assert seen[0] < 10, "the node must be lost while epochs are still to be run"
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    expected = fit(*world, config)
    np.testing.assert_allclose(fitted.item_embeddings, expected.item_embeddings, atol=1e-5)
    assert fitted.record.epochs == expected.record.epochs
    assert fitted.record.held_out_rmse == pytest.approx(expected.record.held_out_rmse, rel=1e-4)


def test_a_node_that_joins_takes_its_part(monkeypatch, cluster, tmp_path):
    nodes, other = cluster
    nodes.remove_node(other)
    torch.set_num_threads(1)
    every_second = partial(train_factorization.ScalingConfig, elastic_resize_monitor_interval_s=1.0)  # not once a minute
    monkeypatch.setattr(train_factorization, "ScalingConfig", every_second)
    world, storage = make_world(), tmp_path / "storage"
    config = FactorizationConfig(method="mf_trns", learning_rate=3e-3, batch_size=256, epochs=40, patience=40)
    stored, threads = save_world(tmp_path, *world), NODE["num_cpus"]
    with ThreadPoolExecutor(1) as pool:
        run = partial(factorize_scores, *stored, config, tmp_path / "out", num_workers=(1, 2), threads=threads, storage=storage)
        fitting = pool.submit(run)
        wait_until(lambda: fitting.done() or list(storage.glob("*/checkpoint_manager_snapshot.json")))
        assert len(training_workers()) == 1
        nodes.add_node(**NODE)
        wait_until(lambda: fitting.done() or len(training_workers()) == 2)
        assert not fitting.done(), "the second worker must come while epochs are still to be run"
        fitted = fitting.result()
    expected = fit(*world, config)
    np.testing.assert_allclose(fitted.item_embeddings, expected.item_embeddings, atol=1e-5)
    assert fitted.record.epochs == expected.record.epochs


def computes_a_share(node):
    """Whether a process of the node is at a share of the E-step now."""
    workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    try:
        return any(worker.cmdline()[:1] == ["ray::_sum_share"] for worker in workers)
    except psutil.Error:  # one ended in the meantime
        return False


def test_shares_of_a_lost_node_are_computed_elsewhere(cluster):
    nodes, doomed = cluster
    torch.set_num_threads(1)
    matrix, items, queries = make_world(n_queries=2000, n_items=4000, dim=96, per_query=100)
    data = TrainData(ItemFeatures(items), queries, matrix, ScoreScale(-4.0, 0.3))
    lost_at_work = []

    def lose_a_node():
        wait_until(lambda: computes_a_share(doomed))
        nodes.remove_node(doomed, allow_graceful=False)
        lost_at_work.append(not fitted)

    fitted = []
    remover = threading.Thread(target=lose_a_node, daemon=True)
    remover.start()
    fitted.append(fit_model(data, 4, spread_on_ray(2, NODE["num_cpus"])))
    remover.join(timeout=60)
    assert lost_at_work == [True]
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    assert_same(fitted[0], fit_model(data, 4))
