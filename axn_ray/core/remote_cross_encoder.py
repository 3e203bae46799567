"""A cross-encoder behind HTTP: bounded requests in flight, retries with backoff, a bad pair fails alone.

Knows no corpus and no Ray. What a kind of server is asked and answers stands in `remote_apis`.
"""

import random
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import numpy as np
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.pair_layout import Rows
from axn_ray.core.pairs import FloatArray, PairScorer, PairScores, find_empty_texts, find_not_finite, score_or_split
from axn_ray.core.remote_apis import APIS, Address
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ModelError

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask for
MAX_FAILURES = 16  # requests in a row that end in 5xx, a timeout or a lost connection
BUSY, BROKEN, MISPLACED = (429, 503), (408, 425, 500, 502, 504), (401, 403, 404, 405)
_PROBE = ("which of them is it?", ["it is this one"])


class _Answered(Exception):  # noqa: N818 - an answer, and not always an error
    """The server answered with a status that is no score."""

    def __init__(self, response: httpx2.Response) -> None:
        text = " ".join(response.text.split())[:200]
        super().__init__(f"HTTP {response.status_code}: {text}")
        self.status = response.status_code
        self.retry_after = _seconds(response.headers.get("retry-after"))


class _TryAgain(_Answered):
    """A status after which the same request may succeed."""


