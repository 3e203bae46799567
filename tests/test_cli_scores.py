"""Scores in and out by the command line, and known scores in a search: one sentence for bad input, nothing half-written."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from axn_ray.cli import app
from axn_ray.core.artifact import Manifest, hash_json, new_artifact, read_manifest
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus, save_embedded_corpus
from axn_ray.core.factorization import describe_factorization, fit_closed_form, save_factorization
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.models import MINILM
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import ITEMS, QUERIES, load_scores, write_ids, write_shard
from axn_ray.core.searcher import SearchConfig, Searcher
from tests.test_cli import failure

TEXTS = ["run fast", "walk", "stand still", "jump high", "sleep", "eat bread"]
QUERY_TEXTS = ["he ran", "she walked", "it stood"]


def axn(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small embeddings artifact."""
    folder = tmp_path_factory.mktemp("files")
    items = Items(tuple("abcdef"), ("",) * 6, tuple(TEXTS))
    queries = Queries(("1", "2", "3"), tuple(QUERY_TEXTS), ("a", "b", "c"))
    dual_encoder = DualEncoder(MINILM)
    embedded = dual_encoder.embed_items(TEXTS), dual_encoder.embed_queries(QUERY_TEXTS)
    manifest = Manifest(
        kind="embeddings",
        config={"dual_encoder": MINILM},
        counts={},
        made_from={"items": items.fingerprint, "queries": queries.fingerprint},
    )
    with new_artifact(folder / "embeddings", manifest) as aside:
        save_embedded_corpus(aside, EmbeddedCorpus(items, queries, ("train", "train", "test"), *embedded, MINILM))
    (folder / "in.run").write_text("".join(f"{q} Q0 {i} 1 {n}.5 x\n" for n, (q, i) in enumerate(["1a", "1b", "1d", "2b", "2c"])))
    return folder


def import_run(files, out, source="in.run", *flags):
    arguments = [files / source, "--embeddings", files / "embeddings", "--model", "their model", "--out", out, *flags]
    return axn("import-scores", *arguments)


def test_import_export_import(files, tmp_path):
    code, output = import_run(files, tmp_path / "scores")
    assert code == 0 and output.strip().endswith(str(tmp_path / "scores"))
    code, output = axn("export-scores", tmp_path / "scores", "--out", tmp_path / "out.run")
    assert code == 0, output
    code, output = import_run(files, tmp_path / "again", tmp_path / "out.run")
    assert code == 0, output
    first, again = load_scores(tmp_path / "scores"), load_scores(tmp_path / "again")
    np.testing.assert_array_equal(first.matrix.scores, again.matrix.scores)
    assert (first.query_ids, first.made_from) == (again.query_ids, again.made_from)
    training = ["export-scores", tmp_path / "scores", "--embeddings", files / "embeddings", "--format", "hard_negatives"]
    code, output = axn(*training, "--negatives", 1, "--out", tmp_path / "set.parquet")
    assert code == 0, output
    assert pq.read_table(tmp_path / "set.parquet").to_pylist() == [
        {"query": "he ran", "positive": "run fast", "negative_1": "jump high", "label": [0.5, 2.5]},
        {"query": "she walked", "positive": "walk", "negative_1": "stand still", "label": [3.5, 4.5]},
    ]


def test_imported_scores_factorize(ray_session, files, tmp_path):
    assert import_run(files, tmp_path / "scores")[0] == 0
    code, output = axn(
        "factorize", "--embeddings", files / "embeddings", "--scores", tmp_path / "scores", "--method", "bayes",
        "--storage", tmp_path / "storage", "--out", tmp_path / "bayes",
    )  # fmt: skip
    assert code == 0, output
    assert read_manifest(tmp_path / "bayes", "factorization").made_from["cross_encoder"] == hash_json({"imported": "their model"})


def test_bad_input_is_one_sentence(files, tmp_path):
    (files / "unknown.run").write_text("7 Q0 a 1 1 x\n")
    pq.write_table(pa.table({"query_id": ["1"], "item_id": ["a"], "value": [1.0]}), files / "no_score.parquet")
    (files / "cut.parquet").write_bytes((files / "no_score.parquet").read_bytes()[:-9])
    out = tmp_path / "scores"
    assert "query '7' is not in the corpus" in failure(*import_run(files, out, "unknown.run"))
    assert "does not exist" in failure(*import_run(files, out, "none.run"))
    assert "has no column 'score'" in failure(*import_run(files, out, "no_score.parquet"))
    assert "cut.parquet cannot be read as parquet" in failure(*import_run(files, out, "cut.parquet"))
    missing = axn("import-scores", files / "in.run", "--embeddings", files / "embeddings", "--out", out)
    assert "model: Field required" in failure(*missing)
    assert "is not a finished scores artifact" in failure(*axn("export-scores", out, "--out", tmp_path / "out.run"))
    assert import_run(files, out)[0] == 0
    no_texts = axn("export-scores", out, "--format", "pairs", "--out", tmp_path / "set.parquet")
    assert "give the embeddings artifact" in failure(*no_texts)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


