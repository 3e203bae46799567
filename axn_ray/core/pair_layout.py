"""How pairs of token ids become rows of a batch: what is cut, which items are scored in chunks, the padded arrays.

Knows no model and no device.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from axn_ray.core.tokens import Int32Array, PairTemplate, TokenTable
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
_Part = tuple[Int32Array, Int64Array, Int64Array, int]  # ids, first of them (n, 1), how many (n, 1), token type
Overlong = Literal["error", "truncate", "chunk-max"]


@dataclass(frozen=True)
class PairLayout:
    """The n pairs of a request as m >= n chunks, each one row of a batch; a pair's chunks follow each other.

    `pair (m,)` is the pair of each chunk; `query_start`, `query_length`, `item_start`, `item_length` (m,) are spans of
    the two tables' ids.
    """

    query_ids: Int32Array
    item_ids: Int32Array
    pair: Int64Array
    query_start: Int64Array
    query_length: Int64Array
    item_start: Int64Array
    item_length: Int64Array
    n_truncated: int

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def lengths(self) -> Int64Array:
        """Tokens of each chunk without the template's, (m,)."""
        return self.query_length + self.item_length

    @classmethod
    def of(
        cls,
        queries: TokenTable,
        items: TokenTable,
        query_index: Int32Array,
        item_index: Int32Array,
        room: int,
        overlong: Overlong,
    ) -> "PairLayout":
        """Lay out n pairs, each within `room` tokens.

        `truncate` cuts the end of an item, `chunk-max` splits it into chunks that fit (its score is the best of them).
        Either cuts a query that leaves its item less than it needs and less than half the room; both count as truncated.

        Raises:
            InputError: a pair does not fit and the policy is `error`.
        """
        full_query, full_item = queries.lengths[query_index], items.lengths[item_index]
        query_length = np.minimum(full_query, np.maximum(room // 2, room - full_item))
        space = room - query_length
        is_cut = query_length < full_query
        if overlong == "error":
            _refuse_overlong(np.flatnonzero(full_query + full_item > room), full_query + full_item, room, item_index)
            query_length, space, is_cut = full_query, room - full_query, np.zeros_like(is_cut)
        n_chunks = np.ones(len(query_index), dtype=np.int64)
        if overlong == "chunk-max":
            n_chunks = np.maximum(1, -(-full_item // space))
        else:
            is_cut |= full_item > space
        pair = np.repeat(np.arange(len(query_index)), n_chunks)
        number = np.arange(len(pair)) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)
        offset = number * space[pair]
        return cls(
            query_ids=queries.ids,
            item_ids=items.ids,
            pair=pair,
            query_start=queries.offsets[query_index][pair],
            query_length=query_length[pair],
            item_start=items.offsets[item_index][pair] + offset,
            item_length=np.minimum(full_item[pair] - offset, space[pair]),
            n_truncated=int(is_cut.sum()),
        )

    def failures(self) -> dict[int, str]:
        """Pairs that cannot be scored because a side has no tokens, with the reason."""
        empty_query, empty_item = self.pair[self.query_length == 0], self.pair[self.item_length == 0]
        reasons = {int(pair): "the item has no text" for pair in empty_item}
        return reasons | {int(pair): "the query has no text" for pair in empty_query}

    def best_of_chunks(self, chunk_scores: FloatArray) -> FloatArray:
        """Scores of chunks (m,) -> scores of pairs (n,): the highest, or NaN where a chunk has none."""
        if not len(self):
            return chunk_scores
        return np.maximum.reduceat(chunk_scores, np.flatnonzero(np.diff(self.pair, prepend=-1)))

    def join(self, rows: Rows, template: PairTemplate) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Token ids, attention mask and token types of some chunks, int64 (len(rows), longest) each."""
        zero = np.zeros((len(rows), 1), dtype=np.int64)

        def fixed(tokens: tuple[int, ...], token_type: int) -> _Part:
            return np.array(tokens, dtype=np.int32), zero, zero + len(tokens), token_type

        parts = (
            fixed(template.prefix, template.query_type),
            (self.query_ids, self.query_start[rows, None], self.query_length[rows, None], template.query_type),
            *(fixed((token,), kind) for token, kind in zip(template.middle, template.middle_types, strict=True)),
            (self.item_ids, self.item_start[rows, None], self.item_length[rows, None], template.item_type),
            fixed(template.suffix, template.item_type),
        )
        position = np.arange(int(self.lengths[rows].max()) + template.n_special)[None, :]
        ids = np.full((len(rows), position.shape[1]), template.pad, dtype=np.int64)
        types, mask = np.zeros_like(ids), np.zeros_like(ids)
        start = zero
        for source, first, length, token_type in parts:
            here = (position >= start) & (position < start + length)
            ids[here] = source[(first - start + position)[here]]
            types[here] = token_type
            mask[here] = 1
            start = start + length
        return ids, mask, types


def _refuse_overlong(overlong: Rows, lengths: Int64Array, room: int, item_index: Int32Array) -> None:
    if len(overlong):
        first = overlong[0]
        raise InputError(
            f"{len(overlong)} pairs exceed the {room} tokens that fit (first: item index {item_index[first]} with its query, "
            f"{lengths[first]} tokens); raise max_length or set overlong to truncate or chunk-max"
        )
