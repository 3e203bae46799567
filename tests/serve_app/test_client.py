"""The client against the running app, its twin in one process, and a server that answers every kind of error."""

import asyncio
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from axn_ray import client as clients
from axn_ray.client import AsyncAxnClient, AxnClient
from axn_ray.core.searcher import SearchConfig
from axn_ray.errors import InputError, ModelError
from axn_ray.in_process import AxnSearcher
from axn_ray.replies import RoundReply, SearchReply
from tests.serve_app.conftest import KNOWN
from tests.serve_app.scorers import known_score

QUERY = "somebody who sang on a stage"


@pytest.fixture
def axn(url):
    with AxnClient(url) as opened:
        yield opened


def awaited(url, ask):
    """`ask(client)` through the asynchronous client."""

    async def run():
        async with AsyncAxnClient(url) as opened:
            return await ask(opened)

    return asyncio.run(run())


def test_a_search_is_what_the_wire_says(axn, client):
    reply = axn.search(QUERY, top_k=5, budget=20, rounds=4, trace=True)
    wire = client.post("/v1/search", json={"query": QUERY, "top_k": 5, "budget": {"ce_calls": 20, "rounds": 4}}).json()
    assert [(hit.id, hit.score, hit.round) for hit in reply.results] == [
        (h["id"], h["score"], h["round"]) for h in wire["results"]
    ]
    assert [hit.score for hit in reply.results] == [
        pytest.approx(known_score(QUERY, f"{hit.title}: {hit.text}")) for hit in reply.results
    ]
    assert (reply.usage["ce_calls"], reply.degraded.rounds_done, len(reply.trace)) == (20, 4, 4)
    assert reply.index_version == wire["index_version"]


@pytest.fixture(scope="module")
def here(index_folder):
    config = SearchConfig(cross_encoder=KNOWN, budget=20, rounds=4, top_k=3)
    return AxnSearcher(index_folder / "embeddings", index_folder / "bayes", config)


def test_search_in_one_process_answers_as_the_server_does(axn, here):
    for top_k in (None, 7, 21):
        mine, served = here.search(QUERY, top_k=top_k), axn.search(QUERY, top_k=top_k or 3, budget=20, rounds=4)
        assert [(h.id, h.exact, h.round, h.title, h.text) for h in mine.results] == [
            (h.id, h.exact, h.round, h.title, h.text) for h in served.results
        ]
        assert [h.score for h in mine.results] == pytest.approx([h.score for h in served.results])
        assert mine.usage["ce_calls"] == 20
    documents = ["run home", "a poison item", "walk uphill"]
    assert here.rerank("they run", documents) == axn.rerank("they run", documents)


def test_search_in_one_process_refuses_what_the_server_does(axn, here):
    for top_k in (0, -1):
        with pytest.raises(InputError, match=f"top_k={top_k}"):
            here.search(QUERY, top_k=top_k)
        with pytest.raises(clients.InvalidRequestError, match="top_k"):
            axn.search(QUERY, top_k=top_k)
    for query, documents in ((" ", ["run home"]), ("they run", [])):
        with pytest.raises(InputError) as caught:
            here.rerank(query, documents)
        with pytest.raises(clients.InvalidRequestError) as refused:
            axn.rerank(query, documents)
        assert str(caught.value) == str(refused.value).replace("texts", "documents")
    for query, documents in (("they run", ["a poison item", " "]), ("a broken query", ["run home"])):
        with pytest.raises(ModelError, match="no document could be scored|the model is broken"):
            here.rerank(query, documents)
        with pytest.raises(clients.ScorerFailedError):
            axn.rerank(query, documents)


def test_rerank_gives_logits_and_leaves_out_what_cannot_be_scored(axn):
    documents = ["run home", "a poison item", "walk uphill"]
    ranked = axn.rerank("they run", documents)
    assert [(one.index, pytest.approx(one.score)) for one in ranked] == sorted(
        ((n, known_score("they run", documents[n])) for n in (0, 2)), key=lambda pair: -pair[1]
    )


def test_many_queries_have_each_their_reply_or_error(axn):
    first, second = axn.search_many([QUERY, "a broken query"], top_k=3, budget=10, rounds=2)
    assert first.results == axn.search(QUERY, top_k=3, budget=10, rounds=2).results
    assert {hit.title for hit in axn.search(QUERY, top_k=9, budget=10, rounds=2, filter={"verb": "walk"}).results} == {"walk"}
    assert isinstance(second, clients.ScorerFailedError)
    assert "the model is broken" in str(second)


