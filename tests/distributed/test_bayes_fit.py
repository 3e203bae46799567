import os
import threading
import time

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from axn_ray.core.closed_form import ItemFeatures, TrainData, fit_model
from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.distributed import bayes_fit
from axn_ray.distributed.bayes_fit import spread_on_ray


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    items, queries, view = (rng.normal(scale=0.2, size=(n, 24)).astype(np.float32) for n in (900, 260, 900))
    u = np.column_stack([queries, 0.3 * rng.normal(size=(260, 24))]) @ np.diag(rng.uniform(0.3, 2.0, 48))
    scores = (u @ np.column_stack([items, view]).T + 0.02 * rng.normal(size=(260, 900))).astype(np.float32)
    rows = np.repeat(np.arange(260, dtype=np.int32), 30)
    columns = np.concatenate([rng.permutation(900)[:30] for _ in range(260)]).astype(np.int32)
    matrix = ScoreMatrix.from_triples(rows, columns, scores[rows, columns], 260, 900)
    return TrainData(ItemFeatures(items, [view]), queries, matrix, ScoreScale())


@pytest.fixture(scope="module")
def expected(data):
    return fit_model(data, 4)


def assert_same(model, expected):
    np.testing.assert_allclose(model.weights, expected.weights, atol=1e-4)
    np.testing.assert_allclose(model.covariance, expected.covariance, atol=1e-4 * expected.covariance.max())
    assert model.noise_variance == pytest.approx(expected.noise_variance, rel=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_fits_what_one_process_fits(ray_session, data, expected, workers):
    assert_same(fit_model(data, 4, spread_on_ray(workers, 1)), expected)


def kill_workers(killed, done):
    """Kill whichever process computes a share, three times over."""
    while len(killed) < 3 and not done.is_set():
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::_sum_share"]:
                    os.kill(process.pid, 9)
                    killed.append(process.pid)
                    time.sleep(0.3)
                    break
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue


def test_shares_of_killed_workers_are_computed_again(ray_session, data, expected):
    killed, done = [], threading.Event()
    killer = threading.Thread(target=kill_workers, args=(killed, done), daemon=True)
    killer.start()
    model = fit_model(data, 4, spread_on_ray(3, 1))
    done.set()
    killer.join()
    assert killed
    assert_same(model, expected)


def test_a_share_has_its_threads_in_a_worker_that_had_others(monkeypatch):
    seen = []

    def note_threads(*_):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    monkeypatch.setattr(bayes_fit, "e_step", note_threads)
    with threadpool_limits(1):
        bayes_fit._sum_share(None, None, 2)
    assert set(seen) == {2}
