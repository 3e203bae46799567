import shutil

import numpy as np
import pytest

from axn_ray.command import find_axn_error
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.index import top_k
from axn_ray.core.score_store import load_scores, shard_path
from axn_ray.distributed import score as stage
from axn_ray.distributed.score import ScoreConfig
from axn_ray.errors import ArtifactError, InputError, ModelError
from tests.pair_server import logit, pair_server

NEAREST = {"random_share": 0.0, "active_share": 0.0}
WORDS = "run walk close open bank dog house river slow fast eat drink speak shut move stand".split()


def unit(rng, n, dim=8):
    vectors = rng.normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def score(corpus, config, out):
    """Run the stage and read what it wrote."""
    stage.score(corpus, config, out)
    return load_scores(out)


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    texts = tuple(" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(52))
    items = Items(tuple(f"i{n}" for n in range(40)), ("",) * 40, texts[:40])
    queries = Queries(tuple(f"q{n}" for n in range(12)), texts[40:])
    splits = ("train", "test", "train") * 4
    return EmbeddedCorpus(items, queries, splits, unit(rng, 40), unit(rng, 12), "given")


@pytest.fixture(scope="module")
def config(tiny_cross_encoder):
    return ScoreConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32", per_query=5, shard_pairs=10, **NEAREST)


@pytest.fixture(scope="module")
def whole(ray_session, corpus, config, tmp_path_factory):
    """A finished folder, which no test changes."""
    out = tmp_path_factory.mktemp("whole") / "scores"
    stage.score(corpus, config, out)
    return out


def test_equals_one_process_on_the_nearest_items(corpus, config, whole):
    scores = load_scores(whole)
    rows = corpus.rows_of("train")
    cross_encoder = CrossEncoder(config)
    nearest, _ = top_k(corpus.item_embeddings, corpus.query_embeddings[rows], 5)
    assert scores.query_ids == tuple(corpus.queries.ids[r] for r in rows)
    assert scores.matrix.n_observed == 8 * 5
    for query, row in enumerate(rows):
        items, observed = scores.matrix.row(query)
        assert items.tolist() == sorted(nearest[query].tolist())
        expected = cross_encoder.score_texts([corpus.queries.texts[row]] * 5, [corpus.items.full_texts[i] for i in items])
        np.testing.assert_allclose(observed, expected, atol=1e-5)


def test_a_cut_off_run_goes_on_and_redoes_only_what_is_bad(corpus, config, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "scores")
    (out / "manifest.json").unlink()
    shard_path(out, 0).unlink()
    cut = shard_path(out, 1)
    cut.write_bytes(cut.read_bytes()[:-7])
    kept = shard_path(out, 2).stat().st_mtime_ns
    again, once = score(corpus, config, out), load_scores(whole)
    assert shard_path(out, 2).stat().st_mtime_ns == kept
    for mine, theirs in zip(
        (again.matrix.indptr, again.matrix.item_index, again.matrix.scores),
        (once.matrix.indptr, once.matrix.item_index, once.matrix.scores),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_scores_of_another_setting_are_never_mixed_in(corpus, config, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "scores")
    with pytest.raises(ArtifactError, match="made with the fingerprint .* this run has"):
        score(corpus, config.model_copy(update={"max_length": 16}), out)
    assert load_scores(out).matrix.n_observed == 40


def test_every_item_for_exact_truth(corpus, config, whole, tmp_path):
    truth = score(corpus, config.model_copy(update={"split": "test", "choice": "all"}), tmp_path / "truth")
    assert truth.dense().shape == (4, 40)
    with pytest.raises(ArtifactError, match="40 of 320 pairs are scored"):
        load_scores(whole).dense()


def test_a_few_queries_with_every_item(ray_session, corpus, config, tmp_path):
    dense = config.model_copy(update={"choice": "all", "n_queries": 3})
    few = score(corpus, dense, tmp_path / "few")
    assert few.dense().shape == (3, 40)
    train = {corpus.queries.ids[row] for row in corpus.rows_of("train")}
    assert set(few.query_ids) < train
    more = score(corpus, dense.model_copy(update={"n_queries": 5}), tmp_path / "more")
    kept = [more.query_ids.index(query_id) for query_id in few.query_ids]
    np.testing.assert_allclose(more.dense()[kept], few.dense(), atol=1e-5)


def test_random_items_depend_on_the_seed_alone(ray_session, corpus, config, tmp_path):
    random = config.model_copy(update={"random_share": 1.0})
    first, second = score(corpus, random, tmp_path / "a"), score(corpus, random, tmp_path / "b")
    np.testing.assert_array_equal(first.matrix.item_index, second.matrix.item_index)
    other = score(corpus, random.model_copy(update={"seed": 1}), tmp_path / "c")
    assert (first.matrix.item_index != other.matrix.item_index).any()


def test_first_scores_that_teach_nothing_are_one_error_with_the_cure(ray_session, corpus, config, tmp_path):
    one = config.model_copy(update={"per_query": 2, "active_share": 0.5, "n_queries": 1})
    expected = "the first scores do not tell .*: 1 observed scores are too few to factorize.*; active_share=0 chooses all items"
    with pytest.raises(InputError, match=expected):
        stage.score(corpus, one, tmp_path / "scores")


def test_a_missing_model_is_one_error_and_leaves_nothing(ray_session, corpus, config, tmp_path):
    with pytest.raises(Exception, match="cannot be loaded") as raised:
        score(corpus, config.model_copy(update={"cross_encoder": "no-such/model"}), tmp_path / "scores")
    assert isinstance(find_axn_error(raised.value), ModelError)
    assert not (tmp_path / "scores").exists()


def test_a_damaged_shard_is_named(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "scores")
    shard_path(out, 3).write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="has a damaged file"):
        load_scores(out)


def test_a_server_scores_as_the_model_behind_it(ray_session, corpus, config, tmp_path):
    """Two workers, a server that is busy now and then and refuses one text."""
    poison = corpus.items.full_texts[3]

    def busy(handler, _):
        return len(handler.server.bodies) % 5 == 2 and handler.answer(429, {"error": "busy"}, Retry_After=0)

    def refuse(handler, body):
        return poison in body["texts"] and handler.answer(413, {"error": "too long"})

    with pair_server() as server:
        server.faults = [busy, refuse]
        asked = {"cross_encoder": f"{server.url}#tei", "dtype": "auto", "choice": "all", "request_items": 7}
        manifest = stage.score(corpus, config.model_copy(update=asked), tmp_path / "scores")
    scores = load_scores(tmp_path / "scores")
    assert (manifest.counts["pairs"], manifest.counts["quarantined"]) == (8 * 39, 8)
    assert manifest.config["fingerprint"]["served"] == {"model_id": "tiny", "model_sha": "abc"}
    for query, row in enumerate(corpus.rows_of("train")):
        items, observed = scores.matrix.row(query)
        assert items.tolist() == [item for item in range(40) if item != 3]
        expected = [logit(corpus.queries.texts[row], corpus.items.full_texts[item]) for item in items]
        np.testing.assert_allclose(observed, expected, rtol=1e-5)
