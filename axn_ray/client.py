"""The client of a served index: searches and reranks over HTTP, typed replies, one exception for each kind of error.

Imports neither torch nor Ray. Each request is described once, as a `_Call`; `AxnClient` waits for it, `AsyncAxnClient`
awaits it.
"""

import json
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, Unpack

import httpx2
from pydantic import TypeAdapter

from axn_ray.errors import InputError
from axn_ray.http_errors import (
    DeadlineError,
    HttpError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    ScorerFailedError,
    UnauthorizedError,
    UnreachableError,
    error_of,
)
from axn_ray.replies import Ranked, RoundReply, SearchOptions, SearchReply

__all__ = [
    "AsyncAxnClient",
    "AxnClient",
    "DeadlineError",
    "HttpError",
    "InvalidRequestError",
    "NotFoundError",
    "NotReadyError",
    "OverloadedError",
    "ScorerFailedError",
    "UnauthorizedError",
    "UnreachableError",
]

T = TypeVar("T")


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request and how its reply is read."""

    path: str
    read: Callable[[Any], T]
    body: bytes | None = None


def _encode(body: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8.

    Raises:
        InvalidRequestError: a lone surrogate, a NaN, or no plain value.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request is no JSON ({error}); send Unicode and finite numbers", 0, "invalid") from error


def _search_body(query: str | Sequence[str], options: Mapping[str, Any]) -> bytes:
    budget = {new: options[old] for old, new in (("budget", "ce_calls"), ("rounds", "rounds")) if old in options}
    rest = {name: value for name, value in options.items() if name not in ("budget", "rounds")}
    asked = query if isinstance(query, str) else list(query)
    return _encode({"query": asked, **({"budget": budget} if budget else {}), **rest})


def _search(query: str, options: SearchOptions) -> _Call[SearchReply]:
    return _Call("/v1/search", SearchReply.model_validate, _search_body(query, options))


def _search_many(queries: Sequence[str], options: SearchOptions) -> _Call[list[SearchReply | HttpError]]:
    def read(reply: Any) -> list[SearchReply | HttpError]:
        return [
            error_of(one, one["error"]["code"]) if "error" in one else SearchReply.model_validate(one) for one in reply["data"]
        ]

    return _Call("/v1/search", read, _search_body(queries, options))


def _rerank(query: str, documents: Sequence[str]) -> _Call[list[Ranked]]:
    body = {"query": query, "texts": list(documents), "raw_scores": True}
    return _Call("/rerank", TypeAdapter(list[Ranked]).validate_python, _encode(body))


def _read_ready(reply: Any) -> bool:
    if reply["status"] != "ready":
        raise ValueError("no 503, and not ready")
    return True


_INFO: _Call[dict[str, Any]] = _Call("/info", TypeAdapter(dict[str, Any]).validate_python)
_READY: _Call[bool] = _Call("/ready", _read_ready)


def _no_reply(url: object, error: Exception, status: int = 0) -> HttpError:
    return HttpError(f"{url} answered what is no reply ({type(error).__name__}); is it an axn-ray server?", status, "reply")


@contextmanager
def _reading(response: httpx2.Response) -> Iterator[None]:
    """What is read here must be a reply; `HttpError` where it is none."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:  # ValueError: no JSON, or pydantic's
        raise _no_reply(response.url, error, response.status_code) from error


@contextmanager
def _speaking_to(url: str) -> Iterator[None]:
    """What fails between here and the server is an `HttpError`."""
    try:
        yield
    except (httpx2.DecodingError, httpx2.SSEError) as error:
        raise _no_reply(url, error) from error
    except httpx2.TransportError as error:
        told = "" if isinstance(error, httpx2.LocalProtocolError) else str(error)  # it quotes headers, and so the key
        message = f"{url} cannot be reached ({told or type(error).__name__}); check the address and the server"
        raise UnreachableError(message, 0, "unreachable") from error


def _check_status(response: httpx2.Response) -> None:
    """Raise the error that a response holds."""
    if response.is_success:
        return
    try:
        body = response.json()
    except ValueError:
        body = response.text
    raise error_of(body, response.status_code, response.headers.get("retry-after"))


def _read(call: _Call[T], response: httpx2.Response) -> T:
    _check_status(response)
    with _reading(response):
        return call.read(response.json())


