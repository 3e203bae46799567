"""One cross-encoder in one process: chooses, scores and writes one shard of pairs at a time."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from axn_ray.core.active_sampling import ActiveSpace, choose_actively
from axn_ray.core.artifact import locate_folder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.known_scores import KnownFirst, KnownScores
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.pairs import FloatArray, PairScorer
from axn_ray.core.sampling import Shares, choose_items
from axn_ray.core.score_store import shard_path, write_into, write_shard
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ModelError

MAX_ATTEMPTS = 5
MAX_FAILED_SHARE = 0.5


class PairChooser:
    """The pairs of a shard, the same on every worker and in every run: `choose(shard, queries)`."""

    def __init__(self, shares: Shares | None, seed: int, item_embeddings: FloatArray, query_embeddings: FloatArray) -> None:
        self._shares, self._seed = shares, seed
        self._items, self._queries = item_embeddings, query_embeddings

    def choose(self, shard: int, queries: range) -> tuple[Int32Array, Int32Array]:
        """Query and item indices of the shard's pairs, (n,), (n,); without shares every item of each query."""
        if self._shares is None:
            chosen = np.tile(np.arange(len(self._items), dtype=np.int32), (len(queries), 1))
        else:
            rng = np.random.default_rng([self._seed, shard])
            chosen = choose_items(self._shares, self._items, self._queries[queries.start : queries.stop], rng)
        return np.repeat(np.array(queries, dtype=np.int32), chosen.shape[1]), chosen.ravel()


class ListedPairs:
    """Pairs chosen beforehand, sorted by query (n,), (n,)."""

    def __init__(self, query_index: Int32Array, item_index: Int32Array) -> None:
        self._query_index, self._item_index = query_index, item_index

    def choose(self, _: int, queries: range) -> tuple[Int32Array, Int32Array]:
        """See `PairChooser`."""
        start, stop = np.searchsorted(self._query_index, [queries.start, queries.stop])
        return self._query_index[start:stop], self._item_index[start:stop]


class ScoreActor:
    """Scores shards into a folder. `inputs` are references: query_tokens, item_tokens, known, and chooser or active."""

    def __init__(
        self, config: CrossEncoderConfig, threads: int, folder: str, fingerprint: str, n_active: int, inputs: dict[str, Any]
    ) -> None:
        torch.set_num_threads(threads)
        self._folder, self._fingerprint, self._n_active = locate_folder(folder), fingerprint, n_active
        self._inputs = dict(zip(inputs, ray.get(list(inputs.values())), strict=True))
        known: KnownScores = self._inputs["known"]
        self._scorer = KnownFirst(open_cross_encoder(config), known)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do one shard: `shard`, `start` and `stop` are the only row of the batch. Returns its facts."""
        shard, start, stop = (int(batch[name][0]) for name in ("shard", "start", "stop"))
        attempts = count_attempt(self._folder, shard)
        try:
            described = self._score_shard(shard, range(start, stop), attempts)
        finally:  # a worker that dies leaves its mark, one that raises does not
            _started(self._folder, shard).unlink(missing_ok=True)
        return {"shard": [shard], "facts": [json.dumps(described)]}

    def _score_shard(self, shard: int, queries: range, attempts: int) -> dict[str, Any]:
        begun, known_before = time.monotonic(), self._scorer.n_known
        request = _Request(self._scorer, self._inputs["query_tokens"], self._inputs["item_tokens"])
        if self._n_active:
            self._score_actively(request, queries)
        else:
            request.score(*self._inputs["chooser"].choose(shard, queries))
        request.check_failed_share()
        query_index, item_index, scores = request.sorted()
        facts = {
            "fingerprint": self._fingerprint,
            "truncated": request.n_truncated,
            "known": self._scorer.n_known - known_before,
            "failed": request.failed,
            "seconds": round(time.monotonic() - begun, 2),
            "attempts": attempts,
            "node": ray.get_runtime_context().get_node_id()[:12],
        }
        return write_shard(self._folder, shard, query_index, item_index, scores, facts)

    def _score_actively(self, request: "_Request", queries: range) -> None:
        space: ActiveSpace = self._inputs["active"]
        asking = choose_actively(space, queries, self._n_active)
        try:
            pairs = next(asking)
            while True:
                pairs = asking.send(request.score(*pairs))
        except StopIteration:
            return


class _Request:
    """The pairs of one shard as they are scored, in one or several goes."""

    def __init__(self, scorer: PairScorer, query_tokens: Any, item_tokens: Any) -> None:
        self._scorer, self._tokens = scorer, (query_tokens, item_tokens)
        self._parts: list[tuple[Int32Array, Int32Array, FloatArray]] = []
        self.failed: list[tuple[int, int, str]] = []
        self.n_truncated = 0

    def score(self, query_index: Int32Array, item_index: Int32Array) -> FloatArray:
        scored = self._scorer.score_pairs(*self._tokens, query_index, item_index)
        self.failed += [(int(query_index[r]), int(item_index[r]), why) for r, why in sorted(scored.failures.items())]
        self.n_truncated += scored.n_truncated
        self._parts.append((query_index, item_index, scored.scores))
        return scored.scores

    def check_failed_share(self) -> None:
        n = sum(len(scores) for _, _, scores in self._parts)
        if len(self.failed) > MAX_FAILED_SHARE * n:
            query, item, reason = self.failed[0]
            raise ModelError(
                f"{len(self.failed)} of a shard's {n} pairs cannot be scored (first: query index {query}, item index {item}: "
                f"{reason}); mend the model or its settings (dtype=float32?), then run again"
            )

    def sorted(self) -> tuple[Int32Array, Int32Array, FloatArray]:
        query_index, item_index, scores = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((item_index, query_index))
        return query_index[order], item_index[order], scores[order]


def _started(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(".started")


def count_attempt(folder: Path, shard: int) -> int:
    """Note that a worker begins this shard; returns which attempt it is.

    Raises:
        ModelError: so many workers have died over it that the next one would, too.
        ArtifactError: the folder cannot be written.
    """
    path = _started(folder, shard)
    attempt = int(path.read_bytes() or b"0") + 1 if path.exists() else 1
    if attempt > MAX_ATTEMPTS:
        raise ModelError(
            f"shard {shard} ended {MAX_ATTEMPTS} workers; give workers more memory or lower batch_tokens, then run again: "
            "shards that are done are kept"
        )
    write_into(folder, path, str(attempt).encode())
    return attempt
