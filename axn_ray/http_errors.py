"""One exception for each kind of error that a server answers. Imports neither torch nor Ray; `axn_ray.client` raises them."""

from collections.abc import Mapping
from typing import Any

from axn_ray.errors import AxnError


class HttpError(AxnError):
    """The server answered with an error or with what is no reply, or not at all (`status` 0)."""

    def __init__(
        self, message: str, status: int, kind: str, request_id: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.request_id, self.retry_after_s = status, kind, request_id, retry_after_s


class UnreachableError(HttpError):
    """No server there, a connection that broke, or no answer in time."""


class InvalidRequestError(HttpError):
    """400, 413, 422: the request asks for nothing, for too much or for what there is not; it is no JSON (`status` 0)."""


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


def error_of(body: Any, status: int, retry_after: str | None = None) -> HttpError:
    """The exception for an error's body, whoever wrote it (a proxy may have)."""
    known = body if isinstance(body, dict) and isinstance(body.get("error"), dict) else {}
    message = known.get("message") or f"the server answered {status}: {str(body)[:200]}"
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    kind = known.get("error", {}).get("type", "http")
    return _ERRORS.get(status, HttpError)(message, status, kind, known.get("id"), seconds)