def _read_event(event: httpx2.ServerSentEvent, response: httpx2.Response) -> RoundReply | SearchReply:
    with _reading(response):
        body: Any = event.json()
        if event.event == "error":
            raise error_of(body, body["error"]["code"])
        return RoundReply.model_validate(body) if event.event == "round" else SearchReply.model_validate(body)


def _check_whole(url: str, last: RoundReply | SearchReply | None) -> None:
    """Refuse a stream that ended before its reply."""
    if not isinstance(last, SearchReply):
        seen = f"after round {last.round} of {last.rounds}" if last else "before its first round"
        raise UnreachableError(f"{url} cut the stream {seen}; search again", 0, "unreachable")


def _settings(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    key = (api_key or "").strip()  # files end in a newline
    if not (key.isascii() and key.isprintable()):
        raise InputError("the API key holds what no header can carry; give it in printable ASCII")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout}


class AxnClient:
    """A served index at `url`; every method raises `HttpError`s. `timeout` is in seconds.

    Raises:
        InputError: a key that is not printable ASCII.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        self.url = url
        self._http = httpx2.Client(**_settings(url, api_key, timeout))
        weakref.finalize(self, self._http.close)  # frameworks drop what they hold without closing it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def search(self, query: str, **options: Unpack[SearchOptions]) -> SearchReply:
        """The items that the CE ranks highest."""
        return self._send(_search(query, options))

    def search_many(self, queries: Sequence[str], **options: Unpack[SearchOptions]) -> list[SearchReply | HttpError]:
        """Several queries side by side: the reply or the error of each, in their order."""
        return self._send(_search_many(queries, options))

    def stream(self, query: str, **options: Unpack[SearchOptions]) -> Iterator[RoundReply | SearchReply]:
        """The best ranking so far after every round, then the reply."""
        body, last = _search_body(query, {**options, "stream": True}), None
        with _speaking_to(self.url):
            with self._http.stream("POST", "/v1/search", content=body) as response:
                if not response.is_success:
                    response.read()
                _check_status(response)
                for event in httpx2.EventSource(response, max_event_size=None):
                    last = _read_event(event, response)
                    yield last
        _check_whole(self.url, last)

    def rerank(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """Documents by the CE's logit, best first; one that cannot be scored is left out."""
        return self._send(_rerank(query, documents))

    def info(self) -> dict[str, Any]:
        """The model, the index and the limits."""
        return self._send(_INFO)

    def ready(self) -> bool:
        """Whether index and model are loaded; otherwise `NotReadyError`."""
        return self._send(_READY)

    def _send(self, call: _Call[T]) -> T:
        with _speaking_to(self.url):
            response = self._http.request("GET" if call.body is None else "POST", call.path, content=call.body)
        return _read(call, response)


class AsyncAxnClient:
    """`AxnClient` for asyncio."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        self.url = url
        self._http = httpx2.AsyncClient(**_settings(url, api_key, timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End its connections."""
        await self._http.aclose()

    async def search(self, query: str, **options: Unpack[SearchOptions]) -> SearchReply:
        """See `AxnClient`."""
        return await self._send(_search(query, options))

    async def search_many(self, queries: Sequence[str], **options: Unpack[SearchOptions]) -> list[SearchReply | HttpError]:
        """See `AxnClient`."""
        return await self._send(_search_many(queries, options))

    async def stream(self, query: str, **options: Unpack[SearchOptions]) -> AsyncIterator[RoundReply | SearchReply]:
        """See `AxnClient`."""
        body, last = _search_body(query, {**options, "stream": True}), None
        with _speaking_to(self.url):
            async with self._http.stream("POST", "/v1/search", content=body) as response:
                if not response.is_success:
                    await response.aread()
                _check_status(response)
                async for event in httpx2.EventSource(response, max_event_size=None):
                    last = _read_event(event, response)
                    yield last
        _check_whole(self.url, last)

    async def rerank(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """See `AxnClient`."""
        return await self._send(_rerank(query, documents))

    async def info(self) -> dict[str, Any]:
        """See `AxnClient`."""
        return await self._send(_INFO)

    async def ready(self) -> bool:
        """See `AxnClient`."""
        return await self._send(_READY)

    async def _send(self, call: _Call[T]) -> T:
        with _speaking_to(self.url):
            response = await self._http.request("GET" if call.body is None else "POST", call.path, content=call.body)
        return _read(call, response)
