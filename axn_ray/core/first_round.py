"""Rankings that open a search: which items the first round scores, best first. Knows no CE and no later round."""

import logging
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np

from axn_ray.core.ranking import top_items
from axn_ray.core.score_matrix import FloatArray, ItemArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG for itself


def dense_first_round(item_embeddings: ItemArray, query_embedding: FloatArray, n: int) -> Int32Array:
    """The n items of highest inner product: items (n_items, dim), query (dim,) -> (n,), ties by item index.

    Raises:
        InputError: shapes that do not fit, or n outside 1..n_items.
    """
    if item_embeddings.ndim != 2 or query_embedding.shape != item_embeddings.shape[1:]:
        shapes = f"items {item_embeddings.shape} and query {query_embedding.shape}"
        raise InputError(f"{shapes} must be (n, dim) and (dim,), same dim; embed both with one model")
    return top_items(item_embeddings @ query_embedding, n)


class Bm25Index:
    """BM25 (Lucene's variant, English stop words, no stemming) over the items' texts.

    Raises:
        InputError: no text holds a word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        tokens = bm25s.tokenize(list(texts), stopwords="english", show_progress=False)
        if not tokens.vocab:
            raise InputError(f"none of the {len(texts)} items has a word that BM25 counts; use the dense first round")
        self._index = bm25s.BM25(method="lucene")
        self._index.index(tokens, create_empty_token=False, show_progress=False)
        self.n_items = len(texts)

    def save(self, folder: Path) -> None:
        """Write the index into a folder of its own."""
        self._index.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> "Bm25Index":
        """Read what `save` wrote; its arrays are memory-mapped."""
        loaded = cls.__new__(cls)
        loaded._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        loaded.n_items = int(loaded._index.scores["num_docs"])
        return loaded

    def score(self, query_text: str) -> FloatArray:
        """The BM25 score of every item, (n_items,) float32; 0 for one that shares no word with the query."""
        words = bm25s.tokenize([query_text], stopwords="english", return_ids=False, show_progress=False)[0]
        scores: FloatArray = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
        return scores

    def rank(self, query_text: str, n: int) -> Int32Array:
        """The n items of highest BM25 score (n,), ties by item index: items that share no word come last, in order.

        Raises:
            InputError: n outside 1..n_items.
        """
        return top_items(self.score(query_text), n)


def random_first_round(n_items: int, n: int, rng: np.random.Generator) -> Int32Array:
    """Some n items in random order (n,), none twice; a larger n with the same generator state only appends.

    Raises:
        InputError: n outside 1..n_items.
    """
    if not 1 <= n <= n_items:
        raise InputError(f"n={n} must lie in 1..{n_items}, the number of items; lower n or add items")
    return rng.permutation(n_items)[:n].astype(np.int32)
