"""The routes: what comes in over HTTP, what goes out. All work is the ingress's and the deployments' behind it."""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import axn_ray
from serve_app import compat
from serve_app.guard import OPEN, Guard
from serve_app.messages import Refused, Round, SearchJob, SearchReply
from serve_app.problems import HttpProblem, check_query, describe_invalid, internal, json_response, to_json
from serve_app.schemas import (
    EitherRerank,
    Problem,
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
    SearchAnswer,
    SearchAnswers,
    SearchRequest,
    TeiRanked,
    TeiRequest,
)

if TYPE_CHECKING:
    from serve_app.ingress import IngressDeployment

logger = logging.getLogger("ray.serve")

PROBLEMS: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 401, 413, 422, 424, 429, 503, 504)}
EVENT_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def build_api(ingress: "IngressDeployment") -> FastAPI:
    """The ASGI app of one ingress replica."""
    api = FastAPI(title="axn-ray", version=axn_ray.__version__, docs_url=None, redoc_url=None)
    api.add_middleware(Guard, keys=ingress.keys, max_body_bytes=ingress.args.max_body_bytes, count=ingress.metrics.count_request)
    _add_problems(api)
    _add_search(api, ingress)
    _add_compat(api, ingress)
    _add_state(api, ingress)
    _add_keys(api)
    return api


def _add_keys(api: FastAPI) -> None:
    """Say in the schema how a key is sent; where the app has none, none is asked for."""
    schema = api.openapi()
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
    schema["components"]["securitySchemes"] = keys
    schema["security"] = [{"bearer": []}, {"key": []}, {}]
    for path in OPEN & schema["paths"].keys():
        schema["paths"][path]["get"]["security"] = []


def request_id(request: Request) -> str:
    """The id that the guard gave the request."""
    return str(request.state.request_id)


