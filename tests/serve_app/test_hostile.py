"""Garbage, oversize and hostile requests: an error of the client's with the one body, never one of ours."""

import socket

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance

KINDS = [content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_what_the_schema_allows_and_what_it_does_not(url, mode):
    openapi = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in openapi.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/search", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score"}
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing to get wrong

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(max_examples=20, suppress_health_check=list(hypothesis.HealthCheck))
        def check(case):
            response = case.call(timeout=60)
            assert response.status_code != 500, response.text
            case.validate_response(response, checks=KINDS)

        check()


@pytest.mark.parametrize("route", ["/v1/search", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b"\x00" * 50,
        b"[" * 50_000,
        b'{"query": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
        b'{"query": NaN, "documents": [Infinity], "texts": [1e999]}',
        b'{"query": "a", "documents": ["a"], "texts": ["a"], "text_1": 7, "top_n": 1' + b"0" * 5000 + b"}",
        b'{"query": "\\ud800", "documents": ["\\udfff"], "texts": ["\\ud800"], "text_1": "\\ud800", "text_2": "\\ud800"}',
        b'{"query": "a", "query": "b", "documents": {"a": "b"}, "texts": "c", "text_1": {}, "__proto__": {}}',
        b"a" * 200_000,
    ],
    ids=range(14),
)
def test_hostile_bodies(client, route, content):
    response = client.post(route, content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    answer = response.json()
    assert set(answer) == {"id", "message", "error"}
    assert answer["error"]["code"] == response.status_code


def test_other_content_types_and_methods(client):
    body = b'{"query": "a", "documents": ["a"]}'
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "\u00fc",
    ):
        response = client.post("/v1/rerank", content=body, headers={"content-type": kind.encode("latin-1")})
        assert response.status_code in (200, 400, 422), kind
    assert client.get("/v1/search").status_code == 405
    assert client.get("/v1/search").json()["error"]["type"] == "method_not_allowed"
    assert client.request("DELETE", "/health").status_code == 405


def test_texts_with_odd_characters_are_only_texts(client):
    odd = ["\u0000", "\u202e right to left", "\U0001f600" * 50, "a" * 30_000, "\n\t\r ", "<script>", "\ufffe", "e\u0301"]
    answer = client.post("/v1/rerank", json={"query": "\u0000 \U0001f600", "documents": odd, "return_documents": True})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert {result["index"] for result in results} == set(range(8)) - {4}
    assert all(result["document"]["text"] == odd[result["index"]] for result in results)


def test_a_request_that_stops_in_the_middle_harms_nobody(url, client):
    host, port = httpx.URL(url).host, httpx.URL(url).port
    for sent in (
        b"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\nContent-Type: application/json\r\n\r\n{",
        b'POST /v1/rerank HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a"',
        b"GARBAGE\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(sent)
    assert client.get("/ready").status_code == 200
