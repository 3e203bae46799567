"""Token ids, once per text: the table that keeps them, the template that joins a pair, the batches by true length.

Knows no model weights and no device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from axn_ray.errors import InputError, ModelError

CHUNK = 1 << 14  # texts tokenized at once: ids are Python integers until they stand in the table
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenTable:
    """Token ids of n texts, without special tokens: `ids int32 (total,)`, `offsets int64 (n + 1,)`."""

    ids: Int32Array
    offsets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.ids.dtype != np.int32 or self.offsets.dtype != np.int64:
            raise InputError(f"token table has ids {self.ids.dtype} and offsets {self.offsets.dtype}; give int32 and int64")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.ids):
            raise InputError("token table's offsets do not span its ids; build it with TokenTable.from_texts")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Int32Array:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text, (n,)."""
        return np.diff(self.offsets)

    @classmethod
    def gather(cls, parts: Sequence[tuple["TokenTable", Int32Array]]) -> "TokenTable":
        """One table of the named rows of several tables, in the order given."""
        lengths = [table.offsets[rows + 1] - table.offsets[rows] for table, rows in parts]  # not of the whole table
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        starts = np.concatenate([table.offsets[rows] for table, rows in parts])
        ids = np.empty(offsets[-1], dtype=np.int32)
        done = 0
        for (table, rows), length in zip(parts, lengths, strict=True):
            span = offsets[done : done + len(rows) + 1]
            within = np.arange(span[-1] - span[0]) - np.repeat(span[:-1] - span[0], length)
            ids[span[0] : span[-1]] = table.ids[np.repeat(starts[done : done + len(rows)], length) + within]
            done += len(rows)
        return cls(ids, offsets)

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: Any) -> "TokenTable":
        """Tokenize each text once with a fast tokenizer, no special tokens, no truncation."""
        parts, lengths = [np.empty(0, dtype=np.int32)], [0]
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            encoded = tokenizer(chunk, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            lengths += [len(ids) for ids in encoded]
            parts.append(np.fromiter((i for ids in encoded for i in ids), dtype=np.int32))
        return cls(np.concatenate(parts), np.cumsum(lengths, dtype=np.int64))


@dataclass(frozen=True)
class PairTemplate:
    """How a tokenizer joins a pair: `prefix + query + middle + item + suffix`, each part with its token type."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    query_type: int
    item_type: int
    middle_types: tuple[int, ...]
    pad: int
    uses_types: bool

    @property
    def n_special(self) -> int:
        """Special tokens that the template adds to a pair."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    @classmethod
    def of(cls, tokenizer: Any) -> "PairTemplate":
        """Read the template off the tokenizer by encoding one probe pair.

        Raises:
            ModelError: the tokenizer does not put the query's ids before the item's, unchanged.
        """
        a = tokenizer("alpha", add_special_tokens=False)["input_ids"]
        b = tokenizer("beta", add_special_tokens=False)["input_ids"]
        probe = tokenizer("alpha", "beta", return_token_type_ids=True)
        ids, types = list(probe["input_ids"]), list(probe["token_type_ids"])
        start_a = _find(ids, a, 0)
        start_b = _find(ids, b, start_a + len(a))
        end_a, end_b = start_a + len(a), start_b + len(b)
        if tokenizer.pad_token_id is None:
            raise ModelError("the tokenizer has no padding token; set tokenizer.pad_token in its files")
        return cls(
            prefix=tuple(ids[:start_a]),
            middle=tuple(ids[end_a:start_b]),
            suffix=tuple(ids[end_b:]),
            query_type=types[start_a],
            item_type=types[start_b],
            middle_types=tuple(types[end_a:start_b]),
            pad=tokenizer.pad_token_id,
            uses_types="token_type_ids" in tokenizer.model_input_names,
        )


def _find(ids: list[int], part: list[int], start: int) -> int:
    for position in range(start, len(ids) - len(part) + 1):
        if ids[position : position + len(part)] == part:
            return position
    raise ModelError("the tokenizer changes texts when it joins a pair; axn-ray needs one that keeps their ids")


def token_budget_batches(lengths: npt.NDArray[np.int64], batch_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in batches of similar length, longest first; rows x longest row <= `batch_tokens`, at least one row.

    `lengths (n,)` -> arrays of rows that together hold each of 0..n-1 once. The first batch is the largest in memory:
    if it fits, all fit.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows
