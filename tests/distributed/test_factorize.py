import threading

import numpy as np
import pytest
import torch

from axn_ray.core.artifact import check_files, hash_file, read_manifest
from axn_ray.core.factorization import fit, load_factorization
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.lexical import Words
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import lock_folder
from axn_ray.distributed import train_steps
from axn_ray.distributed.cluster import warn_of_threads
from axn_ray.distributed.factorize import factorize_scores, name_run
from axn_ray.distributed.train_factorization import scale_workers
from axn_ray.errors import ArtifactError, FitError
from tests.distributed.fit_world import make_world, save_world
from tests.distributed.killing import kill_one_worker


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def stored(world, tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"), *world)


@pytest.fixture(scope="module")
def unbroken(world):
    """In-process fits, computed once each."""
    fits = {}

    def get(config):
        described = config.model_dump_json()
        if described not in fits:
            fits[described] = fit(*world, config)
        return fits[described]

    return get


def config_of(method, **given):
    return FactorizationConfig(**{"method": method, "learning_rate": 3e-3, "batch_size": 256, "epochs": 3, **given})


def run(stored, config, folder, workers, storage=None):
    storage = storage or folder / "storage"
    return factorize_scores(*stored, config, folder / "out", num_workers=workers, threads=1, storage=storage)


def assert_close(mine, theirs):
    np.testing.assert_allclose(mine.item_embeddings, theirs.item_embeddings, atol=1e-5)
    assert mine.record.best_epoch == theirs.record.best_epoch
    assert mine.scale.beta == pytest.approx(theirs.scale.beta, rel=1e-6)
    assert mine.scale.alpha == pytest.approx(theirs.scale.alpha, rel=1e-6)
    assert mine.record.held_out_rmse == pytest.approx(theirs.record.held_out_rmse, rel=1e-4)
    assert mine.record.start_rmse == pytest.approx(theirs.record.start_rmse, rel=1e-6)


@pytest.mark.parametrize(("method", "workers"), [("mf_ind", 2), ("mf_trns", 1), ("mf_trns", 3)])
def test_any_number_of_workers_equals_one_process(ray_session, stored, unbroken, tmp_path, method, workers):
    config = config_of(method)
    fitted = run(stored, config, tmp_path, workers)
    assert_close(fitted, unbroken(config))
    if method == "mf_ind":
        for mine, theirs in zip(fitted.query_tower.parameters(), unbroken(config).query_tower.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    manifest = read_manifest(tmp_path / "out", "factorization")
    check_files(tmp_path / "out", manifest)
    assert manifest.config == config.model_dump(mode="json")
    made_from = read_manifest(stored[1], "scores").made_from
    assert manifest.made_from == {**made_from, "dual_encoder": "de", "scores": hash_file(stored[1] / "manifest.json")}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "storage"}  # no parts are left
    assert_close(load_factorization(tmp_path / "out"), fitted)


def test_the_best_epoch_is_shipped_and_not_the_last(ray_session, stored, unbroken, tmp_path):
    config = config_of("mf_trns", learning_rate=0.03, epochs=6)
    fitted = run(stored, config, tmp_path, workers=2)
    assert fitted.record.best_epoch < fitted.record.epochs
    assert_close(fitted, unbroken(config))


def test_a_fit_that_diverges_is_not_tried_again(ray_session, stored, tmp_path):
    with pytest.raises(FitError, match=r"the error is (nan|inf) .* in epoch 1; lower learning_rate=1e\+30"):
        run(stored, config_of("mf_trns", learning_rate=1e30), tmp_path, workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_als_on_tasks_equals_one_process(ray_session, stored, unbroken, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("axn_ray.distributed.als.ITEMS_PER_TASK", 700)
    config = FactorizationConfig(method="als", epochs=3, patience=3)
    assert_close(run(stored, config, tmp_path, workers), unbroken(config))


def test_the_closed_form_equals_one_process(ray_session, stored, world, unbroken, tmp_path):
    config = FactorizationConfig(method="bayes", epochs=2, views=[])
    fitted, expected = run(stored, config, tmp_path, workers=3), unbroken(config)
    assert fitted.noise_variance == pytest.approx(expected.noise_variance, rel=1e-4)
    queries = world[2][:5]
    mine, theirs = (part.item_embeddings.astype(np.float32) @ part.embed_queries(queries).T for part in (fitted, expected))
    np.testing.assert_allclose(mine, theirs, atol=5e-3 * np.abs(theirs).max())  # a number may round to either side
    assert fitted.record.held_out_rmse == pytest.approx(expected.record.held_out_rmse, rel=1e-3)
    again = load_factorization(tmp_path / "out")
    assert_close(again, fitted)
    assert again.noise_variance == fitted.noise_variance
    np.testing.assert_array_equal(again.query_map, fitted.query_map)


def seconds_of_epochs(storage, place=-1):
    """Wall times are unlike on every run: equal ones were not measured again. A run that died may leave two checkpoints."""
    path = sorted(storage.glob("*/checkpoint_*/state.pt"))[place]
    return [epoch["seconds"] for epoch in torch.load(path, weights_only=True)["epochs"]]


@pytest.mark.parametrize("method", ["mf_trns", "mf_ind"])
def test_a_killed_worker_and_a_new_driver_lose_no_epoch(ray_session, stored, unbroken, tmp_path, method):
    config = config_of(method, epochs=8, patience=8)
    storage, kept, killed = tmp_path / "storage", tmp_path / "kept", []
    killer = threading.Thread(target=kill_one_worker, args=(storage, kept, killed), daemon=True)
    killer.start()
    broken = run(stored, config, tmp_path, workers=2)
    killer.join()
    assert killed == [2]
    before = seconds_of_epochs(kept, place=0)
    assert 1 <= len(before) < 8
    assert seconds_of_epochs(storage)[: len(before)] == before
    assert_close(broken, unbroken(config))

    # A new driver, with another number of workers, on what was left when the worker died.
    again = run(stored, config, tmp_path / "again", workers=1, storage=kept)
    assert seconds_of_epochs(kept)[: len(before)] == before
    assert len(seconds_of_epochs(kept)) == 8
    assert_close(again, unbroken(config))


def test_workers_that_are_lost_too_often_are_one_sentence_and_the_same_storage_goes_on(
    monkeypatch, ray_session, stored, unbroken, tmp_path
):
    monkeypatch.setattr(train_steps, "MAX_FAILURES", 0)
    config, storage = config_of("mf_trns", epochs=8, patience=8), tmp_path / "storage"
    killer = threading.Thread(target=kill_one_worker, args=(storage, tmp_path / "kept", []), daemon=True)
    killer.start()
    with pytest.raises(FitError, match="training ended after 1 failures, the last one: .+; see why, then run the same again"):
        run(stored, config, tmp_path, workers=1)
    killer.join()
    assert_close(run(stored, config, tmp_path, workers=1), unbroken(config))


def test_processes_of_more_threads_than_any_node_has_say_what_they_wait_for(ray_session, caplog):
    warn_of_threads(8)
    assert not caplog.records
    warn_of_threads(9)
    assert "processes of 9 threads need a node of 9 CPUs, the largest has 8: waiting for one" in caplog.text


def test_the_same_fit_twice_at_once_is_refused(ray_session, stored, tmp_path):
    config = config_of("mf_trns", epochs=1)
    with (
        lock_folder(tmp_path / "storage" / name_run(config, *stored)),
        pytest.raises(ArtifactError, match="another run is writing"),
    ):
        run(stored, config, tmp_path, workers=1)


def test_a_cluster_that_is_too_small_is_named(ray_session, caplog):
    scale_workers(2, threads=4)
    assert scale_workers((2, 5), threads=4).num_workers == (2, 5)
    assert not caplog.records
    scaling = scale_workers(3, threads=4)
    assert "3 workers x 4 threads need 12 CPUs, the cluster has 8" in caplog.text
    assert (scaling.num_workers, scaling.resources_per_worker) == (3, {"CPU": 4})


@pytest.mark.parametrize("lexical", [True, False])
def test_the_stage_fits_the_words_that_query_and_item_share(ray_session, tmp_path, lexical):
    matrix, items, queries = make_world(60, 200, 8, 20)
    texts = [[f"word{n % 9} word{n % 7}" for n in range(count)] for count in (len(items), len(queries))]
    words = Words(Bm25Index(texts[0]), texts[1])
    shared = np.array([words.feature(query) for query in range(len(queries))])[matrix.query_index, matrix.item_index]
    spoken = ScoreMatrix(matrix.indptr, matrix.item_index, matrix.scores + shared, matrix.n_items)
    config = FactorizationConfig(method="bayes", epochs=2, views=[], lexical=lexical)
    fitted = factorize_scores(*save_world(tmp_path, spoken, items, queries, *texts), config, tmp_path / "out")
    expected = fit(spoken, items, queries, config, words if lexical else None)
    assert (fitted.lexical is None) == (expected.lexical is None) == (not lexical)
    if lexical:
        assert fitted.lexical.weight == pytest.approx(expected.lexical.weight, rel=1e-2)
        np.testing.assert_allclose(fitted.offset("word3"), expected.offset("word3"), rtol=1e-2)
    assert fitted.record.held_out_rmse == pytest.approx(expected.record.held_out_rmse, rel=1e-2)


def test_items_without_a_word_are_fitted_without(ray_session, tmp_path, caplog):
    world = make_world(60, 200, 8, 20)
    stored = save_world(tmp_path, *world, ["the"] * 200, ["a"] * 60)
    config = FactorizationConfig(method="bayes", epochs=2, views=[])
    assert factorize_scores(*stored, config, tmp_path / "out").lexical is None
    assert "without shared words in the prior mean: none of the 200 items has a word" in caplog.text


def test_scores_of_other_texts_are_refused_and_stay(world, stored, tmp_path):
    embeddings, _ = save_world(tmp_path, *world, query_texts=[f"another text {n}" for n in range(len(world[2]))])
    with pytest.raises(ArtifactError, match="the text of query 'q0' has changed since it was scored; score it again"):
        factorize_scores(embeddings, stored[1], config_of("als"), tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds a scores artifact, not an older factorization artifact"):
        factorize_scores(*stored, config_of("als"), stored[1])
    read_manifest(stored[1], "scores")
