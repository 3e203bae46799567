"""One searcher in one process: a query's text in, the items the CE ranks highest out, under an exact budget of CE calls.

Knows no Ray and no HTTP; evaluation and serving drive the same generator in their own ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.table import Table
from rich.text import Text

from axn_ray.core.adaptive import SearchResult, run_search, search
from axn_ray.core.artifact import check_same_inputs, hash_json, locate_folder, read_manifest
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.dual_encoder import open_dual_encoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.factorization import load_factorization, warn_of_other_scorer
from axn_ray.core.index import ItemIndex, Retrieve, Retrieved
from axn_ray.core.known_scores import KnownFirst, KnownScores
from axn_ray.core.methods import METHODS
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.pairs import FloatArray, PairScorer
from axn_ray.core.score_store import digest_texts, load_scores
from axn_ray.core.search_space import build_estimator
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError, ModelError


class SearchConfig(CrossEncoderConfig):
    """The budget of a search and the cross-encoder that spends it."""

    budget: int = Field(100, ge=1, description="cross-encoder calls per query, over all rounds")
    rounds: int = Field(10, ge=1, description="1 is retrieve-and-rerank")
    top_k: int = Field(10, ge=1, description="results to show")
    target_recall: float | None = Field(
        None, gt=0, lt=1, description="stop where this share of the top k is found; default: never"
    )
    known_scores: list[str] = Field([], description="scores artifacts to look pairs up in before paying for a call")


@dataclass(frozen=True)
class Hit:
    """One result: `score` is the CE's raw logit, `round` (from 1) the round that found it."""

    item_id: str
    title: str
    text: str
    score: float
    round: int


class Searcher:
    """Adaptive search over one corpus with a factorization's embeddings: ridge around its query embedding.

    Raises:
        ArtifactError: the factorization was made from other items, or over another dual-encoder, than the corpus;
            see `open_dual_encoder`.
        ModelError: a model cannot be loaded.
    """

    def __init__(self, corpus: EmbeddedCorpus, factorization: Path, config: SearchConfig) -> None:
        manifest = read_manifest(factorization, "factorization")
        check_same_inputs(factorization, manifest, {"items": corpus.items.fingerprint, "dual_encoder": corpus.dual_encoder})
        self._corpus, self._config = corpus, config
        self._version = hash_json(manifest.model_dump(mode="json"))[:12]
        self._factorization = load_factorization(factorization)
        self._index = ItemIndex(self._factorization.item_embeddings)
        self._cross_encoder = open_cross_encoder(config)
        warn_of_other_scorer(factorization, manifest.made_from, self._cross_encoder.fingerprint)
        self._dual_encoder = open_dual_encoder(corpus)
        self._item_tokens = self._cross_encoder.tokenize(corpus.items.full_texts)
        self._known = _KnownQueries(config.known_scores, self._cross_encoder, corpus.items.full_texts)

    def search(self, query: str) -> SearchResult:
        """Score exactly `budget` items in `rounds` rounds, fewer with a `target_recall`; all of them, best first.

        A known pair spends the budget like any other, so that what is known changes what the search costs and nothing else.

        Raises:
            InputError: an empty query; see `axn_ray.core.adaptive.search`.
            ModelError: the CE can score no item of a round.
        """
        if not query.strip():
            raise InputError("the query is empty; give some text")
        budget, rounds, n_items = self._config.budget, self._config.rounds, len(self._corpus.items)
        if budget > n_items:
            raise InputError(f"budget={budget} exceeds the {n_items} items in the index; lower the budget or add items")
        fitted = self._factorization
        embedding = fitted.embed_queries(self._dual_encoder.embed_queries([query]))[0]
        method = replace(
            METHODS["axn_ridge_mf_ind"], rounds=rounds, target_recall=self._config.target_recall, k=self._config.top_k
        )
        offset = fitted.offset(query)
        learned = fitted.noise_variance, offset, fitted.prior_variance
        estimator = build_estimator(method, fitted.item_embeddings, fitted.scale, embedding, *learned)
        tokens = self._cross_encoder.tokenize_queries([query])
        scorer = KnownFirst(self._cross_encoder, self._known.of_query(query))
        failures: dict[int, str] = {}

        def score(chosen: Int32Array) -> FloatArray:
            scored = scorer.score_pairs(tokens, self._item_tokens, np.zeros_like(chosen), chosen)
            failures.update({int(chosen[row]): reason for row, reason in scored.failures.items()})
            if len(scored.failures) == len(chosen):
                first = f"{self._corpus.items.ids[chosen[0]]!r} ({scored.failures[0]})"
                raise ModelError(f"the cross-encoder cannot score items such as {first}; mend the model or these items")
            return scored.scores

        def retrieve(request: Retrieve) -> Retrieved:
            return self._index.retrieve([request])[0]

        running = search(estimator, None, n_items=n_items, budget=budget, rounds=rounds, stop=method.stop)
        result = run_search(running, score, retrieve)
        return replace(result, n_known=scorer.n_known, failures=failures)

    @property
    def version(self) -> str:
        """Names the items and the factorization that are searched."""
        return self._version

    def score_texts(self, query: str, texts: Sequence[str]) -> FloatArray:
        """Score any n texts against a query -> (n,) raw logits, NaN where one cannot be scored."""
        prepared = self._cross_encoder.tokenize_queries([query]), self._cross_encoder.tokenize(texts)
        rows = np.arange(len(texts), dtype=np.int32)
        return self._cross_encoder.score_pairs(*prepared, np.zeros_like(rows), rows).scores

    def describe_failures(self, result: SearchResult) -> list[dict[str, str]]:
        """`id` and `reason` of each item that was asked for and could not be scored."""
        return [{"id": self._corpus.items.ids[item], "reason": reason} for item, reason in result.failures.items()]

    def hits(self, result: SearchResult, top_k: int | None = None) -> list[Hit]:
        """The best `top_k` results, without one the config's, with their ids and texts."""
        items, top_k = self._corpus.items, self._config.top_k if top_k is None else top_k
        best = zip(result.item_index[:top_k], result.score[:top_k], result.round[:top_k], strict=True)
        return [Hit(items.ids[i], items.titles[i], items.texts[i], float(s), int(r)) for i, s, r in best]


