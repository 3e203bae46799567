"""What every request passes on its way in and out: its id, its key, its size, its line in the log, safe headers.

Knows no route's meaning.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.keys import ApiKeys
from serve_app.problems import HttpProblem, internal

logger = logging.getLogger("ray.serve")

OPEN = {"/", "/health", "/ready"}  # what a probe, or a person without a key, may see
REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Guard:
    """ASGI middleware around the whole app; `count` hears route and status of every answer."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_body_bytes: int, count: Callable[[str, int], None]) -> None:
        self._app, self._keys, self._max_body_bytes, self._count = app, keys, max_body_bytes, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status: int | None = None  # until an answer starts

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *SAFE]
            await send(message)

        try:
            body = await self._admit(scope, headers, receive)
            await self._app(scope, _replay(body, receive), watch)
        except ClientDisconnect:
            pass  # nobody is left to read an answer
        except HttpProblem as problem:
            await problem.response(request_id)(scope, receive, watch)
        except Exception:
            if status is not None:  # an answer that has begun can only break off
                raise
            await internal(request_id).response(request_id)(scope, receive, watch)
        finally:
            status = status or 499
            route = _route_of(scope)
            self._count(route, status)
            facts = {
                "axn_route": route,  # Serve puts its own `route` into every record
                "status": status,
                "milliseconds": round((time.monotonic() - started) * 1000, 1),
                "axn_request_id": request_id,
            }
            logger.info("%s %s %d", scope["method"], route, status, extra=facts)

    async def _admit(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
        """The body of a request that may come in.

        Raises:
            HttpProblem: no valid key, or a body that is too large.
            ClientDisconnect: the client left before its body was whole.
        """
        if _path_of(scope) not in OPEN and not self._keys.is_valid(headers.get("authorization"), headers.get("x-api-key")):
            raise HttpProblem(401, "unauthorized", "no valid API key; send `Authorization: Bearer KEY`")
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        parts, size, more = [], 0, scope["method"] not in ("GET", "HEAD")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> HttpProblem:
        return HttpProblem(413, "too_large", f"the body exceeds {self._max_body_bytes} bytes; send fewer or shorter texts")


def _route_of(scope: Scope) -> str:
    """The route that answered, or would have, had the request come in; `unknown` where the app has none."""
    if "route" in scope:
        return str(scope["route"].path)
    path = _path_of(scope)
    routes = getattr(scope.get("app"), "routes", ())
    return path if any(path == getattr(route, "path", None) for route in routes) else "unknown"


def _path_of(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then whatever comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
