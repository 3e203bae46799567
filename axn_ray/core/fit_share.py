"""One worker's share of a fit's inputs: some queries with their observations, and some rows of the item table.

It comes from arrays in memory or from artifacts on disk, of which only the share's own part is read. Knows no model, no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from axn_ray.core.embedded_corpus import ITEM_EMBEDDINGS, QUERY_EMBEDDINGS
from axn_ray.core.fitting import FitInputs, check_finite
from axn_ray.core.score_matrix import FloatArray, ScoreMatrix
from axn_ray.core.score_store import ShardSpan, read_shards


@dataclass(frozen=True)
class FitShare:
    """What one of the workers holds.

    `matrix` has the rows of `queries` and all items as columns; its observations follow `first_observation` others among
    `n_observed`. `item_embeddings (n_items, dim)` are all items', maybe memory-mapped; `items` are the rows that it owns.
    `query_embeddings (len(queries), dim)`.
    """

    queries: range
    n_queries: int
    items: range
    matrix: ScoreMatrix
    first_observation: int
    n_observed: int
    item_embeddings: FloatArray
    query_embeddings: FloatArray


def share_rows(n: int, workers: int) -> list[range]:
    """Rows 0..n-1 in one range per worker, equal but for one row."""
    bounds = [n * worker // workers for worker in range(workers + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def share_queries(counts: npt.NDArray[np.float64], workers: int) -> list[range]:
    """One contiguous range of queries per worker, with about equally many of the observations `counts (n_queries,)` in each."""
    total = np.concatenate([[0.0], np.cumsum(counts)])
    marks = np.linspace(0, total[-1], workers + 1)[1:-1]
    bounds = [0, *np.minimum(np.searchsorted(total, marks - 1e-6), len(counts)).tolist(), len(counts)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def share_inputs(inputs: FitInputs, rank: int = 0, workers: int = 1) -> FitShare:
    """The share of worker `rank` in inputs that lie in memory."""
    matrix = inputs.score_matrix
    queries = share_queries(np.diff(matrix.indptr).astype(np.float64), workers)[rank]
    return FitShare(
        queries=queries,
        n_queries=matrix.n_queries,
        items=share_rows(matrix.n_items, workers)[rank],
        matrix=matrix.rows(queries),
        first_observation=int(matrix.indptr[queries.start]),
        n_observed=matrix.n_observed,
        item_embeddings=inputs.item_embeddings,
        query_embeddings=inputs.query_embeddings[queries.start : queries.stop],
    )


@dataclass(frozen=True)
class StoredInputs:
    """Inputs that lie on disk: an `embeddings` and a `scores` artifact, `query_rows` (n_queries,) of the scores' queries
    in the embeddings, and which queries each shard of scores spans.
    """  # noqa: D205

    embeddings: Path
    scores: Path
    query_rows: npt.NDArray[np.int64]
    spans: Sequence[ShardSpan]

    @property
    def n_observed(self) -> int:
        """Observations of all shards."""
        return sum(span.rows for span in self.spans)

    def share(self, rank: int, workers: int) -> FitShare:
        """The share of worker `rank`: reads the shards that its queries appear in, and no others.

        Raises:
            ArtifactError: a damaged shard.
            InputError: an embedding that is NaN or infinite among the share's rows.
        """
        n_queries = len(self.query_rows)
        queries = share_queries(self._expected_counts(), workers)[rank]
        items = np.load(self.embeddings / ITEM_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        every_query = np.load(self.embeddings / QUERY_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        mine = [s for s in self.spans if s.first < queries.stop and s.last >= queries.start] if len(queries) else []
        read = read_shards(self.scores, [span.shard for span in mine], n_queries, len(items))
        own_items, own_queries = share_rows(len(items), workers)[rank], every_query[self.query_rows[queries.start : queries.stop]]
        check_finite("item", items[own_items.start : own_items.stop])
        check_finite("query", own_queries)
        return FitShare(
            queries=queries,
            n_queries=n_queries,
            items=own_items,
            matrix=read.rows(queries),
            # Shards that reach over the start were read: some of their rows belong to earlier queries.
            first_observation=sum(s.rows for s in self.spans if s.last < queries.start) + int(read.indptr[queries.start]),
            n_observed=self.n_observed,
            item_embeddings=items,
            query_embeddings=own_queries,
        )

    def _expected_counts(self) -> npt.NDArray[np.float64]:
        """Observations of each query, (n_queries,), as if each shard's were spread evenly over its queries."""
        change = np.zeros(len(self.query_rows) + 1)
        for span in self.spans:
            per_query = span.rows / (span.last + 1 - span.first)
            change[span.first] += per_query
            change[span.last + 1] -= per_query
        return np.cumsum(change)[:-1]