class _KnownQueries:
    """All that the stores know of these items, by the query's text.

    Raises:
        ArtifactError: a store that cannot be read or was made with another CE.
    """

    def __init__(self, stores: list[str], cross_encoder: PairScorer, item_texts: list[str]) -> None:
        loaded = [load_scores(locate_folder(name)) for name in stores]
        digests = list(dict.fromkeys(digest for store in loaded for digest in store.query_digests))
        item_digests = digest_texts(item_texts) if loaded else [b""] * len(item_texts)
        self._row_of = {digest: row for row, digest in enumerate(digests)}
        self._known = KnownScores.of_digests(loaded, hash_json(cross_encoder.fingerprint), digests, item_digests)

    def of_query(self, query: str) -> KnownScores:
        """What is known of one query's text."""
        return self._known.of_query(self._row_of.get(digest_texts([query])[0]))


def hits_table(query: str, result: SearchResult, searcher: Searcher) -> Table:
    """The hits for a terminal: score, the round that found each, id and text; the CE calls spent in the title."""
    counts = (("known", result.n_known), ("failed", result.n_failed))
    described = "".join(f", {n} of them {what}" for what, n in counts if n)
    title = Text(f"{query}   ({result.n_ce_calls} CE calls{described})", style="bold")  # not markup: queries hold brackets
    table = Table(title=title, title_justify="left")
    for column in ("score", "round", "item", "text"):
        table.add_column(column, justify="right" if column in ("score", "round") else "left")
    for hit in searcher.hits(result):
        text = f"{hit.title}: {hit.text}" if hit.title else hit.text
        table.add_row(f"{hit.score:.2f}", str(hit.round), Text(hit.item_id), Text(text))
    return table
