"""Scores pairs of token ids with a model that runs here: long items, batches by true length, out-of-memory, bad pairs.

Knows no text and no weights: an engine turns a padded batch into logits.
"""

import logging
from typing import Protocol

import numpy as np
import torch

from axn_ray.core.pair_layout import Int64Array, Overlong, PairLayout, Rows
from axn_ray.core.pairs import FloatArray, PairScorer, PairScores, find_not_finite, is_out_of_memory, score_or_split
from axn_ray.core.tokens import Int32Array, PairTemplate, TokenTable, token_budget_batches
from axn_ray.errors import ModelError

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs a batch of token ids through a model's weights."""

    def logits(self, ids: Int64Array, mask: Int64Array, types: Int64Array | None, column: int = 0) -> FloatArray:
        """One output of each row of a batch that is padded on the right: (n, longest) -> (n,) float32."""
        ...


class TokenPairScorer(PairScorer):
    """A CE over token ids; `column` is the engine's output that is the score.

    Raises:
        ModelError: the template leaves no room for a pair.
    """

    def __init__(
        self, engine: Engine, template: PairTemplate, max_length: int, overlong: Overlong, batch_tokens: int, column: int = 0
    ) -> None:
        self._engine, self._template, self._column = engine, template, column
        if max_length < template.n_special + 2:
            raise ModelError(f"max_length={max_length} has no room beside the template's {template.n_special} tokens; raise it")
        self.max_length, self._overlong, self._batch_tokens = max_length, overlong, batch_tokens

    @property
    def n_special(self) -> int:
        """Tokens that joining adds to a pair."""
        return self._template.n_special

    def score_pairs(self, queries: TokenTable, items: TokenTable, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """See `PairScorer`. Items over `max_length` meet the policy `overlong`.

        Raises:
            InputError: a pair is too long and the policy is `error`.
        """
        room = self.max_length - self._template.n_special
        layout = PairLayout.of(queries, items, query_index, item_index, room, self._overlong)
        chunk_scores = np.full(len(layout), np.nan, dtype=np.float32)
        failures = layout.failures()
        remaining = np.flatnonzero(~np.isin(layout.pair, list(failures)))
        chunk_failures: dict[int, str] = {}
        while len(remaining):
            remaining = self._score_until_out_of_memory(layout, remaining, chunk_scores, chunk_failures)
        scores = layout.best_of_chunks(chunk_scores)
        failures |= {int(layout.pair[chunk]): reason for chunk, reason in chunk_failures.items()}
        return PairScores(scores, failures | find_not_finite(scores, failures), layout.n_truncated)

    def _score_until_out_of_memory(self, layout: PairLayout, chunks: Rows, scores: FloatArray, failures: dict[int, str]) -> Rows:
        """Score chunks in batches; where memory runs out, halve the batch for good and return what is left to do."""
        lengths = layout.lengths[chunks]
        done = 0
        for batch in token_budget_batches(lengths + self._template.n_special, self._batch_tokens):
            try:
                score_or_split(lambda rows: self._forward(layout, rows), chunks[batch], scores, failures)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._batch_tokens = max(1, int(lengths[batch].max() + self._template.n_special) * (len(batch) // 2))
                logger.warning("out of memory on %d pairs at once; going on with %d tokens", len(batch), self._batch_tokens)
                torch.cuda.empty_cache()
                break
            done += len(batch)
        return chunks[np.argsort(-lengths, kind="stable")][done:]

    def _forward(self, layout: PairLayout, rows: Rows) -> FloatArray:
        ids, mask, types = layout.join(rows, self._template)
        return self._engine.logits(ids, mask, types if self._template.uses_types else None, self._column)
