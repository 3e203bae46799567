import logging
import re
import threading

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from axn_ray.core.adaptive import run_search, search
from axn_ray.core.artifact import new_artifact
from axn_ray.core.factorization import (
    Factorization,
    describe_factorization,
    fit,
    load_factorization,
    save_factorization,
)
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.fit_share import share_inputs, share_queries, share_rows
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.gradient_fit import GradientFit
from axn_ray.core.index import ItemIndex
from axn_ray.core.lexical import Words
from axn_ray.core.methods import METHODS
from axn_ray.core.row_parts import RowParts
from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.core.search_space import build_estimator
from axn_ray.core.towers import GatedTower, Workers
from axn_ray.errors import ArtifactError, FitError, InputError

NEVER = 50  # items that no query scores


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def low_rank_scores(rng, n_queries, n_items, dim):
    """Items, queries, and the logits of a CE that sees linear distortions of their embeddings; they lie around -4."""
    items, queries = unit(rng.normal(size=(n_items, dim))), unit(rng.normal(size=(n_queries, dim)))
    distortions = np.eye(dim) + 0.25 * rng.normal(size=(2, dim, dim))
    return items, queries, (3 * (queries @ distortions[0]) @ (items @ distortions[1]).T - 4).astype(np.float32)


def low_rank_world(n_queries=300, n_items=2000, dim=32, per_query=60):
    """Some of those scores; the last items are never scored."""
    rng = np.random.default_rng(0)
    items, queries, scores = low_rank_scores(rng, n_queries, n_items, dim)
    rows = np.repeat(np.arange(n_queries), per_query)
    columns = np.concatenate([rng.permutation(n_items - NEVER)[:per_query] for _ in range(n_queries)])
    return ScoreMatrix.from_triples(rows, columns, scores[rows, columns], n_queries, n_items), items, queries


@pytest.fixture(scope="module")
def world():
    return low_rank_world()


@pytest.fixture(scope="module")
def small_world():
    return low_rank_world(n_queries=20, n_items=80, dim=8, per_query=12)


def quick(method, **given):
    return FactorizationConfig(**{"method": method, "learning_rate": 3e-3, "batch_size": 128, "epochs": 5, **given})


def assert_equal(first, second):
    np.testing.assert_array_equal(first.item_embeddings, second.item_embeddings)
    assert (first.scale, first.record, first.noise_variance) == (second.scale, second.record, second.noise_variance)
    for name in ("query_map", "prior_variance"):
        mine, theirs = getattr(first, name), getattr(second, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)
    if first.query_tower is not None:
        for mine, theirs in zip(first.query_tower.parameters(), second.query_tower.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def held_out_errors(world, config, u, v):
    """The slow twin: prediction minus scaled score of every held-out pair, one by one."""
    matrix, items, queries = world
    inputs = FitInputs(matrix, items, queries)
    scale = inputs.fit_scale()
    pairs = list(zip(matrix.query_index.tolist(), matrix.item_index.tolist(), matrix.scores.tolist(), strict=True))
    held_out = [pairs[n] for n in np.flatnonzero(inputs.held_out(config))]
    return np.array([float(u[q] @ v[i]) - scale.beta * (score - scale.alpha) for q, i, score in held_out])


@pytest.mark.parametrize(("method", "share"), [("mf_ind", 0.2), ("mf_trns", 0.7), ("als", 0.7), ("bayes", 0.1)])
def test_a_low_rank_matrix_is_recovered(world, method, share):
    record = fit(*world, quick(method)).record
    assert record.held_out_rmse < share * record.start_rmse


def test_mf_trns_moves_observed_items_only(world):
    matrix, items, queries = world
    fitted = fit(*world, quick("mf_trns")).item_embeddings
    observed = np.isin(np.arange(len(items)), matrix.item_index)
    assert (~observed).sum() >= NEVER
    np.testing.assert_array_equal(fitted[~observed], items[~observed])
    # A few observed items may have all their pairs held out.
    assert (fitted[observed] != items[observed]).any(axis=1).mean() > 0.99


def test_mf_trns_queries_stay_and_mf_ind_queries_go_through_the_tower(small_world):
    _, _, queries = small_world
    free, towers = (fit(*small_world, quick(method, epochs=1)) for method in ("mf_trns", "mf_ind"))
    np.testing.assert_array_equal(free.embed_queries(queries), queries)
    with torch.no_grad():
        expected = towers.query_tower(torch.from_numpy(queries)).numpy()
    np.testing.assert_allclose(towers.embed_queries(queries), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"query embeddings are \(20, 7\), items have dim 8"):
        free.embed_queries(queries[:, :7])


def test_rmse_is_that_of_the_slow_twin(small_world):
    _, items, queries = small_world
    config = quick("mf_ind", epochs=3, batch_size=16)
    fitted = fit(*small_world, config)
    errors = held_out_errors(small_world, config, fitted.embed_queries(queries), fitted.item_embeddings)
    assert fitted.record.held_out_rmse == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-5)
    errors = held_out_errors(small_world, config, queries, items)
    assert fitted.record.start_rmse == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-5)


