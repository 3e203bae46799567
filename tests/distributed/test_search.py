"""`axn search --queries`: many queries on Ray Data give the rankings that each gives alone."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from axn_ray.cli import app
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.searcher import SearchConfig, Searcher
from axn_ray.in_process import AxnSearcher
from tests.serve_app.conftest import KNOWN, make_index

PICKY = "python:tests.serve_app.scorers:Picky"
ONE = ["--workers", 1]  # takes both shards of queries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_index(tmp_path_factory.mktemp("index"))
    texts = [f"somebody {verb} {n}" for n in range(7) for verb in ("sang", "ran", "burned")]
    pq.write_table(pa.table({"query_id": [f"q{n:02}" for n in range(21)], "text": texts}), made / "queries.parquet")
    return made


@pytest.fixture
def axn(ray_session):
    def run(*arguments, cross_encoder=KNOWN):
        result = CliRunner().invoke(app, ["search", *map(str, arguments), "--cross-encoder", cross_encoder])
        return result.exit_code, result.output

    return run


def index_of(folder):
    return ["--embeddings", folder / "embeddings", "--factorization", folder / "bayes"]


def test_the_run_holds_what_each_query_finds_alone(axn, folder, tmp_path):
    out = tmp_path / "run.trec"
    settings = ["--budget", 12, "--rounds", 3, "--top-k", 4]
    code, output = axn("--queries", folder / "queries.parquet", "--out", out, *index_of(folder), *settings)
    assert code == 0, output
    rows = [line.split(" ") for line in out.read_text().splitlines()]
    queries = pq.read_table(folder / "queries.parquet").to_pylist()
    config = SearchConfig(cross_encoder=KNOWN, budget=12, rounds=3, top_k=4)
    searcher = Searcher(load_embedded_corpus(folder / "embeddings"), folder / "bayes", config)
    expected = [
        (query["query_id"], "Q0", hit.item_id, rank, hit.score, "axn-ray")
        for query in queries
        for rank, hit in enumerate(searcher.hits(searcher.search(query["text"])), start=1)
    ]
    assert [(q, q0, item, int(rank), pytest.approx(float(score)), tag) for q, q0, item, rank, score, tag in rows] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one query", "--queries", "x.parquet", "--out", "y"], "give one query's text, or --queries FILE with --out FILE"),
        (["--queries", "x.parquet"], "give one query's text, or --queries FILE with --out FILE"),
        (["--queries", "missing.parquet", "--out", "y"], "missing.parquet"),
    ],
)
def test_half_a_command_is_one_sentence(axn, folder, arguments, said):
    code, output = axn(*arguments, *index_of(folder))
    assert code == 1
    assert said in output
    assert "Traceback" not in output


def test_a_search_that_cannot_be_made_leaves_no_file(axn, folder, tmp_path):
    code, output = axn(
        "--queries", folder / "queries.parquet", "--out", tmp_path / "run", *index_of(folder), "--budget", 61, *ONE
    )
    assert code == 1
    assert "budget=61 exceeds the 60 items in the index" in output
    assert not (tmp_path / "run").exists()


def test_workers_in_another_directory_find_what_is_named_from_here(axn, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    index = ["--embeddings", "embeddings", "--factorization", "bayes"]
    code, output = axn("--queries", "queries.parquet", "--out", tmp_path / "run", *index, "--budget", 12, *ONE)
    assert code == 0, output


def test_an_id_that_no_run_can_hold_is_refused_before_any_call(axn, folder, tmp_path):
    pq.write_table(pa.table({"query_id": ["q 1"], "text": ["somebody sang"]}), tmp_path / "queries.parquet")
    code, output = axn("--queries", tmp_path / "queries.parquet", "--out", tmp_path / "run", *index_of(folder))
    assert code == 1
    assert "query id 'q 1' is empty or has a blank, which a TREC run cannot hold; rename it" in " ".join(output.split())


def test_items_that_cannot_be_scored_are_counted_and_named(axn, folder, tmp_path):
    """Six of the sixty items have `twice` in them."""
    settings = ["--budget", 60, "--rounds", 3, "--top-k", 60, *ONE]
    code, output = axn(
        "--queries", folder / "queries.parquet", "--out", tmp_path / "run", *index_of(folder), *settings, cross_encoder=PICKY
    )
    assert code == 0, output
    assert len((tmp_path / "run").read_text().splitlines()) == 21 * 54
    assert f"{21 * 6} CE calls were for items that could not be scored" in " ".join(output.split())
    config = SearchConfig(cross_encoder=PICKY, budget=60, rounds=3, top_k=60)
    reply = AxnSearcher(folder / "embeddings", folder / "bayes", config).search("somebody sang")
    assert (len(reply.results), reply.usage["ce_calls"], reply.degraded.scorer_error) == (54, 60, True)
    assert len(reply.failures) == 6
    assert {failure["reason"] for failure in reply.failures} == {"ValueError: not twice"}


def test_where_no_item_can_be_scored_the_reason_is_said(axn, folder):
    code, output = axn("one query", *index_of(folder), "--budget", 10, cross_encoder="python:tests.distributed.scorers:Broken")
    assert code == 1
    assert "the cross-encoder cannot score items such as" in output
