"""The deployment that holds the cross-encoder: pairs in, raw logits out, through its own queue.

Items are named by their index: their token ids stand in this node's memory already.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.util.metrics import Gauge

from axn_ray.core.artifact import hash_json
from axn_ray.core.factorization import warn_of_other_scorer
from axn_ray.core.pairs import PairScores, count_tokens
from axn_ray.core.threaded import ThreadedScorer
from axn_ray.core.tokens import Int32Array, TokenTable
from axn_ray.errors import AxnError
from serve_app.config import AppArgs
from serve_app.index_folder import open_index, prepare_items
from serve_app.messages import Refused, Scored
from serve_app.pair_queue import PairQueue, Pairs, QueueFullError

logger = logging.getLogger("ray.serve")
QUERIES_KEPT = 256


class CrossEncoderDeployment:
    """One cross-encoder in one process, with the items of the index prepared for it.

    Raises:
        ArtifactError: see `open_index`.
        ModelError: see `open_cross_encoder`.
    """

    def __init__(self, args: AppArgs) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self._args = args
        self._scorer = ThreadedScorer(args, args.threads or max(1, int(cpus)))
        index = open_index(args)
        warn_of_other_scorer(Path(args.index), index.made_from, self._scorer.fingerprint)
        self._version, self._name = index.version, hash_json(self._scorer.fingerprint)
        self._items = prepare_items(index.corpus.items, self._scorer, args.cache)
        self._item_tokens = count_tokens(self._items)
        self._queue = PairQueue(self._scorer, args.batch_tokens, args.max_queued_pairs)
        self._queries: dict[str, Any] = {}  # as tokenized, for the rounds to come
        self._queued_pairs = Gauge("axn_queue_pairs", "pairs that wait for a cross-encoder replica")
        self._batch_fill = Gauge("axn_batch_fill", "tokens of the last batch as a share of batch_tokens")

    async def score_items(
        self, query: str, item_index: Int32Array, version: str, timeout_s: float, is_admitted: bool
    ) -> Scored | Refused:
        """Score one query with n items of the index: (n,) -> (n,)."""
        if version != self._version:
            return Refused("not_ready", f"the index is being replaced ({version} by {self._version}); try again", 1.0)
        queries = await self._tokenize_query(query)
        rows = np.zeros(len(item_index), dtype=np.int32)
        tokens = count_tokens(queries)[rows] + self._item_tokens[item_index]
        return await self._score(Pairs(queries, self._items, rows, item_index, tokens), timeout_s, is_admitted)

    async def _tokenize_query(self, query: str) -> Any:
        """The query as the scorer reads it, kept from its first round on."""
        if (kept := self._queries.get(query)) is not None:
            return kept
        tokenized = await asyncio.to_thread(self._scorer.tokenize_queries, [query])
        if len(self._queries) >= QUERIES_KEPT:
            del self._queries[next(iter(self._queries))]
        self._queries[query] = tokenized
        return tokenized

    async def score_texts(
        self, queries: list[str], documents: list[str], max_document_tokens: int | None, timeout_s: float
    ) -> Scored | Refused:
        """Score n pairs of texts -> (n,); one query stands for all its documents. Documents lose what no model would read."""
        limit = self._args.max_document_chars
        is_long = np.array([len(document) > limit for document in documents])
        documents = [document[:limit] for document in documents]
        prepared = await asyncio.to_thread(lambda: (self._scorer.tokenize_queries(queries), self._scorer.tokenize(documents)))
        items = prepared[1] if max_document_tokens is None else _cut(prepared[1], max_document_tokens)
        rows = np.arange(len(documents), dtype=np.int32)
        query_rows = rows if len(queries) == len(documents) else np.zeros_like(rows)
        tokens = count_tokens(prepared[0])[query_rows] + count_tokens(items)
        return await self._score(Pairs(prepared[0], items, query_rows, rows, tokens), timeout_s, is_long=is_long)

    async def _score(
        self, pairs: Pairs, timeout_s: float, is_admitted: bool = False, is_long: npt.NDArray[np.bool_] | bool = False
    ) -> Scored | Refused:
        self._queued_pairs.set(self._queue.n_queued + len(pairs))  # now: nothing ends while a model hangs
        try:
            scored = await self._queue.score(pairs, timeout_s=timeout_s, is_admitted=is_admitted)
        except QueueFullError as error:
            waiting = f"{self._queue.n_queued} pairs wait for the cross-encoder"
            return Refused("overloaded", f"{waiting}; try again in {error.retry_after_s:.0f} s", error.retry_after_s)
        except TimeoutError:
            return Refused(
                "deadline", f"{len(pairs)} pairs were not scored within {timeout_s:.1f} s; send fewer, or raise deadline_ms"
            )
        except AxnError as error:
            return Refused("scorer_failed", str(error))
        except Exception as error:
            logger.exception("the cross-encoder failed on %d pairs", len(pairs))
            return Refused("scorer_failed", f"the cross-encoder failed ({type(error).__name__}); see its logs")
        finally:
            self._queued_pairs.set(self._queue.n_queued)
            self._batch_fill.set(self._queue.batch_fill)
        return self._describe_scores(pairs, scored, is_long)

    def _describe_scores(self, pairs: Pairs, scored: PairScores, is_long: npt.NDArray[np.bool_] | bool) -> Scored:
        """What was scored was cut where it was too long for the model, unless its chunks were scored, or for the app."""
        max_length, tokens, good = self._scorer.max_length, pairs.tokens + self._scorer.n_special, ~np.isnan(scored.scores)
        limit = np.iinfo(np.int64).max if max_length is None or self._args.overlong == "chunk-max" else max_length
        cut = int(((tokens > limit) | is_long)[good].sum())
        total = int(np.minimum(tokens, limit)[good].sum())
        queue = self._queue
        return Scored(scored.scores, dict(scored.failures), cut, total, queue.n_queued, queue.pairs_per_second, self._name)

    def describe(self) -> dict[str, Any]:
        """What `/info` says of the model."""
        return {"name": self._args.cross_encoder, **self._scorer.fingerprint}

    def statistics(self) -> dict[str, float]:
        """Counts of this replica since it started."""
        queue = self._queue
        done = {"batches": queue.n_batches, "pairs": queue.n_batched_pairs, "tokens": queue.n_batched_tokens}
        return {**done, "queued_pairs": queue.n_queued, "seconds_at_work": queue.seconds_at_work}

    def check_health(self) -> None:
        """Serve replaces a replica whose forward pass does not end.

        Raises:
            RuntimeError: it is stuck.
        """
        if self._queue.busy_s > self._args.stuck_after_s:
            raise RuntimeError(f"a forward pass has run for {self._queue.busy_s:.0f} s; the replica is stuck")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The pairs that wait or are being scored: what `serve_app.scaling` goes by."""
        return {"pending_pairs": float(self._queue.n_queued + self._queue.n_at_work)}


def _cut(items: Any, tokens: int) -> Any:
    """Each text's first tokens (words, where the CE prepares nothing)."""
    if not isinstance(items, TokenTable):
        return tuple(" ".join(text.split()[:tokens]) for text in items)
    kept = np.minimum(items.lengths, tokens)
    within = np.arange(len(items.ids)) - np.repeat(items.offsets[:-1], items.lengths)
    return TokenTable(items.ids[within < np.repeat(kept, items.lengths)], np.concatenate([[0], np.cumsum(kept)]).astype(np.int64))
