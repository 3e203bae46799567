"""Keys: who comes in, revoked by a changed file; no open door without one. The guard around a small ASGI app."""

import asyncio
import os

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from axn_ray.errors import InputError
from serve_app.guard import Guard
from serve_app.keys import ApiKeys, check_bind, is_loopback


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# team a\nfirst-key\n\nsecond-key\n")
    return path


def test_any_of_the_keys_opens_by_either_header(key_file):
    keys = ApiKeys(key_file)
    assert keys.are_required
    assert keys.is_valid("Bearer first-key", None)
    assert keys.is_valid("bearer second-key", None)
    assert keys.is_valid(None, "second-key")
    for authorization, header in (
        (None, None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Bearer first", None),
        ("Basic first-key", None),
        ("Bearer # team a", None),
        (None, "second-key "),
        ("Bearer \udcff", None),
    ):
        assert not keys.is_valid(authorization, header), (authorization, header)


def test_a_changed_file_revokes_and_a_bad_one_changes_nothing(key_file, monkeypatch):
    monkeypatch.setattr("serve_app.keys.CHECK_S", 0.0)
    keys = ApiKeys(key_file)
    key_file.write_text("third-key\n")
    os.utime(key_file, (1, 1))
    assert keys.is_valid("Bearer third-key", None)
    assert not keys.is_valid("Bearer first-key", None)
    key_file.write_text("\n")
    os.utime(key_file, (2, 2))
    assert keys.is_valid("Bearer third-key", None)
    key_file.write_bytes("# schl\u00fcssel\nfourth-key\n".encode("latin-1"))
    os.utime(key_file, (3, 3))
    assert keys.is_valid("Bearer third-key", None)
    assert not keys.is_valid("Bearer fourth-key", None)
    key_file.unlink()
    assert keys.is_valid("Bearer third-key", None)


def test_a_byte_order_mark_is_no_part_of_the_first_key(key_file):
    key_file.write_bytes("first-key\nsecond-key\n".encode("utf-8-sig"))
    for key in ("first-key", "second-key"):
        assert ApiKeys(key_file).is_valid(f"Bearer {key}", None)


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("AXN_API_KEYS", "a-key, another")
    keys = ApiKeys(None)
    assert keys.is_valid("Bearer another", None)
    assert not keys.is_valid("Bearer a-key, another", None)
    monkeypatch.delenv("AXN_API_KEYS")
    assert ApiKeys(None).is_valid(None, None)


def test_no_open_door_without_a_key(key_file, tmp_path, monkeypatch):
    monkeypatch.delenv("AXN_API_KEYS", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        check_bind(host, ApiKeys(None))
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.4", "axn.example.org", ""):
        check_bind(host, ApiKeys(key_file))
        with pytest.raises(InputError, match="lets other machines in and there is no API key; set api_keys_file or AXN_API_KEYS"):
            check_bind(host, ApiKeys(None))
    with pytest.raises(InputError, match="cannot be read"):
        ApiKeys(tmp_path / "missing")
    (tmp_path / "latin").write_bytes(b"\xfc\n")
    with pytest.raises(InputError, match="is not UTF-8 .*; save it as UTF-8"):
        ApiKeys(tmp_path / "latin")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no key"):
        ApiKeys(tmp_path / "empty")


@pytest.fixture
def guarded(key_file):
    counted = []

    async def echo(request: Request):
        return PlainTextResponse(f"{request.state.request_id} {len(await request.body())}")

    routes = [Route("/health", echo), Route("/v1/search", echo, methods=["POST"])]
    app = Guard(Starlette(routes=routes), ApiKeys(key_file), 1000, lambda route, status: counted.append((route, status)))

    def send(method, path, **settings):
        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                return await client.request(method, path, **settings)

        return asyncio.run(ask())

    send.counted = counted
    return send


def test_the_guard_wants_a_key_everywhere_but_for_probes(guarded):
    assert guarded("GET", "/health").status_code == 200
    refused = guarded("POST", "/v1/search", content=b"x", headers={"x-request-id": "abc"})
    assert refused.status_code == 401
    assert refused.json()["id"] == "abc"
    assert refused.json()["error"] == {
        "message": "no valid API key; send `Authorization: Bearer KEY`", "type": "unauthorized", "param": None, "code": 401,
    }  # fmt: skip
    opened = guarded("POST", "/v1/search", content=b"xyz", headers={"Authorization": "Bearer first-key", "x-request-id": "abc"})
    assert opened.text == "abc 3"
    assert opened.headers["x-content-type-options"] == "nosniff"
    assert [status for _, status in guarded.counted] == [200, 401, 200]


def test_the_guard_refuses_large_bodies_declared_or_not(guarded):
    key = {"Authorization": "Bearer first-key"}

    async def chunks():
        for _ in range(20):
            yield b"x" * 100

    assert guarded("POST", "/v1/search", content=b"x" * 1000, headers=key).status_code == 200
    for content in (b"x" * 1001, chunks()):
        response = guarded("POST", "/v1/search", content=content, headers=key)
        assert response.status_code == 413
        assert "exceeds 1000 bytes" in response.json()["message"]


def test_a_request_id_that_is_no_id_is_replaced(guarded):
    for given in ("a b", "x" * 129, "<script>"):
        (name, _) = guarded("GET", "/health", headers={"x-request-id": given}).text.split(" ")
        assert name != given
        assert len(name) == 32
