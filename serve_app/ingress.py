"""The deployment that speaks HTTP: admits requests, hands them on, and counts. The routes themselves stand in `api`."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve

from axn_ray.errors import InputError
from serve_app.api import build_api
from serve_app.calls import ATTEMPTS, FAILED, GONE, call
from serve_app.config import AppArgs
from serve_app.keys import ApiKeys, check_bind
from serve_app.messages import Refused, Round, Scored, SearchJob, SearchReply
from serve_app.metrics import Metrics
from serve_app.problems import HttpProblem, check_query
from serve_app.schemas import SearchRequest
from serve_app.tracing import set_up_tracing, span

Message = Round | SearchReply | Refused
GRACE_S = 5.0  # a retriever answers by the deadline itself; this is for one that does not
MOST_WAIT_S = 60.0  # that a client is told to wait
DESCRIBED_S = 1.0  # how long index and model are taken to be there


@serve.ingress()
class IngressDeployment:
    """The app's front: its limits, its keys, its metrics.

    Raises:
        InputError: the app would be open to other machines without a key.
    """

    def __init__(self, args: AppArgs, retriever: Any, cross_encoder: Any) -> None:
        set_up_tracing("Ingress")
        self.args, self.metrics = args, Metrics()
        self.keys = ApiKeys(args.api_keys_file)
        check_bind(_listening_host(), self.keys)
        self._retriever, self._cross_encoder = retriever, cross_encoder
        self._pending_pairs = 0
        self._pairs_per_second = 0.0  # of the cross-encoder replica heard last
        self._described: dict[str, Any] = {}
        self._described_at = -math.inf

    def __serve_build_asgi_app__(self) -> FastAPI:  # noqa: PLW3201 - Serve's name
        """Called by Serve when the replica starts."""
        return build_api(self)

    def job_of(self, asked: SearchRequest, query: str, carrier: Mapping[str, str]) -> SearchJob:
        """One query of a request as a job; `carrier` are the request's headers, of which the trace's are kept.

        Raises:
            HttpProblem: an empty query, or one or a budget beyond its limit.
        """
        check_query(query, self.args.max_query_chars)
        budget, limit = asked.budget, self.args.max_budget
        if budget.ce_calls > limit:
            said = f"budget.ce_calls={budget.ce_calls} exceeds the limit of {limit}; lower it"
            raise HttpProblem(422, "invalid", said, "budget.ce_calls")
        deadline_ms = min(asked.deadline_ms or self.args.deadline_ms, self.args.deadline_ms)
        return SearchJob(
            query=query,
            top_k=asked.top_k,
            ce_calls=budget.ce_calls,
            rounds=1 if asked.method == "rnr" else budget.rounds,
            timeout_s=deadline_ms / 1000,
            method=asked.method,
            return_all=asked.return_scores == "all",
            trace=asked.trace,
            fail_open=asked.fail_open,
            carrier={name: carrier[name] for name in ("traceparent", "tracestate") if name in carrier},
            filter={name: [wanted] if isinstance(wanted, str) else wanted for name, wanted in asked.filter.items()},
        )

    def room(self, pairs: int) -> int:
        """How many requests of so many pairs could come in side by side now."""
        return (self.args.max_queued_pairs - self._pending_pairs) // pairs

    @contextmanager
    def admit(self, pairs: int) -> Iterator[None]:
        """Hold a place for a request's pairs while it is answered; one that finds the house empty always gets in.

        Raises:
            HttpProblem: 429, more pairs are promised than may wait.
        """
        if self._pending_pairs and self._pending_pairs + pairs > self.args.max_queued_pairs:
            wait_s = min(MOST_WAIT_S, max(1.0, self._pending_pairs / (self._pairs_per_second or math.inf)))
            promised = f"{self._pending_pairs} pairs are promised to requests under way"
            raise HttpProblem(429, "overloaded", f"{promised}, no room for {pairs} more; try again later", None, wait_s)
        self._pending_pairs += pairs
        try:
            yield
        finally:
            self._pending_pairs -= pairs

    async def search(self, job: SearchJob) -> dict[str, Any]:
        """Search once; a retriever that dies under it is replaced by another.

        Raises:
            HttpProblem: see `STATUS`.
        """
        started = time.monotonic()
        try:
            with span("search", job.carrier, method=job.method, ce_calls=job.ce_calls) as carrier:
                traced = replace(job, carrier=carrier)
                answer = await call(
                    lambda left: self._retriever.search.remote(_with_time(traced, left - GRACE_S)), job.timeout_s + GRACE_S
                )
        except TimeoutError:
            raise _late() from None
        except GONE as error:
            raise _no_retriever(error) from error
        return self.finish(job, answer, started)

    def finish(self, job: SearchJob, answer: SearchReply | Refused, started: float) -> dict[str, Any]:
        """Count a search and give its body.

        Raises:
            HttpProblem: it was refused.
        """
        if isinstance(answer, Refused):
            self.metrics.count_scored("/v1/search", answer.ce_calls, answer.tokens)
            raise HttpProblem.of(answer)
        self._pairs_per_second = answer.pairs_per_second or self._pairs_per_second
        seconds = time.monotonic() - started
        body = {**answer.body, "timing_ms": {"total": round(seconds * 1000, 2), **answer.body["timing_ms"]}}
        usage = body["usage"]
        self.metrics.count_scored("/v1/search", usage["ce_calls"], usage["tokens"], answer.queued_pairs)
        self.metrics.count_search(job.method, seconds, body, answer.recall_proxy)
        return body

    async def search_rounds(self, job: SearchJob) -> AsyncGenerator[Message, None]:
        """Search and give every round. A search that loses its retriever starts anew; rounds given are not given again.

        Raises:
            HttpProblem: 503, several retrievers died one after the other; 504, the deadline struck meanwhile.
        """
        with span("search", job.carrier, method=job.method, ce_calls=job.ce_calls) as carrier:
            traced, given, deadline = replace(job, carrier=carrier), 0, time.monotonic() + job.timeout_s
            for attempt in range(1, ATTEMPTS + 1):
                left = _with_time(traced, deadline - time.monotonic())
                messages = self._retriever.options(stream=True).search_rounds.remote(left)
                try:
                    async for message in _until(deadline + GRACE_S, messages):
                        if isinstance(message, Round) and message.body["round"] <= given:
                            continue
                        given += isinstance(message, Round)
                        yield message
                    return
                except GONE as error:
                    if attempt == ATTEMPTS:
                        raise _no_retriever(error) from error
                    await asyncio.sleep(0.1 * attempt)
                except TimeoutError:
                    messages.cancel()
                    raise _late() from None
                except (asyncio.CancelledError, GeneratorExit):
                    messages.cancel()
                    raise

    async def score(self, route: str, queries: list[str], documents: list[str], max_tokens: int | None = None) -> Scored:
        """Score pairs of texts for one of the other APIs' routes.

        Raises:
            HttpProblem: see `STATUS`; 424 where no pair could be scored.
        """
        timeout_s = self.args.deadline_ms / 1000
        score_texts = self._cross_encoder.score_texts
        with self.admit(len(documents)):
            try:
                scored: Scored | Refused = await call(
                    lambda left: score_texts.remote(queries, documents, max_tokens, left), timeout_s
                )
            except TimeoutError:
                raise HttpProblem(504, "deadline", "the cross-encoder did not answer in time; send fewer documents") from None
            except FAILED as error:
                reason = f"the cross-encoder does not answer ({type(error).__name__}); see its logs"
                raise HttpProblem(424, "scorer_failed", reason) from error
        if isinstance(scored, Refused):
            raise HttpProblem.of(scored)
        if len(scored.failures) == len(documents):
            raise HttpProblem(424, "scorer_failed", f"no document could be scored ({scored.failures[0]}); check their texts")
        self._pairs_per_second = scored.pairs_per_second or self._pairs_per_second
        self.metrics.count_scored(route, len(documents), scored.tokens, scored.queued_pairs)
        return scored

    async def describe(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Index and model, as heard within the last second.

        Raises:
            HttpProblem: 503, they are not ready, or not any more.
        """
        if time.monotonic() - self._described_at > DESCRIBED_S:
            try:
                index = await call(lambda left: self._retriever.describe.remote(), timeout_s)
                model = await call(lambda left: self._cross_encoder.describe.remote(), timeout_s)
            except (TimeoutError, *FAILED) as error:
                raise HttpProblem(503, "not_ready", "index or model is not loaded; try again", None, 5.0) from error
            self._described, self._described_at = {"index": index, "model": model}, time.monotonic()
        return self._described


