"""Errors as HTTP: one body that both families of clients read. Knows no route."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from serve_app.messages import STATUS, Refused
from serve_app.schemas import Budget, Problem, Reason, SearchRequest

NATIVE_FIELDS = [*SearchRequest.model_fields, *Budget.model_fields]


class HttpProblem(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self, status: int, kind: str, message: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
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
        return json_response(self.body(request_id), self.status, headers)


def to_json(value: Any) -> bytes:
    """JSON in ASCII: whatever a client sent can be sent back."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(to_json(value), status, headers, media_type="application/json")


def describe_invalid(errors: Sequence[Mapping[str, Any]]) -> HttpProblem:
    """422 for a body that pydantic refuses: the first error in one sentence, with the nearest name for an unknown field."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(path) or "body"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], NATIVE_FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(NATIVE_FIELDS)}"
        return HttpProblem(422, "invalid", f"unknown field {name!r}; {hint}", name)
    if first["type"] == "json_invalid":
        return HttpProblem(400, "empty" if first["loc"][-1] == 0 else "invalid", "the body is not valid JSON; send JSON", None)
    return HttpProblem(422, "invalid", f"{name}: {first['msg']}", name)