def test_a_stream_is_a_ranking_after_every_round_and_then_the_reply(axn, url):
    *rounds, last = axn.stream(QUERY, top_k=5, budget=20, rounds=4)
    assert [(one.round, one.rounds, one.ce_calls) for one in rounds] == [(n, 4, 5 * n) for n in range(1, 5)]
    assert all(isinstance(one, RoundReply) for one in rounds)
    assert isinstance(last, SearchReply)
    assert last.results == rounds[-1].results == axn.search(QUERY, top_k=5, budget=20, rounds=4).results
    with pytest.raises(clients.InvalidRequestError):
        list(axn.stream(QUERY, budget=61))

    async def ask(opened):
        return [one async for one in opened.stream(QUERY, top_k=5, budget=20, rounds=4)]

    streamed = awaited(url, ask)
    assert streamed[:-1] == rounds
    assert streamed[-1].results == last.results


def test_the_asynchronous_client_is_the_same(axn, url):
    documents = ["run home", "walk uphill"]

    async def ask(opened):
        searched, many = await asyncio.gather(
            opened.search(QUERY, top_k=5, budget=20, rounds=4), opened.search_many([QUERY], top_k=5, budget=20, rounds=4)
        )
        return searched, many, await opened.rerank("they run", documents), await opened.info(), await opened.ready()

    searched, many, ranked, info, ready = awaited(url, ask)
    assert searched.results == many[0].results == axn.search(QUERY, top_k=5, budget=20, rounds=4).results
    assert ranked == axn.rerank("they run", documents)
    assert info == axn.info()
    assert ready is axn.ready() is True


@pytest.mark.parametrize(
    ("query", "options", "error", "message"),
    [
        ("", {}, "InvalidRequestError", "empty"),
        (QUERY, {"budget": 61}, "InvalidRequestError", "61"),
        (QUERY, {"rounds": 0}, "InvalidRequestError", "rounds"),
        ("a broken query", {"budget": 10}, "ScorerFailedError", "the model is broken"),
        ("a sleepy query", {"budget": 10, "rounds": 1, "deadline_ms": 300}, "DeadlineError", "deadline"),
    ],
)
def test_the_apps_errors_are_exceptions(axn, url, query, options, error, message):
    kind = getattr(clients, error)
    with pytest.raises(kind, match=message) as caught:
        axn.search(query, **options)
    assert caught.value.request_id
    with pytest.raises(kind, match=message):
        awaited(url, lambda opened: opened.search(query, **options))