async def _until(deadline: float, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """The messages as they come; none of a retriever that is still silent at the deadline.

    Raises:
        TimeoutError: it was.
    """
    coming = aiter(messages)
    while True:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await anext(coming)
        except StopAsyncIteration:
            return
        yield message


def _with_time(job: SearchJob, left_s: float) -> SearchJob:
    """The job for another try, with what is left of its time.

    Raises:
        HttpProblem: 504, nothing is left.
    """
    if left_s <= 0:
        raise HttpProblem(504, "deadline", "no result by the deadline; raise deadline_ms or try again")
    return replace(job, timeout_s=left_s)


def _late() -> HttpProblem:
    return HttpProblem(504, "deadline", "the retriever did not answer by the deadline; try again")


def _no_retriever(error: Exception) -> HttpProblem:
    return HttpProblem(503, "not_ready", f"no retriever answers ({type(error).__name__}); try again", None, 1.0)


def _listening_host() -> str:
    """Where Serve's proxies listen; the app must not open a door that its keys do not guard."""
    from ray.serve.context import _get_global_client  # Serve has no public way to ask

    client = _get_global_client()
    if client is None:
        raise InputError("the app runs without Serve; start it with `axn serve` or `serve deploy`")
    host = client.http_config.host  # an empty one is every address
    return "127.0.0.1" if host is None else str(host)