def test_one_step_of_mf_trns_is_that_of_the_slow_twin(small_world):
    matrix, items, queries = small_world
    config = quick("mf_trns", epochs=1, batch_size=10**6, learning_rate=0.01)
    inputs = FitInputs(*small_world)
    train, targets = ~inputs.held_out(config), inputs.fit_scale().scale(matrix.scores)
    gradient = np.zeros(items.shape)
    for q, i, y in zip(matrix.query_index[train], matrix.item_index[train], targets[train], strict=True):
        gradient[i] += 2 / train.sum() * (queries[q] @ items[i] - y) * queries[q]
    # Adam's first step: the gradient over its absolute value; SparseAdam adds eps before it corrects the second moment.
    expected = items - 0.01 * gradient / (np.abs(gradient) + 1e-8 / np.sqrt(1 - 0.999))
    np.testing.assert_allclose(fit(*small_world, config).item_embeddings, expected, atol=1e-5)


def test_a_fresh_gated_tower_is_almost_the_identity():
    x = torch.from_numpy(unit(np.random.default_rng(1).normal(size=(100, 32))))
    tower = GatedTower(32)
    with torch.no_grad():
        assert (tower(x) - x).norm(dim=1).max() < 0.02
        share = torch.sigmoid(torch.tensor(-5.0))
        inner = torch.nn.functional.gelu(x @ tower.inner.weight.T + tower.inner.bias)
        expected = share * (inner @ tower.outer.weight.T + tower.outer.bias) + (1 - share) * x
        torch.testing.assert_close(tower(x), expected)


@pytest.mark.parametrize("method", ["mf_ind", "mf_trns"])
def test_the_seed_alone_decides(small_world, method):
    state = torch.get_rng_state()
    first = fit(*small_world, quick(method, epochs=2, batch_size=16))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert_equal(first, fit(*small_world, quick(method, epochs=2, batch_size=16)))
    other = fit(*small_world, quick(method, epochs=2, batch_size=16, seed=1))
    assert (first.item_embeddings != other.item_embeddings).any()
    inputs = FitInputs(*small_world)
    assert (inputs.held_out(quick(method)) != inputs.held_out(quick(method, seed=1))).any()


class Threads(Workers):
    """Workers that are threads of this process and meet at a barrier."""

    device = torch.device("cpu")
    sent_bytes = 0

    def __init__(self, rank, parts, barrier):
        self.rank, self.size, self.parts, self.barrier = rank, len(parts), parts, barrier

    def gather(self, rows):
        return torch.cat(self._everyone(rows))

    def exchange(self, rows, send, receive):
        blocks = [blocks[self.rank] for blocks in self._everyone(rows.split(send))]
        assert [len(block) for block in blocks] == receive
        return torch.cat(blocks)

    def _everyone(self, given):
        self.parts[self.rank] = given
        self.barrier.wait(timeout=30)
        everyone = list(self.parts)
        self.barrier.wait(timeout=30)
        return everyone