class RemoteCrossEncoder(PairScorer):
    """A CE behind `config.cross_encoder`, an `Address`; at most `in_flight` requests at once.

    Its fingerprint is what the server says of its model when it is opened, not where it is. `n_truncated` is always 0:
    servers do not say what they cut.

    Raises:
        ModelError: a wrong address or setting, a server that cannot be reached or does not give raw scores.
    """

    def __init__(self, config: CrossEncoderConfig) -> None:
        self._address = Address.of(config.cross_encoder)
        self._api, self._request_items = APIS[self._address.kind], config.request_items
        _refuse_local_settings(config)
        key = config.api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        limits = httpx2.Limits(max_connections=config.in_flight)
        self._client = httpx2.Client(headers=headers, timeout=config.timeout, limits=limits)
        self._pool = ThreadPoolExecutor(config.in_flight, "remote-cross-encoder")
        weakref.finalize(self, self._client.close)
        weakref.finalize(self, self._pool.shutdown, wait=False)
        self._failures_in_a_row, self._lock = 0, threading.Lock()
        self._fields = self._api.raw | (self._api.truncate if config.overlong == "truncate" else {})
        if self._address.model:
            self._fields["model"] = self._address.model
        self.fingerprint = {
            "api": self._address.kind,
            "model": self._address.model,
            "served": self._describe(),
            "scores": "logits" if self._api.raw else "logits of probabilities",
            "overlong": config.overlong,
        }
        self._check_scores()

    def tokenize(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The texts themselves: the server tokenizes."""
        return tuple(texts)

    def score_pairs(self, queries: Any, items: Any, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """See `PairScorer`. A request holds one query and up to `request_items` items.

        Raises:
            ModelError: the server is away, refuses the key or the model, or fails again and again.
        """
        scores = np.full(len(query_index), np.nan, dtype=np.float32)
        failures = find_empty_texts([(queries[q], items[i]) for q, i in zip(query_index, item_index, strict=True)])

        def score_rows(rows: Rows) -> FloatArray:
            return self._ask(queries[query_index[rows[0]]], [items[item_index[row]] for row in rows])

        rows = np.array([row for row in range(len(scores)) if row not in failures], dtype=np.int64)
        jobs = [
            self._pool.submit(score_or_split, score_rows, part, scores, failures)
            for part in _requests(rows, query_index, self._request_items)
        ]
        try:
            for job in jobs:
                job.result()
        finally:  # the first error ends what has not begun
            for job in jobs:
                job.cancel()
        return PairScores(scores, {**failures, **find_not_finite(scores, failures)})

    def _ask(self, query: str, items: Sequence[str]) -> FloatArray:
        reply = self._post(self._api.body(query, items) | self._fields)
        try:
            return self._api.read(reply, len(items))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the server's answer is not {self._address.kind}'s ({type(error).__name__}: {error})") from error

    def _post(self, body: dict[str, Any]) -> Any:
        retrying = Retrying(
            retry=retry_if_exception_type((httpx2.TransportError, _TryAgain)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=_wait,
            reraise=True,
        )
        try:
            reply = retrying(self._request, "POST", self._api.path, body)
        except (httpx2.TransportError, _Answered) as error:
            self._give_up_if_hopeless(error)
            raise
        with self._lock:
            self._failures_in_a_row = 0
        return reply

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self._client.request(method, self._address.url + path, json=body)
        if response.status_code in BUSY + BROKEN:
            raise _TryAgain(response)
        if not response.is_success:
            raise _Answered(response)
        return response.json()

    def _give_up_if_hopeless(self, error: Exception) -> None:
        """Let an error be one batch's fault, unless it is the server's."""
        status = getattr(error, "status", None)
        if status in MISPLACED:
            raise ModelError(f"{self._address.url} refused ({error}); check the address, the model's name and api_key") from error
        if status in BUSY or isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            raise ModelError(f"{self._address.url} is away or busy ({error}) after {ATTEMPTS} attempts; try later") from error
        if status is None or status in BROKEN:
            with self._lock:
                self._failures_in_a_row += 1
                hopeless = self._failures_in_a_row >= MAX_FAILURES
            if hopeless:
                raise ModelError(
                    f"{self._address.url} failed {MAX_FAILURES} requests in a row (last: {error}); mend it"
                ) from error

    def _describe(self) -> dict[str, Any]:
        """What the server says of its model, as far as scores depend on it."""
        if self._api.info_path is None:
            served = {}
        else:
            try:
                served = self._api.describe(self._request("GET", self._api.info_path))
            except (httpx2.TransportError, _Answered, ValueError, LookupError, TypeError) as error:
                raise ModelError(f"{self._address.url} does not say what it serves ({error}); check the address") from error
        if not served and not self._address.model:
            kind = self._address.kind
            raise ModelError(f"{self._address.url} does not name its model; name it: {self._address.url}#{kind}:model")
        return served

    def _check_scores(self) -> None:
        """Score a probe; where logits were asked for, see that the server does not squash them all the same."""
        query, items = _PROBE
        try:
            raw = float(self._ask(query, items)[0])
            if not self._api.raw or not 0 <= raw <= 1:
                return
            unasked = {name: value for name, value in self._fields.items() if name not in self._api.raw}
            plain = float(self._api.read(self._post(self._api.body(query, items) | unasked), 1)[0])
        except (httpx2.TransportError, _Answered, ValueError) as error:
            raise ModelError(f"{self._address.url} cannot score a pair ({error}); check the address and the kind") from error
        if raw == plain:
            raise ModelError(
                f"{self._address.url} answers {raw:g} whether or not {', '.join(self._api.raw)} asks for logits, so it squashes "
                "them; update the server, or use its #cohere or #jina route, whose probabilities are turned into logits"
            )


def _refuse_local_settings(config: CrossEncoderConfig) -> None:
    for name in ("max_length", "label"):
        if getattr(config, name) is not None:
            raise ModelError(f"{name}={getattr(config, name)} is for models that run here; set it on the server")
    if config.overlong == "chunk-max":
        raise ModelError("overlong=chunk-max is for models that run here; a server takes truncate or error")


def _requests(rows: Rows, query_index: Int32Array, n: int) -> list[Rows]:
    """Rows of one query each, at most n."""
    if not len(rows):
        return []
    ordered = rows[np.argsort(query_index[rows], kind="stable")]
    of_query = np.split(ordered, np.flatnonzero(np.diff(query_index[ordered])) + 1)
    return [part[start : start + n] for part in of_query for start in range(0, len(part), n)]


def _wait(state: RetryCallState) -> float:
    """Seconds before the next attempt: what the server asks for, or twice as long each time; some more by chance.

    Raises:
        ModelError: the server asks for too long.
    """
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error, "retry_after", None)
    if asked is not None and asked > LONGEST_RETRY_AFTER:
        raise ModelError(f"the server asks to wait {asked:,.0f} s ({error}); run again then")
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (state.attempt_number - 1)) if asked is None else asked
    return wait + random.uniform(0, FIRST_WAIT)


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, in seconds or as a date, in seconds; None where there is none that can be read."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
