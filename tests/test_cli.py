"""The command line as a user meets it: bad input is one sentence that names the cure, exit 1, nothing half-written."""

import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import axn_ray
from axn_ray.cli import app

ITEMS = {"item_id": ["a", "b", "c"], "text": ["run fast", "walk", "stand still"]}
QUERIES = {
    "query_id": ["1", "2", "3", "4"],
    "text": ["he ran", "she walked", "it stood", "we stand"],
    "split": ["train", "train", "test", "test"],
}


@pytest.fixture(scope="module")
def axn(ray_session):
    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        return result.exit_code, result.output

    return run


def write_corpus(folder):
    pq.write_table(pa.table(ITEMS), folder / "items.parquet")
    pq.write_table(pa.table(QUERIES), folder / "queries.parquet")
    return folder


@pytest.fixture
def files(tmp_path):
    return write_corpus(tmp_path)


@pytest.fixture(scope="module")
def scored_once(axn, tiny_cross_encoder, tmp_path_factory):
    """The corpus with its embeddings, some scores of train queries and the truth of test queries, all by the command line."""
    files = write_corpus(tmp_path_factory.mktemp("scored"))
    assert embed(axn, files)[0] == 0
    score = ["score", "--embeddings", files / "embeddings", "--cross-encoder", tiny_cross_encoder]
    for name, *settings in (
        ("scores", "--per-query", 2, "--active-share", 0, "--random-share", 0),  # three items leave a search nothing to find
        ("truth", "--split", "test", "--choice", "all"),
    ):
        code, output = axn(*score, *settings, "--out", files / name)
        assert code == 0, output
    return files


@pytest.fixture
def scored(scored_once, tmp_path):
    """A copy, which the test may change."""
    return shutil.copytree(scored_once, tmp_path, dirs_exist_ok=True)


def failure(code, output):
    """The one sentence of a failed call."""
    assert code == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "Traceback" not in output
    return errors[0]


def embed(axn, files, out="embeddings", **paths):
    items, queries = paths.get("items", files / "items.parquet"), paths.get("queries", files / "queries.parquet")
    return axn("embed", "--items", items, "--queries", queries, "--out", files / out)


def test_version_and_help_in_a_process_of_their_own():
    command = [sys.executable, "-m", "axn_ray.cli"]
    done = subprocess.run(
        [sys.executable, "-c", "from axn_ray.cli import main; main()", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == axn_ray.__version__, (command, done.stderr)


def test_every_stage_explains_itself():
    for stage in ("demo", "embed", "score", "distill", "factorize", "search", "evaluate", "advise", "train-cross-encoder"):
        result = CliRunner().invoke(app, [stage, "--help"])
        assert result.exit_code == 0, stage
        assert "--" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": ["a", "b", "a"]}, "id 'a' stands in rows 0 and 2; ids must be unique"),
        ({"item_id": [], "text": []}, "holds no items"),
        ({"text": ["x", " ", "y"]}, "text of row 1 is empty"),
    ],
)
def test_bad_items(axn, files, change, message):
    pq.write_table(pa.table({**ITEMS, **change}), files / "bad.parquet")
    assert message in failure(*embed(axn, files, items=files / "bad.parquet"))
    assert not (files / "embeddings").exists()


def test_truncated_and_missing_files(axn, files):
    cut = files / "cut.parquet"
    cut.write_bytes((files / "items.parquet").read_bytes()[:-30])
    assert "it may be truncated" in failure(*embed(axn, files, items=cut))
    assert "does not exist" in failure(*embed(axn, files, queries=files / "none.parquet"))
    assert sorted(path.name for path in files.iterdir()) == ["cut.parquet", "items.parquet", "queries.parquet"]


def test_flags_win_over_yaml_and_unknown_names_are_refused(axn, files):
    (files / "bad.yaml").write_text("iitems: x\n")
    assert "iitems: Extra inputs are not permitted" in failure(
        *axn("embed", "--config", files / "bad.yaml", "--out", files / "e")
    )
    (files / "good.yaml").write_text(f"items: {files}/no-items.parquet\nqueries: {files}/none.parquet\n")
    from_yaml = ["embed", "--config", files / "good.yaml", "--out", files / "e"]
    assert "no-items.parquet does not exist" in failure(*axn(*from_yaml))
    assert "none.parquet does not exist" in failure(*axn(*from_yaml, "--items", files / "items.parquet"))


def test_fewer_workers_at_most_than_at_least(axn, files):
    inputs = ["--embeddings", files / "e", "--scores", files / "s", "--out", files / "f"]
    message = failure(*axn("factorize", *inputs, "--workers", 3, "--max-workers", 2))
    assert "max_workers=2 is less than workers=3; raise it or leave it out" in message


def test_models_that_do_not_exist(axn, files):
    items, queries = files / "items.parquet", files / "queries.parquet"
    code, output = axn("embed", "--items", items, "--queries", queries, "--dual-encoder", "no-such/model", "--out", files / "e")
    assert "dual-encoder 'no-such/model' cannot be loaded" in failure(code, output)
    assert not (files / "e").exists()


def test_a_cross_encoder_that_gives_nan(axn, scored, tiny_cross_encoder, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    broken = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder)
    broken.classifier.bias.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_cross_encoder).save_pretrained(tmp_path / "broken")
    score = ["score", "--embeddings", scored / "embeddings", "--cross-encoder", tmp_path / "broken", "--per-query", 2]
    score += ["--active-share", 0, "--random-share", 0]
    message = failure(*axn(*score, "--out", tmp_path / "nan"))
    assert "4 of a shard's 4 pairs cannot be scored (first: query index 0, item index" in message
    assert "the score is nan" in message
    assert not (tmp_path / "nan/manifest.json").exists()
    assert not list(tmp_path.glob("nan/shards/*"))