def content_policy(page: str) -> str:
    """What the page may do: run its own script and style, by their hashes, and talk to this server."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)

    allowed = f"style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _add_problems(api: FastAPI) -> None:
    @api.exception_handler(HttpProblem)
    async def refused(request: Request, problem: HttpProblem) -> Response:
        return problem.response(request_id(request))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return describe_invalid(error.errors(), error.body).response(request_id(request))

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        kinds = {404: "not_found", 405: "method_not_allowed", 400: "invalid"}
        problem = HttpProblem(error.status_code, kinds.get(error.status_code, "error"), str(error.detail))
        response = problem.response(request_id(request))
        response.headers.update(error.headers or {})
        return response


def _add_search(api: FastAPI, ingress: "IngressDeployment") -> None:
    answers: dict[int | str, dict[str, Any]] = {200: {"model": SearchAnswer | SearchAnswers, "content": EVENT_STREAM}, **PROBLEMS}

    @api.post("/v1/search", responses=answers)
    async def search(asked: SearchRequest, request: Request) -> Response:
        """Find the items that the cross-encoder ranks highest, under an exact budget of its calls."""
        name = request_id(request)
        if isinstance(asked.query, list):
            return json_response({"id": name, "data": await _search_all(ingress, asked, asked.query, request)})
        job = ingress.job_of(asked, asked.query, request.headers)
        if asked.stream:
            return await _stream(ingress, job, name)
        with ingress.admit(job.ce_calls):
            return json_response({"id": name, **await ingress.search(job)})


async def _search_all(
    ingress: "IngressDeployment", asked: SearchRequest, queries: list[str], request: Request
) -> list[dict[str, Any]]:
    """Several queries side by side; each has its own answer or its own error."""
    if asked.stream:
        raise HttpProblem(422, "invalid", "stream=true takes one query, not a list; send one request for each", "stream")
    if not queries:
        raise HttpProblem(400, "empty", "the list of queries is empty; give at least one", "query")
    if len(queries) > ingress.args.max_queries:
        limit = ingress.args.max_queries
        raise HttpProblem(422, "invalid", f"{len(queries)} queries exceed the limit of {limit}; send fewer", "query")

    names = [f"{request_id(request)}-{number}" for number in range(len(queries))]
    answers: dict[str, dict[str, Any]] = {}
    jobs: dict[str, SearchJob] = {}
    for name, query in zip(names, queries, strict=True):
        try:
            jobs[name] = ingress.job_of(asked, query, request.headers)
        except HttpProblem as problem:
            answers[name] = problem.body(name)
    if jobs:
        answers |= await _search_side_by_side(ingress, jobs, asked.budget.ce_calls)
    return [answers[name] for name in names]


async def _search_side_by_side(ingress: "IngressDeployment", jobs: dict[str, SearchJob], ce_calls: int) -> dict[str, Any]:
    """The answers by name: as many searches at a time as there is room for; those that wait have the less time left."""
    n_at_once = max(1, min(len(jobs), ingress.room(ce_calls)))
    started, turn = time.monotonic(), asyncio.Semaphore(n_at_once)

    async def one(name: str, job: SearchJob) -> dict[str, Any]:
        try:
            async with turn:
                waited = time.monotonic() - started
                return {"id": name, **await ingress.search(replace(job, timeout_s=job.timeout_s - waited))}
        except HttpProblem as problem:
            return problem.body(name)
        except Exception:
            return internal(name).body(name)

    with ingress.admit(n_at_once * ce_calls):
        return dict(zip(jobs, await asyncio.gather(*(one(*item) for item in jobs.items())), strict=True))


async def _stream(ingress: "IngressDeployment", job: SearchJob, name: str) -> Response:
    """Server-sent events. What fails before the first round has its own status; later, the stream ends with an error."""
    started = time.monotonic()
    messages = ingress.search_rounds(job)
    with ExitStack() as stack:
        stack.enter_context(ingress.admit(job.ce_calls))
        first = await anext(messages)
        if isinstance(first, Refused):
            raise HttpProblem.of(first)
        place = stack.pop_all()  # the stream holds it from here on

    async def events() -> AsyncIterator[bytes]:
        message: Round | SearchReply | Refused = first
        try:
            while isinstance(message, Round):
                yield _event("round", message.body)
                message = await anext(messages)
            yield _event("result", {"id": name, **ingress.finish(job, message, started)})
        except HttpProblem as problem:
            ingress.metrics.count_broken_stream(problem.status)
            yield _event("error", problem.body(name))
        except Exception:
            ingress.metrics.count_broken_stream(500)
            yield _event("error", internal(name).body(name))

    return _EventStream(events(), place)


class _EventStream(StreamingResponse):
    """Gives back the search's place when the stream ends, also where it never began."""

    def __init__(self, events: AsyncIterator[bytes], place: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


def _event(kind: str, body: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + to_json(body) + b"\n\n"


def _add_compat(api: FastAPI, ingress: "IngressDeployment") -> None:
    limit, max_chars, model = ingress.args.max_documents, ingress.args.max_query_chars, ingress.args.cross_encoder

    def note(asked: RerankRequest | TeiRequest | ScoreRequest, request: Request) -> None:
        if asked.ignored:
            logger.info("request %s: ignored the fields %s", request_id(request), ", ".join(asked.ignored)[:200])

    async def rerank(asked: RerankRequest, request: Request, route: str) -> tuple[list[str], Any]:
        note(asked, request)
        documents = compat.documents_of(asked)
        check_query(asked.query, max_chars)
        compat.check_documents(documents, limit)
        return documents, await ingress.score(route, [asked.query], documents, asked.max_tokens_per_doc)

    @api.post("/v1/rerank", responses={200: {"model": RerankAnswer}, **PROBLEMS})
    async def rerank_v1(asked: RerankRequest, request: Request) -> Response:
        """Rerank documents, as Jina and Cohere v1 do."""
        documents, scored = await rerank(asked, request, "/v1/rerank")
        return json_response(compat.rerank_v1(request_id(request), model, asked, documents, scored))

    @api.post("/v2/rerank", responses={200: {"model": RerankAnswer}, **PROBLEMS})
    async def rerank_v2(asked: RerankRequest, request: Request) -> Response:
        """Rerank documents, as Cohere v2 does."""
        documents, scored = await rerank(asked, request, "/v2/rerank")
        return json_response(compat.rerank_v2(request_id(request), asked, documents, scored))

    @api.post("/rerank", responses={200: {"model": list[TeiRanked] | RerankAnswer}, **PROBLEMS})
    async def rerank_either(asked: EitherRerank, request: Request) -> Response:
        """Rerank texts as Text Embeddings Inference does; with `documents` in place of `texts`, as Jina does."""
        if isinstance(asked, RerankRequest):
            return await rerank_v1(asked, request)
        note(asked, request)
        check_query(asked.query, max_chars)
        compat.check_documents(asked.texts, limit, "texts")
        scored = await ingress.score("/rerank", [asked.query], asked.texts)
        return json_response(compat.rerank_tei(asked, scored))

    @api.post("/v1/score", responses={200: {"model": ScoreAnswer}, **PROBLEMS})
    async def score(asked: ScoreRequest, request: Request) -> Response:
        """Score pairs of texts, as vLLM does."""
        note(asked, request)
        queries, documents = compat.pairs_of(asked)
        longest = max(queries, key=lambda query: (bool(query.strip()), len(query)))  # one that is empty fails alone
        check_query(longest, max_chars, "queries" if asked.text_1 is None else "text_1")
        compat.check_documents(documents, limit, "documents" if asked.text_2 is None else "text_2")
        scored = await ingress.score("/v1/score", queries, documents)
        return json_response(compat.score_vllm(request_id(request), model, int(time.time()), scored))


def _add_state(api: FastAPI, ingress: "IngressDeployment") -> None:
    page = files("serve_app").joinpath("ui/index.html").read_text()
    page_headers = {"Content-Security-Policy": content_policy(page), "Cache-Control": "no-cache"}

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Alive."""
        return {"status": "ok"}

    @api.get("/ready", responses={503: {"model": Problem}})
    async def ready() -> dict[str, str]:
        """Index and model are loaded."""
        await ingress.describe()
        return {"status": "ready"}

    @api.get("/info", responses=PROBLEMS)
    async def info() -> dict[str, Any]:
        """The model, the index and the limits."""
        args = ingress.args
        names = ("max_budget", "max_documents", "max_queries", "max_query_chars", "max_document_chars", "deadline_ms")
        limits = {name: getattr(args, name) for name in names}
        return {"version": axn_ray.__version__, **await ingress.describe(), "limits": limits}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model, as OpenAI's clients list them."""
        return {"object": "list", "data": [{"id": ingress.args.cross_encoder, "object": "model", "owned_by": "axn-ray"}]}

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """This replica's counts in Prometheus' text format; Ray's exporter has those of all of them."""
        return Response(ingress.metrics.exposition(), media_type="text/plain; version=0.0.4")