def on_threads(size, work):
    """`work(workers)` on so many threads; their results."""
    parts, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        results[rank] = work(Threads(rank, parts, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 30])  # 30 workers: more than there are queries
def test_workers_share_a_fit_by_rows_and_any_number_of_them_goes_on(small_world, tmp_path, size):
    config = quick("mf_trns", batch_size=16)
    inputs, alone = FitInputs(*small_world), fit(*small_world, config)

    def work(workers):
        part = GradientFit(share_inputs(inputs, workers.rank, workers.size), config, workers)
        part.run_epoch()
        part.run_epoch()
        part.save(tmp_path)
        return part.fitted_state()["items"].shape

    shapes = on_threads(size, work)
    assert shapes == [(len(rows), 8) for rows in share_rows(80, size)]  # no worker holds another's rows
    assert RowParts(tmp_path, "items-exp_avg").shape == (80, 8)
    assert RowParts(tmp_path, "queries").shape == (20, 8)
    run = GradientFit(share_inputs(inputs), config)
    run.load(tmp_path)
    while not run.progress.is_done:
        run.run_epoch()
    assert run.progress.is_at_best
    np.testing.assert_allclose(run.fitted_state()["items"].numpy(), alone.item_embeddings, atol=1e-5)
    assert len(run.progress.epochs) == alone.record.epochs
    assert run.start_rmse == pytest.approx(alone.record.start_rmse, rel=1e-6)
    assert run.scale.beta == pytest.approx(alone.scale.beta, rel=1e-6)


def test_queries_are_shared_by_their_observations():
    counts = np.array([9.0, 1, 0, 1, 1, 8, 0])
    assert share_queries(counts, 1) == [range(0, 7)]
    assert share_queries(counts, 2) == [range(0, 2), range(2, 7)]
    for workers in (3, 7, 30):
        assert [q for share in share_queries(counts, workers) for q in share] == list(range(7))
        assert [row for share in share_rows(7, workers) for row in share] == list(range(7))


def test_the_best_epoch_is_kept_and_patience_ends_the_fit(world):
    config = quick("mf_trns", learning_rate=0.03, epochs=40, patience=2)
    record = fit(*world, config).record
    assert record.epochs == record.best_epoch + 2 < 40
    until_best = fit(*world, quick("mf_trns", learning_rate=0.03, epochs=record.best_epoch))
    np.testing.assert_array_equal(until_best.item_embeddings, fit(*world, config).item_embeddings)


def test_a_fit_that_is_worse_than_none_is_loud(small_world, caplog):
    matrix, items, queries = small_world
    scores = (queries @ items.T)[matrix.query_index, matrix.item_index]
    perfect = ScoreMatrix.from_triples(matrix.query_index, matrix.item_index, scores, 20, 80)
    with caplog.at_level(logging.WARNING, logger="axn_ray"):
        record = fit(perfect, items, queries, quick("mf_trns", epochs=1, learning_rate=0.1)).record
    (warning,) = caplog.records
    assert "THE FIT IS WORSE THAN NONE" in warning.message
    assert f"{record.held_out_rmse:.5f}" in warning.message
    assert f"{record.start_rmse:.5f}" in warning.message


@pytest.mark.parametrize(
    ("method", "said"), [("bayes", "that of one score for all is .*; score more pairs"), ("als", "raise ridge=0.01")]
)
def test_a_fit_to_noise_is_loud_and_names_its_own_cure(method, said, caplog):
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(size=(n, 16)).astype(np.float32) / 4 for n in (200, 60))
    rows, columns = np.repeat(np.arange(60, dtype=np.int32), 20), np.tile(np.arange(20, dtype=np.int32), 60)
    noise = ScoreMatrix.from_triples(rows, columns, rng.normal(size=1200).astype(np.float32), 60, 200)
    with caplog.at_level(logging.WARNING, logger="axn_ray"):
        fit(noise, items, queries, FactorizationConfig(method=method))
    assert re.search(f"THE FIT IS WORSE THAN NONE: .*{said}", caplog.text)


