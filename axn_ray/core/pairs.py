"""What scoring and search need of any cross-encoder (CE): prepare texts once, score pairs of them, say what failed.

Knows no model. `axn_ray.core.cross_encoder` has the one that runs here, `open_cross_encoder` there opens any.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from axn_ray.core.tokens import Int32Array, TokenTable
from axn_ray.errors import ModelError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PairScores:
    """Scores of n pairs: `scores float32 (n,)`, raw logits, higher is better.

    A pair that failed has a NaN there and its reason in `failures` (row -> one sentence). `n_truncated` counts the
    pairs that lost tokens.
    """

    scores: FloatArray
    failures: Mapping[int, str] = field(default_factory=dict)
    n_truncated: int = 0


class PairScorer(ABC):
    """A CE in one process. `fingerprint` names all that its scores depend on; equal fingerprints, equal scores."""

    fingerprint: Mapping[str, Any]

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Any:
        """Prepare n items, once: something that pickles and goes back into `score_pairs`."""

    def tokenize_queries(self, texts: Sequence[str]) -> Any:
        """The same for n queries; most CEs prepare them as they do items."""
        return self.tokenize(texts)

    @abstractmethod
    def score_pairs(self, queries: Any, items: Any, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """Score the n pairs (query_index[j], item_index[j]) of prepared texts; a bad pair fails alone."""

    def score(self, queries: Any, items: Any, query_index: Int32Array, item_index: Int32Array) -> FloatArray:
        """The same for callers who need every score: (n,), (n,) -> (n,) raw logits.

        Raises:
            ModelError: a pair failed.
        """
        scored = self.score_pairs(queries, items, query_index, item_index)
        if scored.failures:
            row, reason = next(iter(sorted(scored.failures.items())))
            pair = f"query index {query_index[row]}, item index {item_index[row]}"
            raise ModelError(f"the cross-encoder cannot score {len(scored.failures)} pairs (first: {pair}: {reason})")
        return scored.scores

    def score_texts(self, queries: Sequence[str], items: Sequence[str]) -> FloatArray:
        """Score the n pairs (queries[j], items[j]) -> (n,) raw logits.

        Raises:
            ModelError: a pair failed.
        """
        rows = np.arange(len(queries), dtype=np.int32)
        return self.score(self.tokenize_queries(queries), self.tokenize(items), rows, rows)


def gather_texts(parts: Sequence[tuple[Any, Int32Array]]) -> Any:
    """One run of prepared texts from the named rows of several, in the order given; all prepared by one CE."""
    if all(isinstance(texts, TokenTable) for texts, _ in parts):
        return TokenTable.gather(parts)
    return tuple(texts[row] for texts, rows in parts for row in rows)


def count_tokens(texts: Any) -> npt.NDArray[np.int64]:
    """Tokens of each of n prepared texts, (n,); words, where the CE prepares nothing."""
    if isinstance(texts, TokenTable):
        return texts.lengths
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


class TextScorer(Protocol):
    """The five lines that make any model a CE: a fingerprint, and scores for pairs of texts."""

    fingerprint: Any

    def score_texts(self, queries: Sequence[str], items: Sequence[str]) -> Sequence[float]:
        """Score the n pairs (queries[j], items[j]), higher is better."""
        ...


class TextPairScorer(PairScorer):
    """A `TextScorer` as a `PairScorer`: prepared texts are the texts, `batch_pairs` of them go into each call."""

    def __init__(self, scorer: TextScorer, batch_pairs: int = 64) -> None:
        self.fingerprint = {"scorer": scorer.fingerprint}
        self._scorer, self._batch_pairs = scorer, batch_pairs

    def tokenize(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The texts themselves."""
        return tuple(texts)

    def score_pairs(self, queries: Any, items: Any, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """See `PairScorer`."""
        pairs = [(queries[q], items[i]) for q, i in zip(query_index, item_index, strict=True)]
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        failures = find_empty_texts(pairs)
        rows = np.array([row for row in range(len(pairs)) if row not in failures], dtype=np.int64)

        def score_rows(some: npt.NDArray[np.int64]) -> FloatArray:
            received = self._scorer.score_texts([pairs[r][0] for r in some], [pairs[r][1] for r in some])
            return check_count(np.asarray(received, dtype=np.float32), len(some))

        for start in range(0, len(rows), self._batch_pairs):
            score_or_split(score_rows, rows[start : start + self._batch_pairs], scores, failures)
        return PairScores(scores, {**failures, **find_not_finite(scores, failures)})


def check_count(scores: FloatArray, n: int) -> FloatArray:
    """Refuse anything but one score per pair.

    Raises:
        ModelError: another shape.
    """
    if scores.shape != (n,):
        raise ModelError(f"{n} pairs gave scores of shape {scores.shape}; a cross-encoder gives one score per pair")
    return scores


def find_empty_texts(pairs: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Rows whose query or item has no text, with the reason."""
    sides = ("query", "item")
    return {
        row: f"the {sides[[not text.strip() for text in pair].index(True)]} has no text"
        for row, pair in enumerate(pairs)
        if not all(text.strip() for text in pair)
    }


def find_not_finite(scores: FloatArray, failures: Mapping[int, str]) -> dict[int, str]:
    """Rows that were scored and have no usable score, with the reason; scores there become NaN."""
    bad = [int(row) for row in np.flatnonzero(~np.isfinite(scores)) if int(row) not in failures]
    reasons = {row: f"the score is {scores[row]}" for row in bad}
    scores[bad] = np.nan
    return reasons


def score_or_split(
    score_rows: Callable[[npt.NDArray[np.int64]], FloatArray],
    rows: npt.NDArray[np.int64],
    scores: FloatArray,
    failures: dict[int, str],
) -> None:
    """Fill `scores[rows]`; where a batch raises, halve it until the pairs that raise stand alone in `failures`.

    Two kinds of error pass through: `ModelError`, which is no single pair's fault, and want of memory where more than
    one pair is at stake, for a smaller batch may do.
    """
    try:
        scores[rows] = score_rows(rows)
    except ModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error) and len(rows) > 1:
            raise
        if len(rows) == 1:
            failures[int(rows[0])] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            score_or_split(score_rows, part, scores, failures)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward pass failed for want of memory, on the GPU or the CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)
