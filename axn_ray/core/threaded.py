"""A cross-encoder whose pairs are spread over threads of one core each. Knows no queue and no model's inside."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.models import choose_device
from axn_ray.core.open_cross_encoder import is_model, open_cross_encoder
from axn_ray.core.pairs import PairScorer, PairScores, count_tokens
from axn_ray.core.tokens import Int32Array


class ThreadedScorer(PairScorer):
    """The scores of the CE that `config` names, computed by `threads` cores.

    Torch's own threads wait for each other after every product, so that whoever takes one core for a moment stops all of
    them. Those of this class meet once a call. They are for weights that run here on the CPU; a GPU, a server or a Python
    object gets one thread, in which torch may use `threads`: only one thread of a process may do so, for each has a team
    of its own, and where teams have more threads than there are cores, all sleep between any two products.

    Raises:
        ModelError: see `open_cross_encoder`.
    """

    def __init__(self, config: CrossEncoderConfig, threads: int) -> None:
        is_spread = is_model(config) and choose_device().type == "cpu"
        self._n, each = (threads, 1) if is_spread else (1, threads)
        self._pool = ThreadPoolExecutor(self._n, "cross-encoder", initializer=torch.set_num_threads, initargs=(each,))
        self._scorer = self._pool.submit(open_cross_encoder, config).result()
        self.fingerprint = self._scorer.fingerprint
        self.max_length: int | None = getattr(self._scorer, "max_length", None)
        self.n_special: int = getattr(self._scorer, "n_special", 0)

    def tokenize(self, texts: Sequence[str]) -> Any:
        """See `PairScorer`; in the caller's thread."""
        return self._scorer.tokenize(texts)

    def tokenize_queries(self, texts: Sequence[str]) -> Any:
        """See `PairScorer`; in the caller's thread."""
        return self._scorer.tokenize_queries(texts)

    def score_pairs(self, queries: Any, items: Any, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """See `PairScorer`.

        Raises:
            InputError, ModelError: what the CE raises for a part, which then holds for the whole.
        """
        tokens = count_tokens(queries)[query_index] + count_tokens(items)[item_index]
        parts = [np.arange(len(tokens))] if self._n == 1 else split_by_tokens(tokens, self._n)
        scored = list(self._pool.map(lambda p: self._scorer.score_pairs(queries, items, query_index[p], item_index[p]), parts))
        scores = np.empty(len(tokens), dtype=np.float32)
        failures: dict[int, str] = {}
        for part, found in zip(parts, scored, strict=True):
            scores[part] = found.scores
            failures |= {int(part[row]): reason for row, reason in found.failures.items()}
        return PairScores(scores, failures, sum(found.n_truncated for found in scored))


def split_by_tokens(tokens: npt.NDArray[np.int64], n: int) -> list[npt.NDArray[np.int64]]:
    """Rows of `tokens (m,)`, longest first, in at most `n` parts of about equally many tokens: all threads end together."""
    order = np.argsort(-tokens, kind="stable")
    middles = np.cumsum(tokens[order]) - tokens[order] / 2
    inner = np.linspace(0, int(tokens.sum()), n + 1)[1:-1]
    return [part for part in np.split(order, np.searchsorted(middles, inner)) if len(part)]
