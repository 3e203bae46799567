"""Searches many queries on Ray Data, each worker with a searcher of its own, and writes their rankings as a TREC run."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch

from axn_ray.core.corpus import Queries
from axn_ray.core.cross_encoder_config import with_whole_path
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.score_formats import find_blank, format_trec_lines, write_stream_atomically
from axn_ray.core.searcher import SearchConfig, Searcher
from axn_ray.distributed.cluster import gpus_per_worker, split_evenly
from axn_ray.distributed.progress import track
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)

SHARD_QUERIES = 16
TAG = "axn-ray"


class _SearchActor:
    """One searcher in one process; searches a range of queries at a time.

    It is opened with the first: an actor that fails to start would be started again and again.
    """

    def __init__(self, embeddings: Path, factorization: Path, config: SearchConfig, queries: Queries, threads: int) -> None:
        torch.set_num_threads(threads)
        self._open = lambda: Searcher(load_embedded_corpus(embeddings), factorization, config)
        self._searcher: Searcher | None = None
        self._queries = queries

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._searcher = self._searcher or self._open()
        lines, n_failed = [], 0
        for row in range(int(batch["start"][0]), int(batch["stop"][0])):
            result = self._searcher.search(self._queries.texts[row])
            hits, n_failed = self._searcher.hits(result), n_failed + result.n_failed
            scores = np.array([hit.score for hit in hits], dtype=np.float32)
            lines.append(format_trec_lines(self._queries.ids[row], [hit.item_id for hit in hits], scores, TAG))
        return {"start": batch["start"], "lines": np.array([b"".join(lines)], dtype=object), "n_failed": [n_failed]}


def search_queries(
    queries: Queries, embeddings: Path, factorization: Path, config: SearchConfig, out: Path, *, workers: int, threads: int
) -> None:
    """Write the `top_k` of every query to the TREC run `out`, queries in their order; the file appears when it is whole.

    Raises:
        ArtifactError: the factorization was made from other items than the corpus.
        InputError: an id that a run cannot hold; see `axn_ray.core.adaptive.search`.
        ModelError: a model cannot be loaded or fails.
    """
    for side, ids in (("query", queries.ids), ("item", load_embedded_corpus(embeddings).items.ids)):
        if (blank := find_blank(ids)) is not None:
            raise InputError(f"{side} id {blank!r} is empty or has a blank, which a TREC run cannot hold; rename it")
    # Workers may run in another working directory.
    config = with_whole_path(config)
    stores = [name if "://" in name else str(Path(name).resolve()) for name in config.known_scores]
    config = config.model_copy(update={"known_scores": stores})
    ranges = split_evenly(len(queries), SHARD_QUERIES)
    shards = ray.data.from_items([{"start": r.start, "stop": r.stop} for r in ranges], override_num_blocks=len(ranges))
    searched = shards.map_batches(
        _SearchActor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(ranges))),
        num_gpus=gpus_per_worker(),
        fn_constructor_args=(embeddings.resolve(), factorization.resolve(), config, queries, threads),
    )
    lines: dict[int, bytes] = {}
    n_failed = 0
    batches = searched.iter_batches(batch_size=None, batch_format="numpy")
    for batch in track(batches, total=len(ranges), description="search", size=lambda b: len(b["start"])):
        lines.update(zip(batch["start"].tolist(), batch["lines"].tolist(), strict=True))
        n_failed += int(batch["n_failed"].sum())
    with write_stream_atomically(out) as stream:
        for start in sorted(lines):
            stream.write(lines[start])
    if n_failed:
        logger.warning("%d CE calls were for items that could not be scored; these are in no ranking", n_failed)
    logger.info("searched %d queries with %d CE calls each into %s", len(queries), config.budget, out)
