"""What the words of query and item say of their CE score beside the embeddings: BM25 as a part of the prior mean.

Knows no CE and no search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from axn_ray.core.first_round import Bm25Index
from axn_ray.core.score_matrix import FloatArray

Feature = Callable[[int], FloatArray]  # of a train query: a number for every item, (n_items,)


def lexical_feature(index: Bm25Index, query_text: str) -> FloatArray:
    """`sqrt(BM25(query, item))` of every item, (n_items,) float32."""
    return np.sqrt(index.score(query_text))


@dataclass(frozen=True)
class Words:
    """What a fit reads: BM25 over the items, and the texts of the train queries (n_queries,)."""

    index: Bm25Index
    query_texts: Sequence[str]

    def feature(self, query: int) -> FloatArray:
        """The `lexical_feature` of a train query by its number, (n_items,) float32."""
        return lexical_feature(self.index, self.query_texts[query])


@dataclass(frozen=True)
class LexicalMean:
    """`weight` times the `lexical_feature`, in scaled units."""

    index: Bm25Index
    weight: float

    def of_query(self, query_text: str) -> FloatArray:
        """What it adds to the prior mean of every item's scaled score, (n_items,) float32."""
        return np.float32(self.weight) * lexical_feature(self.index, query_text)
