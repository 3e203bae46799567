"""A `Searcher` in this process with the replies of a server, for callers who take either. Knows no HTTP and no Ray."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.ranking import order_by_score
from axn_ray.core.searcher import SearchConfig, Searcher
from axn_ray.errors import InputError, ModelError
from axn_ray.replies import Degraded, Hit, Ranked, SearchReply


class AxnSearcher:
    """Search over the artifacts of a run, with the budget, rounds and cross-encoder of `config`.

    Raises:
        ArtifactError, ModelError: see `Searcher`.
    """

    def __init__(self, embeddings: Path, factorization: Path, config: SearchConfig) -> None:
        self._searcher = Searcher(load_embedded_corpus(embeddings), factorization, config)
        self._config = config

    def search(self, query: str, *, top_k: int | None = None) -> SearchReply:
        """The `top_k` items (without one, the config's) that the CE ranks highest; at most the budget, for no more are scored.

        Raises:
            InputError: a `top_k` below 1; see `Searcher.search`.
        """
        top_k = self._config.top_k if top_k is None else top_k
        if top_k < 1:
            raise InputError(f"top_k={top_k} asks for nothing; give at least 1")
        result = self._searcher.search(query)
        best = self._searcher.hits(result, top_k)
        return SearchReply(
            results=tuple(Hit(id=h.item_id, score=h.score, round=h.round, title=h.title, text=h.text) for h in best),
            usage={"ce_calls": result.n_ce_calls, "cache_hits": result.n_known},
            degraded=Degraded(scorer_error=result.n_failed > 0, rounds_done=int(result.round.max())),
            index_version=self._searcher.version,
            failures=tuple(self._searcher.describe_failures(result)),
        )

    def rerank(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """Documents by the CE's logit, best first, ties by place; one that cannot be scored is left out.

        Raises:
            InputError: an empty query, or no documents.
            ModelError: no document could be scored.
        """
        if not query.strip():
            raise InputError("the query is empty; give some text")
        if not documents:
            raise InputError("there are no documents; give at least one")
        scores = self._searcher.score_texts(query, documents)
        good = np.flatnonzero(~np.isnan(scores)).astype(np.int32)
        if not len(good):
            raise ModelError("no document could be scored; check their texts")
        return [Ranked(index=int(good[n]), score=float(scores[good[n]])) for n in order_by_score(good, scores[good])]
