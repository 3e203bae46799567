"""Errors as HTTP: one body that both families of clients read. Knows no route."""

import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from serve_app.messages import STATUS, Refused
from serve_app.schemas import Budget, Problem, Reason, SearchRequest

logger = logging.getLogger("ray.serve")

NATIVE_FIELDS = [*SearchRequest.model_fields, *Budget.model_fields]
MAX_NAME, MAX_MESSAGE = 60, 1000  # characters


class HttpProblem(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self, status: int, kind: str, message: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        message = cut(message, MAX_MESSAGE)  # it may quote what the client sent
        super().__init__(message)
        self.status, self.kind, self.message, self.param, self.retry_after_s = status, kind, message, param, retry_after_s

    @classmethod
    def of(cls, refused: Refused) -> "HttpProblem":
        """The status that a refusal has over HTTP."""
        return cls(STATUS[refused.kind], refused.kind, refused.message, refused.param, refused.retry_after_s)

    def body(self, request_id: str) -> dict[str, Any]:
        """What the client reads."""
        reason = Reason(message=self.message, type=self.kind, param=self.param, code=self.status)
        return Problem(id=request_id, message=self.message, error=reason).model_dump()

    def response(self, request_id: str) -> Response:
        """The whole answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(request_id), self.status, headers)


def cut(text: str, limit: int) -> str:
    """A text without its middle where it is long: what is wrong stands at the front, the cure at the end."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def to_json(value: Any) -> bytes:
    """JSON in ASCII: whatever a client sent can be sent back."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(to_json(value), status, headers, media_type="application/json")


def check_query(query: str, max_chars: int, name: str = "query") -> None:
    """Refuse a query without text, or one that would hold up all others while it is tokenized.

    Raises:
        HttpProblem: it is empty, or longer than the limit.
    """
    if not query.strip():
        raise HttpProblem(400, "empty", "the query is empty; give some text", name)
    if len(query) > max_chars:
        said = f"a query of {len(query)} characters exceeds the limit of {max_chars}; shorten it"
        raise HttpProblem(422, "invalid", said, name)


def internal(request_id: str) -> HttpProblem:
    """500 for the exception that is being handled, which goes to the log."""
    logger.exception("request %s failed", request_id)
    return HttpProblem(500, "internal", "an error of ours; the log has it under this id")


def describe_invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> HttpProblem:
    """422 for a body that pydantic refuses: the deepest error in one sentence, with the nearest name for an unknown field."""
    # Of a union's branches, the one that went deepest is the one that was meant.
    first = max(errors, key=lambda error: len(_path(error, body)))
    path = [cut(str(part), MAX_NAME) for part in _path(first, body)]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], NATIVE_FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(NATIVE_FIELDS)}"
        return HttpProblem(422, "invalid", f"unknown field {name!r}; {hint}", name)
    if first["type"] == "json_invalid":
        return HttpProblem(400, "empty" if first["loc"][-1] == 0 else "invalid", "the body is not valid JSON; send JSON", None)
    said = first["msg"].removeprefix("Value error, ")
    return HttpProblem(422, "invalid", f"{name or 'the body'}: {said}", name or None)


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body the error is: pydantic's location without the branches of unions that it went through."""
    path: list[str | int] = []
    for part in error["loc"][1:]:
        is_field = isinstance(body, dict) and part in body
        if is_field or (isinstance(body, list) and isinstance(part, int)):
            path.append(part)
            body = body[part]
    return [*path, error["loc"][-1]] if error["type"] == "missing" and len(error["loc"]) > 1 else path
