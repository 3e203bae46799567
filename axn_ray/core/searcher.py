"""One searcher in one process: a query's text in, the items the CE ranks highest out, under an exact budget of CE calls.

Knows no Ray and no HTTP; evaluation and serving drive the same generator in their own ways.
"""

from dataclasses import dataclass, replace

import numpy as np

from axn_ray.core.adaptive import SearchResult, run_search, search
from axn_ray.core.cross_encoder import PairScorer
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.factorization import Factorization
from axn_ray.core.first_round import dense_first_round
from axn_ray.core.methods import Method, build_estimator
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ArtifactError, InputError


@dataclass(frozen=True)
class Hit:
    """One result: `score` is the CE's raw logit, `round` (from 1) the round that found it."""

    item_id: str
    title: str
    text: str
    score: float
    round: int


class Searcher:
    """Adaptive search over one corpus with a factorization's embeddings.

    Raises:
        ArtifactError: the factorization holds another number of items than the corpus.
    """

    def __init__(
        self, corpus: EmbeddedCorpus, factorization: Factorization, cross_encoder: PairScorer, method: Method
    ) -> None:
        if len(factorization.item_embeddings) != len(corpus.items):
            n_found, n_items = len(factorization.item_embeddings), len(corpus.items)
            raise ArtifactError(f"the factorization holds {n_found} items, the corpus {n_items}; factorize this corpus")
        self._corpus, self._factorization, self._method = corpus, factorization, method
        self._cross_encoder = cross_encoder
        self._dual_encoder = DualEncoder(corpus.dual_encoder)
        self._item_tokens = cross_encoder.tokenize(corpus.items.full_texts)

    def search(self, query: str, budget: int, rounds: int) -> SearchResult:
        """Score exactly `budget` items in `rounds` rounds; all of them, best first.

        Raises:
            InputError: an empty query; see `axn_ray.core.adaptive.search`.
        """
        if not query.strip():
            raise InputError("the query is empty; give some text")
        fitted = self._factorization
        embedding = fitted.embed_queries(self._dual_encoder.embed_queries([query]))[0]
        method = replace(self._method, rounds=rounds)
        estimator = build_estimator(method, fitted.item_embeddings, fitted.scale, embedding)
        n_first = -(-budget // rounds)
        first_round = dense_first_round(fitted.item_embeddings, embedding, min(n_first, len(self._corpus.items)))
        tokens = self._cross_encoder.tokenize([query])

        def score(chosen: Int32Array) -> np.ndarray:
            return self._cross_encoder.score(tokens, self._item_tokens, np.zeros_like(chosen), chosen)

        n_items = len(self._corpus.items)
        return run_search(search(estimator, first_round, n_items=n_items, budget=budget, rounds=rounds), score)

    def hits(self, result: SearchResult, top_k: int) -> list[Hit]:
        """The best `top_k` results with their ids and texts."""
        items = self._corpus.items
        best = zip(result.item_index[:top_k], result.score[:top_k], result.round[:top_k], strict=True)
        return [Hit(items.ids[i], items.titles[i], items.texts[i], float(s), int(r)) for i, s, r in best]
