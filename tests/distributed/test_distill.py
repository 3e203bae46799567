"""The distill stage on Ray Train: what it ships is an artifact that the embed stage takes, and has learned the scores."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from axn_ray.core.artifact import check_files, read_manifest
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.score_store import load_scores
from axn_ray.distributed.distill import DistillConfig, distill
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.score import ScoreConfig, score
from axn_ray.errors import ArtifactError, FitError, InputError
from tests.distributed.killing import kill_one_worker
from tests.distributed.students import make_student

CONFIG = DistillConfig(epochs=100, queries_per_step=4, items_per_query=6, learning_rate=2e-3, threads=1)
ITEMS = ["the tree of words", "the night of words"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, ray_session, tiny_cross_encoder):
    """Twelve train queries and nine items, embedded by a tiny dual-encoder and scored by a tiny cross-encoder."""
    folder = tmp_path_factory.mktemp("world")
    words = ["tree", "fire", "bank", "song", "river", "stone", "light", "house", "night"]
    pq.write_table(pa.table({"item_id": words, "text": [f"the {word} of words" for word in words]}), folder / "items.parquet")
    asked = [f"what is a {words[n % 9]} and a {words[(n * n + 1) % 9]}" for n in range(14)]
    split = ["train"] * 12 + ["dev", "test"]
    pq.write_table(
        pa.table({"query_id": [f"q{n}" for n in range(14)], "text": asked, "split": split}), folder / "queries.parquet"
    )
    files = {"items": folder / "items.parquet", "queries": folder / "queries.parquet"}
    corpus = embed(EmbedConfig(**files, dual_encoder=make_student(folder), dtype="float32"), folder / "embeddings")
    plain = {"per_query": 6, "random_share": 0.5, "active_share": 0.0}
    score(corpus, ScoreConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32", **plain), folder / "scores")
    return folder


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """What one undisturbed worker ships, its storage, and its counts."""
    folder = tmp_path_factory.mktemp("trained")
    counts = distill(CONFIG, world / "embeddings", world / "scores", folder / "out", folder / "storage")
    return folder / "out", folder / "storage", counts


def agreement(world, dual_encoder):
    """Mean correlation of a query's inner products with its observed scores."""
    corpus, observed = load_scores(world / "scores"), DualEncoder(dual_encoder, "float32")
    items = pq.read_table(world / "items.parquet")
    table = pq.read_table(world / "queries.parquet")
    queries = dict(zip(table["query_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    embedded = observed.embed_items(items["text"].to_pylist())
    found = []
    for row, name in enumerate(corpus.query_ids):
        index, scores = corpus.matrix.row(row)
        found.append(np.corrcoef(embedded[index] @ observed.embed_queries([queries[name]])[0], scores)[0, 1])
    return float(np.mean(found))


def test_what_it_ships_has_learned_the_scores_on_any_number_of_workers(world, trained, tmp_path):
    one, _, counts = trained
    assert (counts["queries"], counts["step"]) == (12, 300)
    check_files(one, read_manifest(one, "dual_encoder"))
    config = CONFIG.model_copy(update={"workers": 2})
    distill(config, world / "embeddings", world / "scores", tmp_path / "two", tmp_path / "storage")
    before = agreement(world, str(world / "student"))
    assert min(agreement(world, str(place)) for place in (one, tmp_path / "two")) > before + 0.3

    # The embed stage takes it, and the folder's place is kept as an absolute path.
    files = {"items": world / "items.parquet", "queries": world / "queries.parquet"}
    corpus = embed(EmbedConfig(**files, dual_encoder=str(one), dtype="float32"), tmp_path / "embeddings")
    expected = DualEncoder(str(one), "float32").embed_items(corpus.items.full_texts)
    np.testing.assert_allclose(corpus.item_embeddings, expected, atol=1e-5)
    assert corpus.dual_encoder == str(one.resolve())


def test_the_same_storage_goes_on_where_it_was_left(world, trained, tmp_path):
    before, storage, counts = trained
    again = distill(CONFIG, world / "embeddings", world / "scores", tmp_path / "again", storage)  # nothing is left to do
    assert again == counts
    one, two = (DualEncoder(str(place), "float32").embed_items(["the tree"]) for place in (before, tmp_path / "again"))
    np.testing.assert_array_equal(one, two)


def test_a_killed_worker_and_a_new_driver_lose_no_step(world, trained, tmp_path):
    at, (undisturbed, _, counts) = (world / "embeddings", world / "scores"), trained
    storage, kept, killed = tmp_path / "storage", tmp_path / "kept", []
    killer = threading.Thread(target=kill_one_worker, args=(storage, kept, killed), daemon=True)
    killer.start()
    broken = distill(CONFIG, *at, tmp_path / "broken", storage)
    killer.join()
    assert killed == [1]
    done = min(torch.load(path, weights_only=True)["step"] for path in kept.glob("*/checkpoint_*/state.pt"))
    assert 50 <= done < 300
    again = distill(CONFIG, *at, tmp_path / "again", kept)
    assert broken == again == counts
    places = undisturbed, tmp_path / "broken", tmp_path / "again"
    one, two, three = (DualEncoder(str(place), "float32").embed_items(ITEMS) for place in places)
    np.testing.assert_allclose(two, one, atol=1e-5)
    np.testing.assert_allclose(three, one, atol=1e-5)


def test_three_workers_take_the_steps_of_one(world, tmp_path):
    """With four queries a step one worker has two of them and the others one: each query weighs the same."""
    at, config = (world / "embeddings", world / "scores"), CONFIG.model_copy(update={"epochs": 2})
    counts = [
        distill(config.model_copy(update={"workers": n}), *at, tmp_path / f"{n}", tmp_path / f"storage {n}") for n in (1, 3)
    ]
    assert counts[0]["loss"] == pytest.approx(counts[1]["loss"], rel=1e-4)
    one, three = (DualEncoder(str(tmp_path / n), "float32").embed_items(ITEMS) for n in "13")
    np.testing.assert_allclose(three, one, atol=1e-4)


def test_a_loss_that_diverges_is_one_sentence(world, tmp_path):
    at, config = (world / "embeddings", world / "scores"), CONFIG.model_copy(update={"learning_rate": 1e30, "workers": 2})
    with pytest.raises(FitError, match="the loss is nan at step [0-9]+; lower learning_rate"):
        distill(config, *at, tmp_path / "out", tmp_path / "storage")
    assert not (tmp_path / "out").exists()


def test_a_step_has_a_query_for_each_worker(world, tmp_path):
    config = CONFIG.model_copy(update={"queries_per_step": 1, "workers": 2})
    with pytest.raises(InputError, match="a step has 1 queries for 2 workers; lower workers or raise queries_per_step"):
        distill(config, world / "embeddings", world / "scores", tmp_path / "out", tmp_path / "storage")


def test_scores_of_another_corpus_are_refused(world, tmp_path):
    pq.write_table(pa.table({"item_id": ["x"], "text": ["another"]}), tmp_path / "items.parquet")
    files = {"items": tmp_path / "items.parquet", "queries": world / "queries.parquet"}
    embed(EmbedConfig(**files, dual_encoder=str(world / "student")), tmp_path / "embeddings")
    with pytest.raises(ArtifactError, match="items"):
        distill(CONFIG, tmp_path / "embeddings", world / "scores", tmp_path / "out", tmp_path / "storage")
    assert not (tmp_path / "out").exists()
