"""Scores that were paid for before: pairs of the job at hand, looked up in scores artifacts of the same cross-encoder (CE).

A pair is the same when both its texts are, whatever their ids and rows were. Knows no model and no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from axn_ray.core.artifact import hash_json
from axn_ray.core.pairs import FloatArray, PairScorer, PairScores
from axn_ray.core.score_store import Scores, digest_texts
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ArtifactError, InputError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KnownScores:
    """Known pairs in the index space of the job at hand: `keys int64 (n,)` ascending, `scores float32 (n,)`.

    A key is `query * n_items + item`, where a text that comes several times stands under its first row: `query_rows
    int32 (n_queries,)` and `item_rows int32 (n_items,)` hold that row for each.
    """

    query_rows: Int32Array
    item_rows: Int32Array
    keys: Int64Array
    scores: FloatArray

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(
        cls, stores: Sequence[Scores], cross_encoder: str, query_texts: Sequence[str], item_texts: Sequence[str]
    ) -> "KnownScores":
        """Look up every pair of these texts in the stores; of a pair that stands in several, the first store's score.

        `cross_encoder` is `hash_json` of the CE's fingerprint, `item_texts` are full texts (`title: text`).

        Raises:
            ArtifactError: a store was made with another CE.
        """
        if not stores:
            rows = [np.arange(len(texts), dtype=np.int32) for texts in (query_texts, item_texts)]
            return cls(rows[0], rows[1], np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
        return cls.of_digests(stores, cross_encoder, digest_texts(query_texts), digest_texts(item_texts))

    @classmethod
    def of_digests(
        cls, stores: Sequence[Scores], cross_encoder: str, query_digests: Sequence[bytes], item_digests: Sequence[bytes]
    ) -> "KnownScores":
        """The same for texts of which only the digests (`digest_texts`) are at hand.

        Raises:
            ArtifactError: a store was made with another CE.
        """
        for number, store in enumerate(stores, start=1):
            _check_cross_encoder(number, store, cross_encoder)
        query_of, item_of = _first_rows(query_digests), _first_rows(item_digests)
        parts = [_find_pairs(store, query_of, item_of, len(item_digests)) for store in stores]
        keys = np.concatenate([np.empty(0, dtype=np.int64), *(found for found, _ in parts)])
        scores = np.concatenate([np.empty(0, dtype=np.float32), *(found for _, found in parts)])
        if not (keys[1:] > keys[:-1]).all():
            keys, first = np.unique(keys, return_index=True)
            scores = scores[first]
        return cls(_rows(query_digests, query_of), _rows(item_digests, item_of), keys, scores)

    def of_query(self, query: int | None) -> "KnownScores":
        """What is known of one query, as a job whose only query it is (row 0); None is a query of which nothing is."""
        n_items = len(self.item_rows)
        row = -1 if query is None else int(self.query_rows[query])
        start, stop = np.searchsorted(self.keys, [row * n_items, (row + 1) * n_items]) if row >= 0 else (0, 0)
        keys = self.keys[start:stop] - row * n_items
        return KnownScores(np.zeros(1, dtype=np.int32), self.item_rows, keys, self.scores[start:stop])

    def lookup(self, query_index: Int32Array, item_index: Int32Array) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        """Look up n pairs: (n,), (n,) -> found (n,), scores (n,), NaN where not found.

        Raises:
            InputError: an index outside the job's queries or items.
        """
        _check_range("query", query_index, len(self.query_rows))
        _check_range("item", item_index, len(self.item_rows))
        scores = np.full(len(query_index), np.nan, dtype=np.float32)
        if not len(self):
            return np.zeros(len(query_index), dtype=np.bool_), scores
        asked = self.query_rows[query_index].astype(np.int64) * len(self.item_rows) + self.item_rows[item_index]
        place = np.minimum(np.searchsorted(self.keys, asked), len(self) - 1)
        found = self.keys[place] == asked
        scores[found] = self.scores[place[found]]
        return found, scores


class KnownFirst(PairScorer):
    """A CE that is asked only for pairs that are not known; equal to the CE alone, but for what it costs.

    `query_index` and `item_index` are the rows of the texts that the `KnownScores` were looked up for, and the prepared
    texts given to `score_pairs` are those same texts in that order. `n_known` counts the pairs that were looked up,
    `n_asked` those that the CE scored.
    """

    def __init__(self, scorer: PairScorer, known: KnownScores) -> None:
        self.fingerprint = scorer.fingerprint
        self.n_asked, self.n_known = 0, 0
        self._scorer, self._known = scorer, known

    @property
    def hit_rate(self) -> float:
        """Share of the pairs so far that were known; 0 before the first."""
        return self.n_known / max(1, self.n_known + self.n_asked)

    def tokenize(self, texts: Sequence[str]) -> Any:
        """See `PairScorer`."""
        return self._scorer.tokenize(texts)

    def tokenize_queries(self, texts: Sequence[str]) -> Any:
        """See `PairScorer`."""
        return self._scorer.tokenize_queries(texts)

    def score_pairs(self, queries: Any, items: Any, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """See `PairScorer`. `n_truncated` counts among the pairs that the CE scored."""
        found, scores = self._known.lookup(query_index, item_index)
        rest = np.flatnonzero(~found)
        self.n_known += len(found) - len(rest)
        self.n_asked += len(rest)
        if not len(rest):
            return PairScores(scores)
        scored = self._scorer.score_pairs(queries, items, query_index[rest], item_index[rest])
        scores[rest] = scored.scores
        return PairScores(scores, {int(rest[row]): why for row, why in scored.failures.items()}, scored.n_truncated)


def _check_cross_encoder(number: int, store: Scores, cross_encoder: str) -> None:
    made_with = store.made_from["cross_encoder"]
    if made_with != cross_encoder:
        fingerprint = store.config.get("fingerprint")
        described = f" {fingerprint}" if fingerprint is not None and hash_json(fingerprint) == made_with else ""
        raise ArtifactError(
            f"known scores number {number} were made with the cross-encoder {made_with[:12]}{described}, this run has "
            f"{cross_encoder[:12]} (another model, dtype or setting); leave them out or set the cross-encoder they were made with"
        )


def _check_range(side: str, index: Int32Array, n: int) -> None:
    if len(index) and not 0 <= index.min() <= index.max() < n:
        raise InputError(f"{side} index outside the {n} texts that were looked up; look up the texts that are scored")


def _first_rows(digests: Sequence[bytes]) -> dict[bytes, int]:
    """Digest -> the first row that has it."""
    rows: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        rows.setdefault(digest, row)
    return rows


def _rows(digests: Sequence[bytes], row_of: dict[bytes, int]) -> Int32Array:
    """The row of each digest, (n,); -1 where there is none."""
    return np.fromiter((row_of.get(digest, -1) for digest in digests), dtype=np.int32, count=len(digests))


def _find_pairs(
    store: Scores, query_of: dict[bytes, int], item_of: dict[bytes, int], n_items: int
) -> tuple[Int64Array, FloatArray]:
    """Keys (n,) and scores (n,) of the store's pairs whose texts are both there, in the store's order."""
    item_rows = _rows(store.item_digests, item_of)
    queries = np.repeat(_rows(store.query_digests, query_of), np.diff(store.matrix.indptr))
    items = item_rows[store.matrix.item_index]
    both = (queries >= 0) & (items >= 0)
    return queries[both].astype(np.int64) * n_items + items[both], store.matrix.scores[both]
