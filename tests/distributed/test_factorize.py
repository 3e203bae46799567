import os
import shutil
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from axn_ray.core.artifact import check_files, read_manifest
from axn_ray.core.factorization import fit, load_factorization
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.distributed.factorize import _scaling, factorize

MADE_FROM = {"embeddings": "e1", "scores": "s1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(scale=32**-0.5, size=(n, 32)).astype(np.float32) for n in (2000, 300))
    distortion = np.eye(32) + 0.25 * rng.normal(size=(32, 32))
    scores = (3 * queries @ distortion @ items.T - 4).astype(np.float32)
    rows = np.repeat(np.arange(300), 60)
    columns = np.concatenate([rng.permutation(2000)[:60] for _ in range(300)])
    return ScoreMatrix.from_triples(rows, columns, scores[rows, columns], 300, 2000), items, queries


@pytest.fixture(scope="module")
def unbroken(world):
    """In-process fits, computed once each."""
    fits = {}

    def get(config):
        if config not in fits:
            fits[config] = fit(*world, config)
        return fits[config]

    return get


def config_of(method, **given):
    return FactorizationConfig(**{"method": method, "learning_rate": 3e-3, "batch_size": 256, "epochs": 3, **given})


def run(world, config, folder, workers, storage=None):
    storage = storage or folder / "storage"
    return factorize(*world, config, folder / "out", made_from=MADE_FROM, num_workers=workers, threads=1, storage=storage)


def assert_close(mine, theirs):
    np.testing.assert_allclose(mine.item_embeddings, theirs.item_embeddings, atol=1e-5)
    assert (mine.scale, mine.record.best_epoch) == (theirs.scale, theirs.record.best_epoch)
    assert mine.record.held_out_rmse == pytest.approx(theirs.record.held_out_rmse, rel=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_equals_one_process(ray_session, world, unbroken, tmp_path, workers):
    config = config_of("mf_ind")
    fitted = run(world, config, tmp_path, workers)
    assert_close(fitted, unbroken(config))
    for mine, theirs in zip(fitted.query_tower.parameters(), unbroken(config).query_tower.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    manifest = read_manifest(tmp_path / "out", "factorization")
    check_files(tmp_path / "out", manifest)
    assert (manifest.made_from, manifest.config) == (MADE_FROM, config.model_dump(mode="json"))
    assert_close(load_factorization(tmp_path / "out"), fitted)


def test_the_closed_form_equals_one_process(ray_session, world, unbroken, tmp_path):
    config = FactorizationConfig(method="bayes", epochs=2)
    fitted, expected = run(world, config, tmp_path, workers=3), unbroken(config)
    assert fitted.noise_variance == pytest.approx(expected.noise_variance, rel=1e-9)
    queries = world[2][:5]
    mine, theirs = (part.item_embeddings @ part.embed_queries(queries).T for part in (fitted, expected))
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert fitted.record.held_out_rmse == pytest.approx(expected.record.held_out_rmse, rel=1e-6)
    again = load_factorization(tmp_path / "out")
    assert_close(again, fitted)
    assert again.noise_variance == fitted.noise_variance
    np.testing.assert_array_equal(again.query_map, fitted.query_map)


def training_workers():
    """The Ray Train worker processes below this test."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)
    return result


def kill_one_worker(storage, kept, killed):
    """After the first checkpoint kill a worker, then keep a copy of what a driver that dies now would leave."""
    wait_until(lambda: list(storage.glob("*/checkpoint_manager_snapshot.json")))
    workers = training_workers()
    killed.append(len(workers))
    os.kill(workers[-1].pid, 9)
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    shutil.copytree(storage, kept)


def seconds_of_epochs(storage, place=-1):
    """Wall times are unlike on every run: equal ones were not measured again. A run that died may leave two checkpoints."""
    path = sorted(storage.glob("*/checkpoint_*/state.pt"))[place]
    return [epoch["seconds"] for epoch in torch.load(path, weights_only=True)["epochs"]]


def test_a_killed_worker_and_a_new_driver_lose_no_epoch(ray_session, world, unbroken, tmp_path):
    config = config_of("mf_trns", epochs=8, patience=8)
    storage, kept, killed = tmp_path / "storage", tmp_path / "kept", []
    killer = threading.Thread(target=kill_one_worker, args=(storage, kept, killed), daemon=True)
    killer.start()
    broken = run(world, config, tmp_path, workers=2)
    killer.join()
    assert killed == [2]
    before = seconds_of_epochs(kept, place=0)
    assert 1 <= len(before) < 8
    assert seconds_of_epochs(storage)[: len(before)] == before
    assert_close(broken, unbroken(config))

    # A new driver, with another number of workers, on what was left when the worker died.
    again = run(world, config, tmp_path / "again", workers=1, storage=kept)
    assert seconds_of_epochs(kept)[: len(before)] == before
    assert len(seconds_of_epochs(kept)) == 8
    assert_close(again, unbroken(config))


def test_a_cluster_that_is_too_small_is_named(ray_session, caplog):
    _scaling(num_workers=2, threads=4)
    assert not caplog.records
    scaling = _scaling(num_workers=3, threads=4)
    assert "3 workers x 4 threads need 12 CPUs, the cluster has 8" in caplog.text
    assert (scaling.num_workers, scaling.resources_per_worker) == (3, {"CPU": 4})
