"""The routes of other people's APIs, in their own shapes: what they send in, what they expect back. Knows no Ray.

Scores answer in 0..1 (sigmoid), as those APIs do, unless raw ones are asked for. A document that cannot be scored is not
among the results; the others are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from axn_ray.core.ranking import order_by_score
from serve_app.messages import Scored
from serve_app.problems import HttpProblem
from serve_app.schemas import RerankRequest, ScoreRequest, TeiRequest


def check_documents(documents: Sequence[str], max_documents: int, name: str = "documents") -> None:
    """Refuse a request that asks for nothing or for too much.

    Raises:
        HttpProblem: no documents, or more than the limit.
    """
    if not documents:
        raise HttpProblem(400, "empty", f"there are no {name}; give at least one", name)
    if len(documents) > max_documents:
        raise HttpProblem(422, "invalid", f"{len(documents)} {name} exceed the limit of {max_documents}; send fewer", name)


def documents_of(asked: RerankRequest) -> list[str]:
    """The texts of a rerank request, from strings or objects."""
    return [document if isinstance(document, str) else document.text for document in asked.documents]


def pairs_of(asked: ScoreRequest) -> tuple[list[str], list[str]]:
    """Queries and documents of a score request: one query for all documents, or as many.

    Raises:
        HttpProblem: neither form is whole, or their numbers do not fit.
    """
    sides = [asked.queries if asked.text_1 is None else asked.text_1, asked.documents if asked.text_2 is None else asked.text_2]
    for side, name in zip(sides, ("text_1", "text_2"), strict=True):
        if side is None:
            raise HttpProblem(422, "invalid", f"{name} is missing; give text_1 and text_2, or queries and documents", name)
        if not side:
            raise HttpProblem(400, "empty", f"{name} is empty; give some text", name)
    queries, documents = ([side] if isinstance(side, str) else list(side or []) for side in sides)
    if len(queries) not in (1, len(documents)):
        numbers = f"{len(queries)} and {len(documents)} texts"
        raise HttpProblem(422, "invalid", f"{numbers} do not pair up; give one, or as many", "text_1")
    return queries, documents


def rank(scored: Scored) -> list[int]:
    """Indices of the documents that have a score, best first, ties by index."""
    index = np.arange(len(scored.scores), dtype=np.int32)
    good = index[~np.isnan(scored.scores)]
    return [int(good[place]) for place in order_by_score(good, scored.scores[good])]


def probability(logit: float) -> float:
    """Sigmoid, exact far from 0, too."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _failures(scored: Scored) -> dict[str, Any]:
    failed = [{"index": row, "message": reason} for row, reason in sorted(scored.failures.items())]
    return {"failures": failed} if failed else {}


def rerank_results(asked: RerankRequest, documents: Sequence[str], scored: Scored) -> list[dict[str, Any]]:
    """`index` and `relevance_score`, best first; `document` where it was asked for, never null."""
    best = rank(scored)[: asked.top_n if asked.top_n and asked.top_n > 0 else None]
    rows: list[dict[str, Any]] = [{"index": row, "relevance_score": probability(float(scored.scores[row]))} for row in best]
    if asked.return_documents:
        rows = [{**row, "document": {"text": documents[row["index"]]}} for row in rows]
    return rows


def rerank_v1(request_id: str, model: str, asked: RerankRequest, documents: Sequence[str], scored: Scored) -> dict[str, Any]:
    """What clients of Jina and of Cohere v1 read."""
    results = rerank_results(asked, documents, scored)
    meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    usage = {"total_tokens": scored.tokens, "prompt_tokens": scored.tokens}
    return {"id": request_id, "model": model, "results": results, "usage": usage, "meta": meta, **_failures(scored)}


def rerank_v2(request_id: str, asked: RerankRequest, documents: Sequence[str], scored: Scored) -> dict[str, Any]:
    """What clients of Cohere v2 read."""
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}, "tokens": {"input_tokens": scored.tokens}}
    return {"id": request_id, "results": rerank_results(asked, documents, scored), "meta": meta, **_failures(scored)}


def rerank_tei(asked: TeiRequest, scored: Scored) -> list[dict[str, Any]]:
    """What clients of Text Embeddings Inference read: a bare sorted list."""
    rows = []
    for row in rank(scored):
        score = float(scored.scores[row])
        text = {"text": asked.texts[row]} if asked.return_text else {}
        rows.append({"index": row, "score": score if asked.raw_scores else probability(score), **text})
    return rows


def score_vllm(request_id: str, model: str, created: int, scored: Scored) -> dict[str, Any]:
    """What clients of vLLM's score API read: one entry a pair, in the order asked; null where a pair failed."""
    reasons: Mapping[int, str] = scored.failures
    data = [
        {"index": row, "object": "score", "score": None if row in reasons else probability(float(score))}
        for row, score in enumerate(scored.scores)
    ]
    usage = {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens}
    listed = {"id": request_id, "object": "list", "created": created, "model": model, "data": data, "usage": usage}
    return {**listed, **_failures(scored)}