@pytest.fixture(scope="module")
def searched(files, tiny_cross_encoder):
    """A factorization, and exact scores of the first query by the tiny cross-encoder."""
    corpus = load_embedded_corpus(files / "embeddings")
    config = CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32")
    cross_encoder = open_cross_encoder(config)
    scores = cross_encoder.score_texts([QUERY_TEXTS[0]] * 6, TEXTS)
    rows, items = np.zeros(6, dtype=np.int32), np.arange(6, dtype=np.int32)
    matrix = ScoreMatrix.from_triples(rows, items, scores, n_queries=1, n_items=6)
    inputs = FitInputs(matrix, np.asarray(corpus.item_embeddings), np.asarray(corpus.query_embeddings[:1]))
    fit = FactorizationConfig(method="bayes")
    fitted = fit_closed_form(inputs, inputs.fit_scale(), fit)
    with new_artifact(
        files / "factorization", describe_factorization(fitted, fit, {"items": corpus.items.fingerprint})
    ) as folder:
        save_factorization(folder, fitted)
    made_from = {"items": "x", "queries": "y", "cross_encoder": hash_json(cross_encoder.fingerprint)}
    manifest = Manifest(
        kind="scores", config={"fingerprint": cross_encoder.fingerprint}, counts={"pairs": 4}, made_from=made_from
    )
    with new_artifact(files / "known", manifest) as folder:
        write_ids(folder, QUERIES, "query_id", ["other id"], [QUERY_TEXTS[0]])
        write_ids(folder, ITEMS, "item_id", list("fedc"), [TEXTS[n] for n in (5, 4, 3, 2)])
        write_shard(folder, 0, rows[:4], items[:4], scores[[5, 4, 3, 2]], {"fingerprint": ""})
    return ["--cross-encoder", tiny_cross_encoder, "--dtype", "float32", "--budget", 6, "--rounds", 2]


def test_a_search_looks_up_before_it_pays(files, tmp_path, searched):
    search = ["--embeddings", files / "embeddings", "--factorization", files / "factorization", *searched]
    code, output = axn("search", QUERY_TEXTS[0], *search, "--known-scores", files / "known")
    assert code == 0 and "(6 CE calls, 4 of them known)" in output, output
    code, output = axn("search", "a new query", *search, "--known-scores", files / "known")
    assert code == 0 and "(6 CE calls)" in output, output
    assert import_run(files, tmp_path / "scores")[0] == 0
    other = axn("search", QUERY_TEXTS[0], *search, "--known-scores", files / "known", "--known-scores", tmp_path / "scores")
    message = failure(*other)
    assert "known scores number 2 were made with the cross-encoder" in message and "'imported': 'their model'" in message
    gone = failure(*axn("search", QUERY_TEXTS[0], *search, "--known-scores", tmp_path / "none"))
    assert "is not a finished scores artifact" in gone


def test_what_is_known_changes_the_cost_and_nothing_else(files, searched, tiny_cross_encoder):
    corpus, given = load_embedded_corpus(files / "embeddings"), {"cross_encoder": str(tiny_cross_encoder), "dtype": "float32"}
    for budget in (2, 3, 6):
        results = []
        for known in ([], [str(files / "known")]):
            config = SearchConfig(**given, budget=budget, rounds=2, known_scores=known)
            results.append(Searcher(corpus, files / "factorization", config).search(QUERY_TEXTS[0]))
        alone, cached = results
        assert alone.n_ce_calls == cached.n_ce_calls == budget
        assert alone.n_known == 0 and cached.n_known == sum(item in (2, 3, 4, 5) for item in cached.item_index)
        np.testing.assert_array_equal(alone.item_index, cached.item_index)
        np.testing.assert_array_equal(alone.round, cached.round)
        np.testing.assert_allclose(alone.score, cached.score, atol=1e-5)


def test_each_explains_itself():
    for stage in ("import-scores", "export-scores"):
        code, output = axn(stage, "--help")
        assert code == 0 and "--out" in output