def test_labels_that_are_no_items(axn, files):
    pq.write_table(pa.table({**QUERIES, "item_id": ["a", "zzz", "b", "b"]}), files / "labelled.parquet")
    train = ["train-cross-encoder", "--items", files / "items.parquet", "--queries", files / "labelled.parquet"]
    message = failure(*axn(*train, "--out", files / "ce", "--storage", files / "storage"))
    assert "label 'zzz' is no item" in message
    assert not (files / "ce").exists()


def test_the_road_from_files_to_results(axn, scored, tiny_cross_encoder):
    files, embeddings, ce = scored, scored / "embeddings", ["--cross-encoder", tiny_cross_encoder]
    missing = axn("score", "--embeddings", embeddings, "--cross-encoder", "no-such/model", "--per-query", 2, "--out", files / "s")
    assert "cross-encoder 'no-such/model' cannot be loaded" in failure(*missing)
    assert not (files / "s").exists()
    too_many = axn("score", "--embeddings", embeddings, *ce, "--per-query", 9, "--out", files / "s")
    assert "per_query=9 exceeds the 3 items" in failure(*too_many)
    for stage in ("factorize", "distill"):
        of_truth = ["--embeddings", embeddings, "--scores", files / "truth", "--storage", files / "storage"]
        leaked = failure(*axn(stage, *of_truth, "--out", files / "leaked"))
        assert "holds scores of 2 dev or test queries" in leaked and "give scores of train queries alone" in leaked
        assert not (files / "leaked").exists()
    code, output = axn(
        "factorize", "--embeddings", embeddings, "--scores", files / "scores", "--epochs", 2, "--storage", files / "storage",
        "--out", files / "bayes",
    )  # fmt: skip
    assert code == 0, output
    assert {path.name.rpartition("-")[0] for path in (files / "views").iterdir()} == {"de_half", "ce", "ce_half"}  # no titles
    search = ["search", "he [ran]", "--embeddings", embeddings, "--factorization", files / "bayes", *ce]
    code, output = axn(*search, "--budget", 3, "--rounds", 2)
    assert code == 0
    assert "3 CE calls" in output
    code, output = axn(*search, "--budget", 3, "--rounds", 3, "--top-k", 1, "--target-recall", 0.01)  # any score will do
    assert code == 0
    assert "(1 CE calls" in output
    over = failure(*axn(*search, "--budget", 500))
    assert "budget=500 exceeds the 3 items in the index; lower the budget or add items" in over
    assert "the query is empty" in failure(*axn("search", " ", *search[2:], "--budget", 3, "--rounds", 1))
    evaluate = ["evaluate", "--embeddings", embeddings, "--truth", files / "truth", "--bayes", files / "bayes"]
    settings = ["--methods", "rnr_de", "--methods", "axn_bayes", "--rounds", 2, "--budgets", 2, "--k", 1]
    code, output = axn(*evaluate, *settings, "--out", files / "evaluation")
    assert code == 0, output
    assert (files / "evaluation/recall.png").stat().st_size > 10_000
    over = failure(*axn(*evaluate, *settings, "--budgets", 50, "--out", files / "evaluation2"))
    assert "budget=50 exceeds the 3 items" in over
    assert not (files / "evaluation2").exists()
    partial = ["evaluate", "--embeddings", embeddings, "--truth", files / "scores", *settings, "--out", files / "evaluation2"]
    assert "the truth holds 2 train queries, methods are judged on test queries" in failure(*axn(*partial))
    code, output = axn("advise", files / "evaluation", "--recall", 0.01, "--k", 1)
    assert code == 0 and "of the exact top 1, take" in output
    assert "k=7 was not evaluated, only 1" in failure(*axn("advise", files / "evaluation", "--k", 7))


def test_cur_takes_dense_rows_of_a_few_train_queries(axn, scored, tiny_cross_encoder):
    score = ["score", "--embeddings", scored / "embeddings", "--cross-encoder", tiny_cross_encoder]
    for name, *settings in (
        ("rows", "--n-queries", 1, "--choice", "all"),
        ("other", "--choice", "all", "--max-length", 8),
    ):
        code, output = axn(*score, *settings, "--out", scored / name)
        assert code == 0, output
    too_many = axn(*score, "--n-queries", 3, "--choice", "all", "--out", scored / "more")
    assert "n_queries=3 exceeds the 2 queries of the split" in failure(*too_many)
    evaluate = ["evaluate", "--embeddings", scored / "embeddings", "--truth", scored / "truth", "--budgets", 3, "--k", 1]
    methods = ["--rounds", 2, "--methods", "anncur", "--methods", "adacur", "--methods", "rnr_de"]
    code, output = axn(*evaluate, *methods, "--dense-rows", scored / "rows", "--out", scored / "evaluation")
    assert code == 0, output
    summary = json.loads((scored / "evaluation" / "summary.json").read_text())
    calls = {row["method"]: row["index_ce_calls"] for row in summary}
    assert calls == {"ANNCUR": 3, "ADACUR, DE first": 3, "RnR, DE": 0}
    for folder, message in (
        ("scores", "4 of 6 pairs are scored; exact truth and CUR's dense rows need all of them"),
        ("truth", "holds 2 queries of the truth (such as '3'); score train queries"),
        ("other", "was scored by another cross-encoder than the truth"),
    ):
        code, output = axn(*evaluate, *methods, "--dense-rows", scored / folder, "--out", scored / "evaluation2")
        assert message in failure(code, output)
    assert not (scored / "evaluation2").exists()
