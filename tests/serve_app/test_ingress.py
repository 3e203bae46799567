"""The ingress alone, before deployments that die, fail or take their time: what is refused, at what cost, and how it is said."""

import asyncio
import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pydantic
import pytest
from ray.exceptions import RayActorError

from serve_app import schemas
from serve_app.api import build_api
from serve_app.config import AppArgs
from serve_app.cross_encoder import CrossEncoderDeployment
from serve_app.ingress import _listening_host
from serve_app.messages import Refused, Scored
from tests.serve_app.conftest import KNOWN
from tests.serve_app.house import a_round, counted, describe, open_house, reply, visit

SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}


@pytest.fixture
def clock(monkeypatch):
    """The time of the app, which stands still until a test moves it."""
    now = SimpleNamespace(s=1000.0)
    for module in ("api", "calls", "ingress"):
        monkeypatch.setattr(f"serve_app.{module}.time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def post(house, route, body):
    """The answer to one request; `body` as JSON, or as it stands."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return visit(house, lambda client: client.post(route, content=content, headers={"content-type": "application/json"}))


MANY = [1] * 5000
NAMES = {f"n{number}": 1 for number in range(5000)}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (schemas.SearchRequest, {"query": MANY}),
        (schemas.SearchRequest, {"query": "a", "filter": {"verb": MANY}}),
        (schemas.SearchRequest, {"query": "a", "filter": NAMES}),
        (schemas.SearchRequest, {"query": "a", **NAMES}),
        (schemas.SearchRequest, {"query": "a", "budget": NAMES}),
        (schemas.RerankRequest, {"query": "a", "documents": MANY}),
        (schemas.RerankRequest, {"query": "a", "documents": [{"txt": "a"}] * 5000}),
        (schemas.EitherRerank, {"query": "a", "texts": MANY, "documents": MANY}),
        (schemas.EitherRerank, {"query": "a", "documents": MANY}),
        (schemas.ScoreRequest, dict.fromkeys(("text_1", "text_2", "queries", "documents"), MANY)),
    ],
)
def test_a_body_with_thousands_of_faults_has_few_errors(model, body):
    with pytest.raises(pydantic.ValidationError) as refused:
        pydantic.TypeAdapter(model).validate_python(body)
    assert refused.value.error_count() <= 10


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"query": "a", "x" * 50_000: 1}, "; the fields are query, top_k"),
        ({"query": "a", "filter": {"x" * 50_000: 1}}, ": Input should be a valid string"),
        ({"query": "a", "filter": dict.fromkeys(NAMES, "b")}, "filter: 5000 names exceed the limit of 64"),
        ({"query": "a", **NAMES}, "5001 names exceed the limit of 64 in one object; send fewer"),
        ({"query": "a", "return_scores": "x" * 50_000}, "return_scores: Input should be 'exact' or 'all'"),
    ],
)
def test_no_error_is_as_long_as_its_request(body, said):
    answer = post(open_house(), "/v1/search", body)
    assert answer.status_code == 422
    assert said in answer.json()["message"]
    assert len(answer.content) < 1000


def test_what_a_deployment_quotes_is_cut_in_its_middle():
    async def search(job):
        return Refused("invalid", f"the items have no column {next(iter(job.filter))!r} to filter by; their columns: place")

    answer = post(open_house(search=search), "/v1/search", {"query": "a", "filter": {"x" * 50_000: "b"}}).json()
    assert answer["message"].startswith("the items have no column 'xxx")
    assert answer["message"].endswith("to filter by; their columns: place")
    assert len(answer["message"]) < 1100


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/search", {"query": 5}, "query"),
        ("/v1/search", {"query": ["a", 5]}, "query.1"),
        ("/v1/search", {"query": ["a", "\ud800"]}, "query.1"),
        ("/v1/search", {"query": "a", "filter": {"verb": 5}}, "filter.verb"),
        ("/v1/search", {"query": "a", "filter": {"verb": ["b", 5]}}, "filter.verb.1"),
        ("/v1/search", {"query": "a", "budget": {"ce_call": 2}}, "budget.ce_call"),
        ("/v1/search", {}, "query"),
        ("/v1/search", [], None),
        ("/v1/rerank", {"query": "a", "documents": ["a", 5]}, "documents.1"),
        ("/v1/rerank", {"query": "a", "documents": ["a", {"txt": "b"}]}, "documents.1.text"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": ["a", 5]}, "documents.1"),
        ("/rerank", {"query": "a", "texts": ["a", 5]}, "texts.1"),
        ("/rerank", {"query": "a", "texts": ["a"], "raw_scores": "maybe"}, "raw_scores"),
        ("/rerank", "text", None),
        ("/v1/score", {"text_1": "a", "text_2": ["b", None]}, "text_2.1"),
        ("/v1/score", {"text_1": "a" * 10_001, "text_2": "b"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 1001}, "text_2"),
    ],
)
def test_param_names_what_the_client_sent(route, body, param):
    answer = post(open_house(), route, body)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


def test_texts_make_a_rerank_request_tei_s_whatever_else_it_holds():
    jina = {"documents": ["c"], "top_n": 1, "return_documents": True, "model": "x"}
    answer = post(open_house(), "/rerank", {"query": "a", "texts": ["a", "b"], **jina}).json()
    assert [result["index"] for result in answer] == [1, 0]
    assert post(open_house(), "/rerank", {"query": "a", **jina}).json()["results"][0]["document"] == {"text": "c"}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/search", {}),
        ("/v1/search", {"stream": True}),
        ("/v1/rerank", {"documents": ["a"]}),
        ("/v2/rerank", {"documents": ["a"]}),
        ("/rerank", {"texts": ["a"]}),
        ("/v1/score", {"documents": ["a"]}),
        ("/v1/score", {"documents": ["a", "b"], "queries": ["a", "x" * 101]}),
    ],
)
def test_a_query_that_is_too_long_is_refused(route, body):
    house = open_house(max_query_chars=100)
    name = "queries" if route == "/v1/score" else "query"
    answer = post(house, route, {name: "x" * 101, **body})
    assert answer.status_code == 422
    assert answer.json()["message"] == "a query of 101 characters exceeds the limit of 100; shorten it"
    assert answer.json()["error"]["param"] == name
    assert visit(house, lambda client: client.get("/info")).json()["limits"]["max_query_chars"] == 100


def test_a_query_is_tokenized_once_and_beside_the_event_loop(index_folder, tmp_path):
    args = AppArgs(index=str(index_folder), cross_encoder=KNOWN, cache=tmp_path)
    context = SimpleNamespace(get_assigned_resources=dict)
    with patch("serve_app.cross_encoder.ray.get_runtime_context", return_value=context):
        deployment = CrossEncoderDeployment(args)
    is_free, tokenized = threading.Event(), []

    def tokenize(texts):
        assert is_free.wait(5), "the event loop stands still"
        tokenized.extend(texts)
        return tuple(texts)

    async def ask(query):
        asyncio.get_running_loop().call_soon(is_free.set)
        answer = await deployment.score_items(query, np.arange(3, dtype=np.int32), deployment._version, 30.0, False)
        assert isinstance(answer, Scored)
        is_free.clear()

    async def ask_all():
        for query in ("a", "b", "a", "c", "b", "a"):
            await ask(query)

    with patch.object(deployment._scorer, "tokenize_queries", tokenize), patch("serve_app.cross_encoder.QUERIES_KEPT", 2):
        asyncio.run(ask_all())
    assert tokenized == ["a", "b", "c", "a"]  # the oldest makes room


def test_a_list_of_queries_where_one_fails_unexpectedly():
    ended = []

    async def search(job):
        await asyncio.sleep(0.01)
        if job.query == "bad":
            raise ValueError("a bug")
        await asyncio.sleep(0.05)
        ended.append(job.query)
        return reply()

    house = open_house(search=search)
    answer = post(house, "/v1/search", {"query": ["x", "bad", " ", "y"]})
    assert answer.status_code == 200
    assert [entry.get("error", {}).get("code") for entry in answer.json()["data"]] == [None, 500, 400, None]
    assert [entry["id"].rsplit("-", 1)[1] for entry in answer.json()["data"]] == ["0", "1", "2", "3"]
    assert ended == ["x", "y"]
    assert counted(house) == {200: 1}


def test_a_budget_beyond_the_limit_is_422_whatever_the_load():
    house = open_house(max_budget=1000)
    with house.admit(house.args.max_queued_pairs):
        alone = post(house, "/v1/search", {"query": "a", "budget": {"ce_calls": 1001}})
        listed = post(house, "/v1/search", {"query": ["a", "b"], "budget": {"ce_calls": 1001}})
    assert alone.status_code == 422
    assert [entry["error"]["code"] for entry in listed.json()["data"]] == [422, 422]


@pytest.mark.parametrize(("pending", "at_once"), [(0, 4), (1, 3), (300, 1), (301, None)])
def test_a_long_list_searches_as_many_at_once_as_there_is_room_for(pending, at_once):
    seen = []

    async def search(job):
        seen.append(house._pending_pairs)
        running.add(job.query)
        most.append(len(running))
        await asyncio.sleep(0.01)
        running.discard(job.query)
        return reply()

    house, running, most = open_house(search=search, max_queued_pairs=400), set(), []
    queries = [f"query {number}" for number in range(10)]
    with house.admit(pending):
        answer = post(house, "/v1/search", {"query": queries, "budget": {"ce_calls": 100}})
    if at_once is None:
        assert answer.status_code == 429
        assert "no room for 100 more" in answer.json()["message"]
    else:
        assert ["results" in entry for entry in answer.json()["data"]] == [True] * 10
        assert max(most) == at_once
        assert set(seen) == {pending + at_once * 100}
    assert house._pending_pairs == 0


def test_queries_of_a_list_that_wait_have_the_less_time_left(clock):
    left = {}

    async def search(job):
        left[job.query] = job.timeout_s
        clock.s += 0.75
        return reply()

    house = open_house(search=search, max_queued_pairs=100)
    answers = post(house, "/v1/search", {"query": ["a", "b", "c"], "deadline_ms": 1000}).json()["data"]
    assert left == {"a": 1.0, "b": 0.25}
    assert answers[2]["error"]["type"] == "deadline"


@pytest.mark.parametrize("stream", [False, True])
def test_each_try_after_a_dead_retriever_gets_the_time_that_is_left(clock, stream):
    left = []

    async def search(job):
        left.append(job.timeout_s)
        clock.s += 0.375
        raise RayActorError

    async def search_rounds(job):
        await search(job)
        yield

    house = open_house(search=search, search_rounds=search_rounds)
    answer = post(house, "/v1/search", {"query": "a", "deadline_ms": 1000, "stream": stream})
    assert left == [1.0, 0.625, 0.25]
    assert answer.status_code == 504
    assert answer.json()["message"] == "no result by the deadline; raise deadline_ms or try again"


def test_a_stream_of_a_silent_retriever_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr("serve_app.ingress.GRACE_S", 0.1)
    closed = []

    async def search_rounds(job):
        try:
            await asyncio.sleep(60)
            yield reply()
        finally:
            closed.append(True)

    house = open_house(search_rounds=search_rounds)
    started = time.monotonic()
    answer = post(house, "/v1/search", {"query": "a", "deadline_ms": 200, "stream": True})
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline")
    assert closed and time.monotonic() - started < 30
    assert house._pending_pairs == 0


@pytest.mark.parametrize(("rate", "expected"), [(0.0, "1"), (1000.0, "1"), (100.0, "4"), (1.0, "60")])
def test_who_is_shed_hears_how_long_what_is_promised_takes(rate, expected):
    async def search(job):
        return replace(reply(), pairs_per_second=rate)

    house = open_house(search=search, max_queued_pairs=400)
    assert post(house, "/v1/search", {"query": "a"}).status_code == 200
    with house.admit(400):
        answer = post(house, "/v1/search", {"query": "a", "budget": {"ce_calls": 7}})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == expected
    assert "400 pairs are promised to requests under way, no room for 7 more" in answer.json()["message"]


def test_what_a_refused_search_has_spent_is_counted():
    async def search(job):
        return Refused("scorer_failed", "it broke", ce_calls=40, tokens=900)

    house = open_house(search=search)
    assert post(house, "/v1/search", {"query": "a"}).status_code == 424
    exposed = house.metrics.exposition().decode()
    assert 'axn_ce_calls_total{route="/v1/search"} 40.0' in exposed
    assert "axn_tokens_total 900.0" in exposed


def test_a_client_that_leaves_before_its_body_is_whole_gets_no_answer():
    house, sent = open_house(), []
    coming = iter([{"type": "http.request", "body": b'{"query"', "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(coming)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": [], "query_string": b""}
    asyncio.run(build_api(house)(scope, receive, send))
    assert not sent
    assert counted(house) == {499: 1.0}


def test_a_missing_key_is_asked_for(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    answer = post(open_house(tmp_path / "keys"), "/v1/search", {"query": "a"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("prefix", ["", "/axn"])
def test_what_does_not_come_in_counts_under_the_route_that_it_asked_for(tmp_path, prefix):
    (tmp_path / "keys").write_text("secret\n")
    house = open_house(tmp_path / "keys", max_body_bytes=1000)

    async def ask(client):
        key = {"X-API-Key": "secret"}
        for path, headers, size in (
            ("/v1/search", {}, 1),
            ("/v1/search", key, 2000),
            ("/v1/nothing", {}, 1),
            ("/v1/nothing", key, 1),
        ):
            await client.post(prefix + path, headers=headers, content=b"x" * size)

    visit(house, ask, prefix)
    assert counted(house) == {401: 1.0, 413: 1.0}
    assert counted(house, "unknown") == {401: 1.0, 404: 1.0}


def test_the_schema_says_how_a_key_is_sent():
    async def ask(client):
        return (await client.get("/openapi.json")).json()

    schema = visit(open_house(), ask)
    schemes = schema["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer" and (schemes["key"]["in"], schemes["key"]["name"]) == ("header", "X-API-Key")
    assert [{"bearer": []}, {"key": []}, {}] == schema["security"]
    is_open = {path: operation.get("security") == [] for path, item in schema["paths"].items() for operation in item.values()}
    assert {path for path in is_open if is_open[path]} == {"/health", "/ready"}


@pytest.mark.parametrize(("host", "expected"), [(None, "127.0.0.1"), ("", ""), ("0.0.0.0", "0.0.0.0")])
def test_an_empty_host_is_every_address(monkeypatch, host, expected):
    client = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    assert _listening_host() == expected


def test_an_unexpected_failure_is_a_500_that_is_counted_and_safe():
    async def search(job):
        raise ValueError("a bug")

    house = open_house(search=search)
    answer = post(house, "/v1/search", {"query": "a"})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "an error of ours; the log has it under this id", "type": "internal", "param": None, "code": 500,
    }  # fmt: skip
    assert SAFE.items() <= dict(answer.headers).items()
    assert counted(house) == {500: 1}


def test_a_stream_that_fails_later_says_so_at_its_end():
    async def search_rounds(job):
        yield a_round(1, 2)
        raise ValueError("a bug")

    house = open_house(search_rounds=search_rounds)
    answer = post(house, "/v1/search", {"query": "a", "stream": True})
    assert answer.status_code == 200
    _, last = answer.text.strip().split("\n\n")
    kind, data = last.split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "internal"
    assert house._pending_pairs == 0
    assert 'axn_broken_streams_total{status="500"} 1.0' in house.metrics.exposition().decode()


def test_readiness_ends_with_the_deployments_and_comes_back_with_them(clock):
    there, asked = [True], []

    async def described():
        asked.append(clock.s)
        if not there[-1]:
            raise RayActorError
        return await describe()

    async def ask(client):
        statuses = [(await client.get("/ready")).status_code for _ in range(5)]
        assert len(asked) == 2  # index and model, once
        for now in (False, True):
            there.append(now)
            clock.s += 2
            statuses.append((await client.get("/ready")).status_code)
        return statuses

    assert visit(open_house(describe=described), ask) == [200] * 5 + [503, 200]


@pytest.mark.parametrize("prefix", ["", "/axn"])
def test_probes_and_the_page_are_open_under_a_prefix_too(prefix, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    paths = ("/", "/health", "/ready", "/info", "/v1/models", "/health/x")

    async def ask(client):
        return [(await client.get(prefix + path)).status_code for path in paths]

    assert visit(open_house(keys), ask, prefix) == [200, 200, 200, 401, 401, 401]
