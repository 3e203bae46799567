"""The ingress over deployments that are plain coroutines: everything before and behind HTTP in one process, without Ray."""

import asyncio
from types import SimpleNamespace
from unittest.mock import patch

import httpx
import numpy as np

from serve_app.api import build_api
from serve_app.config import AppArgs
from serve_app.ingress import IngressDeployment
from serve_app.messages import Round, Scored, SearchReply
from tests.serve_app.conftest import KNOWN


def reply(n_results=1, ce_calls=20, rounds=1):
    """The end of a search that found `n_results` items."""
    hits = [{"id": f"i{n}", "score": 9.0 - n, "exact": True, "round": rounds, "text": f"text {n}"} for n in range(n_results)]
    usage = {"ce_calls": ce_calls, "cache_hits": 0, "truncated": 0, "tokens": 3}
    degraded = {"deadline": False, "scorer_error": False, "rounds_done": rounds}
    body = {"results": hits, "score_type": "logit", "usage": usage, "degraded": degraded, "index_version": "v", "timing_ms": {}}
    return SearchReply(body)


def a_round(number, rounds, n_results=0):
    """What a stream shows after a round."""
    results = reply(n_results, rounds=number).body["results"]
    return Round({"round": number, "rounds": rounds, "ce_calls": 20 * number, "results": results})


class _Called:
    """What `remote` returns: awaited or iterated over, and cancelled."""

    def __init__(self, answer):
        self._answer = answer if hasattr(answer, "__aiter__") else asyncio.ensure_future(answer)

    def __await__(self):
        return self._answer.__await__()

    def __aiter__(self):
        return self._answer

    def cancel(self):
        if isinstance(self._answer, asyncio.Future):
            self._answer.cancel()


class Deployment:
    """A handle: `method.remote(...)` calls the coroutine, or the asynchronous generator, of that name."""

    def __init__(self, **methods):
        for name, method in methods.items():
            setattr(self, name, SimpleNamespace(remote=lambda *given, method=method: _Called(method(*given))))

    def options(self, stream):
        return self


async def search(job):
    return reply(ce_calls=job.ce_calls)


async def score_texts(queries, documents, max_tokens, left):
    return Scored(np.arange(len(documents), dtype=np.float32), {}, 0, 3, 0)


async def describe():
    return {"version": "v", "items": 60, "name": KNOWN, "examples": ["one", "two"], "columns": []}


def open_house(keys_file=None, score_texts=score_texts, describe=describe, **methods):
    """An ingress; `methods` are the retriever's, or limits of the app."""
    limits = {name: methods.pop(name) for name in list(methods) if name in AppArgs.model_fields}
    retriever = Deployment(**{"search": search, "describe": describe, **methods})
    cross_encoder = Deployment(score_texts=score_texts, describe=describe)
    args = AppArgs(cross_encoder=KNOWN, api_keys_file=keys_file, **limits)
    (_, plain, *_) = IngressDeployment.__mro__  # the class itself, without what Serve wraps it into
    with patch("serve_app.ingress._listening_host", return_value="127.0.0.1"):
        return plain(args, retriever, cross_encoder)


def visit(house, ask, root_path=""):
    """`await ask(client)` of a client of that ingress."""

    async def opened():
        transport = httpx.ASGITransport(build_api(house), raise_app_exceptions=False, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://house", timeout=60) as client:
            return await ask(client)

    return asyncio.run(opened())


def counted(house, route="/v1/search"):
    """How many requests of a route were answered with which status."""
    samples = [sample for family in house.metrics.registry.collect() for sample in family.samples]
    found = [sample for sample in samples if sample.name == "axn_requests_total" and sample.labels["route"] == route]
    return {int(sample.labels["status"]): sample.value for sample in found}