@pytest.mark.parametrize("method", ["mf_ind", "mf_trns"])
def test_a_fit_that_diverges_names_the_cure(small_world, method):
    with pytest.raises(FitError, match=r"the error is (nan|inf) .* in epoch 1; lower learning_rate=1e\+30"):
        fit(*small_world, quick(method, learning_rate=1e30, batch_size=16))


def with_nan(array):
    return np.where(np.arange(len(array))[:, None] == 3, np.float32(np.nan), array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, v, q: (m, v[:-1], q), r"item embeddings are float32 \(79, 8\), the score matrix needs float32 \(80, dim\)"),
        (lambda m, v, q: (m, v, q[0]), r"query embeddings are float32 \(8,\), the score matrix needs float32 \(20, dim\)"),
        (lambda m, v, q: (m, v.astype(np.float64), q), "item embeddings are float64"),
        (lambda m, v, q: (m, v, q[:, :5]), "item and query embeddings have 8 and 5 dimensions; take both from one"),
        (lambda m, v, q: (m, with_nan(v), q), r"1 item embeddings are NaN or infinite \(first: row 3\); embed them again"),
        (lambda m, v, q: (m, v, with_nan(q)), r"1 query embeddings are NaN or infinite \(first: row 3\); embed them again"),
        (lambda m, v, q: (ScoreMatrix(m.indptr, m.item_index, m.scores * np.inf, 80), v, q), "NaN or infinite scores"),
        (lambda m, v, q: (ScoreMatrix(m.indptr * 0, m.item_index[:0], m.scores[:0], 80), v, q), "0 observed scores are too few"),
        (lambda m, v, q: (ScoreMatrix(m.indptr, m.item_index, m.scores * 0, 80), v, q), "CE scores without spread"),
    ],
)
def test_bad_inputs_are_refused_at_the_door(small_world, change, message):
    with pytest.raises(InputError, match=message):
        fit(*change(*small_world), quick("mf_trns"))


def test_defaults_follow_the_method():
    ind, trns = FactorizationConfig(method="mf_ind"), FactorizationConfig(method="mf_trns")
    assert (ind.method, ind.epochs, trns.epochs) == ("mf_ind", 12, 10)
    assert FactorizationConfig(method="mf_trns", epochs=3).epochs == 3
    assert FactorizationConfig(**trns.model_dump()) == trns
    with pytest.raises(ValidationError, match="method"):
        FactorizationConfig(method="svd")


@pytest.mark.parametrize("method", ["mf_ind", "mf_trns", "bayes"])
def test_an_artifact_gives_back_what_was_saved(small_world, tmp_path, method):
    config = quick(method, epochs=2, batch_size=16)
    fitted = fit(*small_world, config)
    manifest = describe_factorization(fitted, config, {"scores": "abc"})
    with new_artifact(tmp_path / "fitted", manifest) as folder:
        save_factorization(folder, fitted)
    loaded = load_factorization(tmp_path / "fitted")
    assert_equal(fitted, loaded)
    assert loaded.index_ce_calls == fitted.index_ce_calls == small_world[0].n_observed
    assert manifest.config["method"] == method
    assert manifest.counts["items"] == 80
    assert {path.suffix for path in (tmp_path / "fitted").iterdir()} <= {".json", ".npy", ".safetensors"}


