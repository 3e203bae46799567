"""The client of a served index: searches and reranks over HTTP, typed replies, one exception for each kind of error.

Imports neither torch nor Ray. Each request is described once, as a `_Call`; `AxnClient` waits for it, `AsyncAxnClient`
awaits it.
"""

import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, Unpack

import httpx2
from pydantic import TypeAdapter, ValidationError

from axn_ray.errors import AxnError
from axn_ray.replies import Ranked, RoundReply, SearchOptions, SearchReply

T = TypeVar("T")


class HttpError(AxnError):
    """The server answered with an error, or not at all (`status` 0)."""

    def __init__(self, message: str, status: int, kind: str, request_id: str | None, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status, self.kind, self.request_id, self.retry_after_s = status, kind, request_id, retry_after_s


class UnreachableError(HttpError):
    """No server there, a connection that broke, or no answer in time."""


class InvalidRequestError(HttpError):
    """400, 413, 422: the request asks for nothing, for too much or for what there is not."""


class UnauthorizedError(HttpError):
    """401, 403: no key, or a wrong one."""


class NotFoundError(HttpError):
    """404: no such route, index or model."""


class ScorerFailedError(HttpError):
    """424: the cross-encoder failed."""


class OverloadedError(HttpError):
    """429: too many pairs wait; try again after `retry_after_s`."""


class DeadlineError(HttpError):
    """408, 504: nothing was scored before the deadline."""


class NotReadyError(HttpError):
    """503: index or model is being loaded."""


_ERRORS: Mapping[int, type[HttpError]] = {
    **dict.fromkeys((400, 413, 422), InvalidRequestError),
    **dict.fromkeys((401, 403), UnauthorizedError),
    404: NotFoundError,
    424: ScorerFailedError,
    429: OverloadedError,
    **dict.fromkeys((408, 504), DeadlineError),
    503: NotReadyError,
}


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request and how its reply is read."""

    path: str
    read: Callable[[Any], T]
    body: Mapping[str, Any] | None = None


def _search_body(query: str | Sequence[str], options: SearchOptions) -> dict[str, Any]:
    budget = {new: options[old] for old, new in (("budget", "ce_calls"), ("rounds", "rounds")) if old in options}  # type: ignore[literal-required]
    rest = {name: value for name, value in options.items() if name not in ("budget", "rounds")}
    return {"query": query if isinstance(query, str) else list(query), **({"budget": budget} if budget else {}), **rest}


def _search(query: str, options: SearchOptions) -> _Call[SearchReply]:
    return _Call("/v1/search", SearchReply.model_validate, _search_body(query, options))


def _search_many(queries: Sequence[str], options: SearchOptions) -> _Call[list[SearchReply | HttpError]]:
    def read(reply: Any) -> list[SearchReply | HttpError]:
        return [
            _error_of(one, one["error"]["code"]) if "error" in one else SearchReply.model_validate(one) for one in reply["data"]
        ]

    return _Call("/v1/search", read, _search_body(queries, options))


def _rerank(query: str, documents: Sequence[str]) -> _Call[list[Ranked]]:
    body = {"query": query, "texts": list(documents), "raw_scores": True}
    return _Call("/rerank", TypeAdapter(list[Ranked]).validate_python, body)


_INFO: _Call[dict[str, Any]] = _Call("/info", dict)
_READY: _Call[bool] = _Call("/ready", bool)


def _read_event(event: httpx2.ServerSentEvent) -> RoundReply | SearchReply:
    body: Any = event.json()
    if event.event == "error":
        raise _error_of(body, body["error"]["code"])
    return RoundReply.model_validate(body) if event.event == "round" else SearchReply.model_validate(body)


def _error_of(body: Any, status: int, retry_after: str | None = None) -> HttpError:
    """The exception for an error's body, whoever wrote it (a proxy may have)."""
    known = body if isinstance(body, dict) and isinstance(body.get("error"), dict) else {}
    message = known.get("message") or f"the server answered {status}: {str(body)[:200]}"
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    kind = known.get("error", {}).get("type", "http")
    return _ERRORS.get(status, HttpError)(message, status, kind, known.get("id"), seconds)


def _read(call: _Call[T], response: httpx2.Response) -> T:
    """The reply that a response holds.

    Raises:
        HttpError: it holds an error, or what is no reply.
    """
    try:
        body = response.json()
    except ValueError:
        body = response.text
    if not response.is_success:
        raise _error_of(body, response.status_code, response.headers.get("retry-after"))
    try:
        return call.read(body)
    except (ValidationError, LookupError, TypeError) as error:
        message = f"{response.url} answered what is no reply to {call.path} ({type(error).__name__}); is it an axn-ray server?"
        raise HttpError(message, response.status_code, "reply", None, None) from error


def _unreachable(url: str, error: httpx2.TransportError) -> UnreachableError:
    reason = str(error) or type(error).__name__
    return UnreachableError(f"{url} cannot be reached ({reason}); check the address and the server", 0, "unreachable", None, None)


def _settings(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout}


class AxnClient:
    """A served index at `url`; every method raises `HttpError`s. `timeout` is in seconds."""

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
        body = _search_body(query, options) | {"stream": True}
        try:
            with self._http.stream("POST", "/v1/search", json=body) as response:
                if not response.is_success:
                    response.read()
                    _read(_INFO, response)
                for event in httpx2.EventSource(response, max_event_size=None):
                    yield _read_event(event)
        except httpx2.TransportError as error:
            raise _unreachable(self.url, error) from error

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
        try:
            response = self._http.request("GET" if call.body is None else "POST", call.path, json=call.body)
        except httpx2.TransportError as error:
            raise _unreachable(self.url, error) from error
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
        body = _search_body(query, options) | {"stream": True}
        try:
            async with self._http.stream("POST", "/v1/search", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    _read(_INFO, response)
                async for event in httpx2.EventSource(response, max_event_size=None):
                    yield _read_event(event)
        except httpx2.TransportError as error:
            raise _unreachable(self.url, error) from error

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
        try:
            response = await self._http.request("GET" if call.body is None else "POST", call.path, json=call.body)
        except httpx2.TransportError as error:
            raise _unreachable(self.url, error) from error
        return _read(call, response)
