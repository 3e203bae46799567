"""`axn serve` as a user starts it: a folder, a real cross-encoder over token ids, keys; one sentence where it cannot start."""

import math
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from typer.testing import CliRunner

from axn_ray.cli import app
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.searcher import SearchConfig, Searcher
from tests.serve_app.collector import facts_of, open_collector
from tests.serve_app.conftest import free_port

KEY = {"Authorization": "Bearer a-key"}


@pytest.fixture(scope="module")
def collector():
    with open_collector() as opened:
        yield opened


@pytest.fixture(scope="module")
def started(collector, index_folder, tiny_cross_encoder, tmp_path_factory):
    """A running `axn serve`, its URL, and the folder of its cache."""
    cache, port = tmp_path_factory.mktemp("axn_serve"), free_port()
    program = [sys.executable, "-c", "from axn_ray.cli import main; main()", "serve"]
    settings = ["--index", index_folder, "--cross-encoder", tiny_cross_encoder, "--dtype", "float32", "--threads", 1]
    command = [str(part) for part in [*program, *settings, "--cache", cache, "--port", port]]
    with (cache / "log").open("w") as log:
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        environment = {**os.environ, **traced, "AXN_API_KEYS": "a-key"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, cache / "log")
        yield process, url, cache
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("stream", [False, True])
def test_a_collector_receives_each_searchs_rounds_below_it(started, collector, stream):
    url, trace_id = started[1], "ab" * 16 if stream else "cd" * 16
    body = {"query": "somebody sang", "stream": stream, "budget": {"ce_calls": 20, "rounds": 4}}
    headers = {**KEY, "traceparent": f"00-{trace_id}-0123456789abcdef-01"}
    assert httpx.post(f"{url}/v1/search", json=body, headers=headers, timeout=60).status_code == 200
    for _ in range(100):
        received = [(name, span) for name, span in collector.spans if span.trace_id.hex() == trace_id]
        spans = [(name, span) for name, span in received if span.name in ("search", "round")]  # Serve has some of its own
        if len(spans) == 5:
            break
        time.sleep(0.2)
    (search,) = [span for name, span in spans if span.name == "search"]
    assert search.parent_span_id.hex() == "0123456789abcdef"
    assert facts_of(search) == {"method": "axn", "ce_calls": 20}
    rounds = [span for name, span in spans if (name, span.parent_span_id) == ("Retriever", search.span_id)]
    assert sorted((facts_of(span)["round"], facts_of(span)["pairs"]) for span in rounds) == [(n, 5) for n in (1, 2, 3, 4)]


def test_it_serves_the_folder_and_stops_when_told(started, index_folder, tiny_cross_encoder):
    process, url, cache = started
    body = {"query": "somebody sang", "top_k": 20, "budget": {"ce_calls": 20, "rounds": 4}}
    assert httpx.post(f"{url}/v1/search", json=body).status_code == 401
    answer = httpx.post(f"{url}/v1/search", json=body, headers=KEY, timeout=60).json()
    config = SearchConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32", budget=20, rounds=4, top_k=20)
    corpus = load_embedded_corpus(index_folder / "embeddings")
    searcher = Searcher(corpus, index_folder / "bayes", config)
    expected = searcher.hits(searcher.search("somebody sang"))
    assert [(hit["id"], hit["round"]) for hit in answer["results"]] == [(hit.item_id, hit.round) for hit in expected]
    assert [hit["score"] for hit in answer["results"]] == pytest.approx([hit.score for hit in expected], abs=2e-5)
    assert answer["usage"]["tokens"] > 20 * 5
    assert len(list(cache.glob("tokens-*/ids.npy"))) == 1  # mapped by every replica of this machine

    documents = ["a bird sang", "long " * 100, "the tree burned"]
    ranked = httpx.post(f"{url}/v2/rerank", json={"query": "who sang", "documents": documents}, headers=KEY, timeout=60).json()
    logits = open_cross_encoder(config).score_texts(["who sang"] * 3, documents)
    scores = {result["index"]: result["relevance_score"] for result in ranked["results"]}
    assert scores == pytest.approx({row: 1 / (1 + math.exp(-logit)) for row, logit in enumerate(logits)}, abs=1e-5)

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, (cache / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "host=0.0.0.0 lets other machines in and there is no API key"),
        (["--index", "no-such-folder"], "no-such-folder is no index: it must hold `embeddings` and one of bayes, mf_ind"),
        (["--api-keys-file", "no-such-file"], "no-such-file cannot be read"),
        (["--max-queued-pairs", "0"], "max_queued_pairs: Input should be greater than or equal to 1"),
    ],
)
def test_it_says_in_one_sentence_why_it_cannot_start(arguments, said, monkeypatch):
    monkeypatch.delenv("AXN_API_KEYS", raising=False)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_is_not_shared():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert "cannot listen at 127.0.0.1, port" in result.output and "choose others with --host or --port" in result.output


def test_a_cross_encoder_that_is_not_there_is_one_sentence_before_anything_starts(index_folder):
    result = CliRunner().invoke(app, ["serve", "--index", str(index_folder), "--cross-encoder", "no-such/model"])
    assert result.exit_code == 1
    assert "cross-encoder 'no-such/model' cannot be loaded" in result.output
    assert "Traceback" not in result.output