@pytest.fixture(scope="module")
def words(world):
    """Texts of a few words for items and queries; exact scores that rise with the words shared, and the world's pairs of them."""
    matrix, items, queries = world
    rng = np.random.default_rng(1)
    index, texts = draw_texts(rng, len(items)), draw_texts(rng, len(queries))
    found = Words(Bm25Index(index), texts)
    exact = low_rank_scores(np.random.default_rng(0), len(queries), len(items), items.shape[1])[2]
    exact += 1.5 * np.array([np.sqrt(found.index.score(text)) for text in texts])
    return found, exact, ScoreMatrix(matrix.indptr, matrix.item_index, exact[matrix.query_index, matrix.item_index], len(items))


def draw_texts(rng, n):
    return [" ".join(f"word{number}" for number in rng.choice(60, 4, replace=False)) for _ in range(n)]


def test_shared_words_become_a_part_of_the_prior_mean(world, words, tmp_path):
    (_, items, queries), (given, exact, matrix) = world, words
    config = quick("bayes", epochs=3)
    plain, fitted = fit(matrix, items, queries, config), fit(matrix, items, queries, config, given)
    assert plain.lexical is None and plain.offset("word1") is None
    np.testing.assert_array_equal(plain.item_embeddings, fitted.item_embeddings)
    assert fitted.lexical.weight == pytest.approx(1.5 * fitted.scale.beta, rel=0.2)
    expected = fitted.lexical.weight * np.sqrt(given.index.score("word1 word2"))
    np.testing.assert_allclose(fitted.offset("word1 word2"), expected, rtol=1e-5)
    with new_artifact(tmp_path / "fitted", describe_factorization(fitted, config, {})) as folder:
        save_factorization(folder, fitted)
    loaded = load_factorization(tmp_path / "fitted")
    assert loaded.lexical.weight == fitted.lexical.weight
    np.testing.assert_array_equal(loaded.offset("word1 word2"), fitted.offset("word1 word2"))

    def found(fit, query):
        """Of the 10 best items by the exact scores, those that a search with 30 calls scores."""
        embedding, offset = fit.embed_queries(queries[[query]])[0], fit.offset(given.query_texts[query])
        known = fit.noise_variance, offset, fit.prior_variance
        ridge = build_estimator(METHODS["axn_bayes"], fit.item_embeddings, fit.scale, embedding, *known)
        running = search(ridge, None, n_items=len(items), budget=30, rounds=3)
        result = run_search(
            running, exact[query].__getitem__, lambda request: ItemIndex(fit.item_embeddings).retrieve([request])[0]
        )
        return np.isin(np.argsort(-exact[query])[:10], result.item_index).mean()

    recalls = np.array([[found(fit, query) for fit in (plain, loaded)] for query in range(40)]).mean(axis=0)
    assert recalls[1] > recalls[0] + 0.1
    data = tmp_path / "fitted/bm25/data.csc.index.npy"
    data.write_bytes(data.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="has a damaged file .*; run the factorization again"):
        load_factorization(tmp_path / "fitted")


def test_embeddings_without_a_fit_can_be_saved_too(small_world, tmp_path):
    plain = Factorization(small_world[1], ScoreScale(-4.0, 0.5))
    with new_artifact(tmp_path / "plain", describe_factorization(plain, FactorizationConfig(), {})) as folder:
        save_factorization(folder, plain)
    loaded = load_factorization(tmp_path / "plain")
    assert_equal(plain, loaded)
    assert loaded.index_ce_calls is None  # nobody said


@pytest.mark.parametrize("name", ["item_embeddings.npy", "query_tower.safetensors"])
def test_a_damaged_file_is_named(small_world, tmp_path, name):
    config = quick("mf_ind", epochs=1)
    fitted = fit(*small_world, config)
    with new_artifact(tmp_path / "fitted", describe_factorization(fitted, config, {})) as folder:
        save_factorization(folder, fitted)
    whole = (tmp_path / "fitted" / name).read_bytes()
    (tmp_path / "fitted" / name).write_bytes(whole[:-9])
    with pytest.raises(ArtifactError, match="has a damaged file .*; run the factorization again"):
        load_factorization(tmp_path / "fitted")
