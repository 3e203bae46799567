"""The deployment that searches: index, dual-encoder and estimator; the cross-encoder is a call away.

Each round is one call that names items by their index. Concurrent searches share the products over the index.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from axn_ray.core.adaptive import Search, search
from axn_ray.core.dual_encoder import open_dual_encoder
from axn_ray.core.index import ItemIndex, Retrieve, Retrieved
from axn_ray.core.methods import METHODS
from axn_ray.core.pairs import FloatArray
from axn_ray.core.search_space import build_estimator
from axn_ray.core.tokens import Int32Array
from serve_app.calls import FAILED, call
from serve_app.config import AppArgs
from serve_app.index_folder import Index, example_queries, open_index
from serve_app.merging import Merged
from serve_app.messages import Refused, Round, Scored, SearchJob, SearchReply
from serve_app.search_run import Nearest, SearchRun
from serve_app.tracing import set_up_tracing

MERGED = 64  # queries in one product
Placed = tuple[FloatArray, FloatArray, FloatArray | None]  # by the dual-encoder, by the fit, and what is added to products
REPLACED_S = 0.25  # between tries while the two deployments hold different indexes


class RetrieverDeployment:
    """Adaptive search and retrieve-and-rerank over one index.

    Raises:
        ArtifactError: see `open_index` and `open_dual_encoder`.
        ModelError: the dual-encoder cannot be loaded.
    """

    def __init__(self, args: AppArgs, cross_encoder: Any) -> None:
        set_up_tracing("Retriever")
        self._index = open_index(args)
        self._described = _describe(self._index)
        self._cross_encoder = cross_encoder
        self._dual_encoder = open_dual_encoder(self._index.corpus)
        self._place: Merged[str, Placed] = Merged(self._place_queries, MERGED)
        fitted, corpus = self._index.factorization, self._index.corpus
        self._retrieve: Merged[Retrieve, Retrieved] = Merged(ItemIndex(fitted.item_embeddings).retrieve, MERGED)
        self._retrieve_de: Merged[Retrieve, Retrieved] = Merged(ItemIndex(corpus.item_embeddings).retrieve, MERGED)

    async def search(self, job: SearchJob) -> SearchReply | Refused:
        """Search to the end."""
        ends = [message async for message in self.search_rounds(job) if not isinstance(message, Round)]
        return ends[-1]

    async def search_rounds(self, job: SearchJob) -> AsyncIterator[Round | SearchReply | Refused]:
        """Search, and say how it stands after every round."""

        async def score(items: Int32Array, timeout_s: float, is_admitted: bool) -> Scored | Refused:
            return await self._score(job.query, items, timeout_s, is_admitted)

        async for message in SearchRun(job, self._index, self._retrieve, score).run(self._start):
            yield message

    def _place_queries(self, texts: list[str]) -> list[Placed]:
        """Of each query, without a score: its embeddings and its offset."""
        embedded, fitted = self._dual_encoder.embed_queries(texts), self._index.factorization
        return list(zip(embedded, fitted.embed_queries(embedded), map(fitted.offset, texts), strict=True))

    async def _start(self, job: SearchJob, excluded: Int32Array) -> tuple[Search, Nearest]:
        """The search's generator, and what asks for the items that are best by what is known by then."""
        embedded, embedding, offset = await self._place(job.query)
        fitted = self._index.factorization
        n_items, budget, rounds = len(self._index.corpus.items), job.ce_calls, job.rounds
        if job.method == "rnr":
            n = min(budget, n_items - len(excluded))
            ranking = await self._retrieve_de(Retrieve(embedded, n, excluded))
            running = search(None, ranking.item_index, n_items=n_items, budget=budget, rounds=rounds)
            return running, lambda n, known: Retrieve(embedding, n, known, offset)
        method = replace(METHODS["axn_ridge_mf_ind"], rounds=rounds)
        learned = fitted.noise_variance, offset, fitted.prior_variance
        estimator = build_estimator(method, fitted.item_embeddings, fitted.scale, embedding, *learned)

        def nearest(n: int, known: Int32Array) -> Retrieve:
            estimated = None if estimator is None else estimator.query_embedding
            return Retrieve(embedding if estimated is None else estimated, n, known, offset)

        return search(estimator, None, n_items=n_items, budget=budget, rounds=rounds), nearest

    async def _score(self, query: str, items: Int32Array, timeout_s: float, is_admitted: bool) -> Scored | Refused:
        """One round's scores, from any replica that holds the same index."""
        score_items, version = self._cross_encoder.score_items, self._index.version
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                answer: Scored | Refused = await call(
                    lambda left: score_items.remote(query, items, version, left, is_admitted), left_s
                )
            except FAILED as error:
                return Refused("scorer_failed", f"the cross-encoder does not answer ({type(error).__name__}); see its logs")
            is_other = isinstance(answer, Refused) and answer.kind == "not_ready"
            if not is_other or deadline - time.monotonic() < 2 * REPLACED_S:
                return answer
            await asyncio.sleep(REPLACED_S)

    def describe(self) -> dict[str, Any]:
        """What `/info` says of the index."""
        return self._described


def _describe(index: Index) -> dict[str, Any]:
    corpus, factorization = index.corpus, index.factorization
    return {
        "version": index.version,
        "items": len(corpus.items),
        "dim": int(factorization.item_embeddings.shape[1]),
        "dual_encoder": corpus.dual_encoder,
        "columns": sorted(corpus.items.columns),
        "examples": example_queries(corpus),
    }