@pytest.fixture
def refusing():
    """A server that answers its `status`, `headers` and `body`, as HTTP.md has them or as a proxy would."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.server.authorization = self.headers["authorization"]
            self.send_response(self.server.status)
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(self.server.body)

        do_GET = do_POST

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.status, server.headers, server.body = 200, {}, b"{}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, "UnauthorizedError"),
        (404, "NotFoundError"),
        (413, "InvalidRequestError"),
        (429, "OverloadedError"),
        (503, "NotReadyError"),
        (504, "DeadlineError"),
        (500, "HttpError"),
    ],
)
def test_every_status_has_its_exception(refusing, status, error):
    reason = {"message": "why", "type": "kind", "param": None, "code": status}
    refusing.status, refusing.headers = status, {"Retry-After": "7"}
    refusing.body = json.dumps({"id": "r1", "message": "why", "error": reason}).encode()
    with AxnClient(f"http://127.0.0.1:{refusing.server_port}") as opened:
        with pytest.raises(clients.HttpError, match="^why$") as caught:
            opened.search(QUERY)
        assert type(caught.value).__name__ == error
        seen = caught.value
        assert (seen.status, seen.kind, seen.request_id, seen.retry_after_s) == (status, "kind", "r1", 7.0)
        refusing.body = b"<html>a proxy's page"
        with pytest.raises(getattr(clients, error), match=f"the server answered {status}: <html>a proxy's page"):
            opened.search(QUERY)
        with pytest.raises(getattr(clients, error), match=f"the server answered {status}"):
            list(opened.stream(QUERY))


def refusal(server, method, *arguments):
    """What both clients raise of one request."""
    url = f"http://127.0.0.1:{server.server_port}"

    async def ask(opened):
        reply = getattr(opened, method)(*arguments)
        return [one async for one in reply] if method == "stream" else await reply

    with AxnClient(url) as opened, pytest.raises(clients.HttpError) as caught:
        reply = getattr(opened, method)(*arguments)
        list(reply if method == "stream" else [])
    with pytest.raises(clients.HttpError) as other:
        awaited(url, ask)
    assert (type(other.value), str(other.value)) == (type(caught.value), str(caught.value))
    return caught.value


CALLS = [
    ("info", ()),
    ("ready", ()),
    ("search", (QUERY,)),
    ("search_many", ([QUERY],)),
    ("rerank", (QUERY, ["run home"])),
    ("stream", (QUERY,)),
]
PAGE = b"<html>sign in</html>"
GZIP = {"content-encoding": "gzip", "content-type": "text/event-stream"}  # which the page is not
ROUND = b'event: round\ndata: {"round": 1, "rounds": 2, "ce_calls": 3, "results": []}\n\n'


@pytest.mark.parametrize(
    ("method", "arguments", "headers", "body"),
    [
        *((*call, headers, PAGE) for call in CALLS for headers in ({}, GZIP)),
        ("info", (), {}, b"[]"),
        ("ready", (), {}, b'{"status": "starting"}'),
        ("search", (QUERY,), {}, b'{"results": 3}'),
        ("search_many", ([QUERY],), {}, b'{"data": [{"error": "x"}]}'),
    ],
)
def test_what_is_no_reply_is_said_so(refusing, method, arguments, headers, body):
    refusing.headers, refusing.body = headers, body
    error = refusal(refusing, method, *arguments)
    assert (type(error), error.kind) == (clients.HttpError, "reply")
    assert "is it an axn-ray server" in str(error)


@pytest.mark.parametrize(
    "event",
    [
        b"event: round\ndata: no JSON\n\n",
        b'event: round\ndata: {"x": 1}\n\n',
        b'event: result\ndata: {"x": 1}\n\n',
        b'event: error\ndata: {"message": "x"}\n\n',
        b'event: error\ndata: "x"\n\n',
    ],
)
def test_an_event_that_is_no_reply_is_said_so(refusing, event):
    refusing.headers, refusing.body = {"content-type": "text/event-stream"}, ROUND + event
    assert refusal(refusing, "stream", QUERY).kind == "reply"


@pytest.mark.parametrize(
    ("body", "seen"),
    [(b"", "before its first round"), (ROUND, "after round 1 of 2"), (ROUND + b"event: res", "after round 1 of 2")],
)
def test_a_stream_that_ends_before_its_reply_was_cut(refusing, body, seen):
    refusing.headers, refusing.body = {"content-type": "text/event-stream"}, body
    error = refusal(refusing, "stream", QUERY)
    assert isinstance(error, clients.UnreachableError)
    assert f"cut the stream {seen}" in str(error)


def test_what_is_no_json_is_not_sent(refusing):
    for method in ("search", "stream"):
        error = refusal(refusing, method, "a lone \ud800")
        assert isinstance(error, clients.InvalidRequestError)
        assert "surrogates not allowed" in str(error)


def test_a_key_is_stripped_and_never_quoted(refusing, monkeypatch):
    refusing.body = b'{"status": "ready"}'
    url = f"http://127.0.0.1:{refusing.server_port}"
    with AxnClient(url, api_key="sk-secret\n") as opened:
        assert opened.ready()
    assert refusing.authorization == "Bearer sk-secret"
    for key in ("sk-s\xe9cret", "sk-\nsecret", "sk-\x00secret"):
        for kind in (AxnClient, AsyncAxnClient):
            with pytest.raises(InputError, match="printable ASCII") as caught:
                kind(url, api_key=key)
            assert "cret" not in str(caught.value)

    def quote(*_, **__):
        raise httpx2.LocalProtocolError("Illegal header value b'Bearer sk-secret'")

    with AxnClient(url) as opened:
        monkeypatch.setattr(opened._http, "request", quote)
        with pytest.raises(clients.UnreachableError, match="LocalProtocolError") as told:
            opened.info()
    assert "secret" not in str(told.value)


def test_no_server_is_said_so():
    with AxnClient("http://127.0.0.1:9") as opened:
        with pytest.raises(clients.UnreachableError, match="http://127.0.0.1:9 cannot be reached"):
            opened.search(QUERY)
        with pytest.raises(clients.UnreachableError):
            list(opened.stream(QUERY))
    with pytest.raises(clients.UnreachableError):
        awaited("http://127.0.0.1:9", lambda opened: opened.info())


def test_the_client_needs_neither_torch_nor_ray():
    program = (
        "import sys\nfor name in ('torch', 'ray', 'transformers', 'numpy'):\n    sys.modules[name] = None\n"
        "import axn_ray.client, axn_ray.replies\nprint('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("imported", "")
