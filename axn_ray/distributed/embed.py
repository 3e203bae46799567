"""Embeds items and queries with a dual-encoder on Ray Data and freezes them as an `embeddings` artifact."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pydantic import BaseModel, ConfigDict, Field

from axn_ray import sample
from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus import read_items, read_queries
from axn_ray.core.dual_encoder import DualEncoder, FloatArray
from axn_ray.core.embedded_corpus import (
    EmbeddedCorpus,
    assign_splits,
    choose_queries,
    load_embedded_corpus,
    read_splits,
    save_embedded_corpus,
)
from axn_ray.core.models import MINILM, Dtype
from axn_ray.distributed.cluster import gpus_per_worker, split_evenly
from axn_ray.distributed.progress import track

logger = logging.getLogger(__name__)


class EmbedConfig(BaseModel):
    """Which corpus, which of its queries, and which dual-encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: Path = Field(sample.ITEMS, description="items: Parquet, JSONL or TSV with item_id, text[, title, world]")
    queries: Path = Field(sample.QUERIES, description="queries: Parquet, JSONL or TSV with query_id, text[, item_id, split]")
    world: list[str] = Field([], description="keep only these worlds (`verb` takes in `verb.motion`)")
    train_queries: int | None = Field(None, ge=1, description="train queries to draw; default: all of them")
    dev_queries: int = Field(50, ge=0, description="held out for choices, where the file has no split column")
    test_queries: int = Field(100, ge=1, description="held out for the test, where the file has no split column")
    dual_encoder: str = Field(MINILM, description="Hugging Face id or local folder")
    dtype: Dtype = "auto"
    workers: int = Field(2, ge=1, description="processes that hold the dual-encoder")
    seed: int = Field(0, ge=0)


class _EmbedActor:
    """One dual-encoder in one process; embeds a range of items or queries at a time."""

    def __init__(self, name: str, dtype: Dtype, texts: list[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        model = DualEncoder(name, dtype)
        self._embed = model.embed_items, model.embed_queries
        self._texts: list[Sequence[str]] = ray.get(texts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        side, rows = int(batch["side"][0]), range(int(batch["start"][0]), int(batch["stop"][0]))
        embeddings = self._embed[side]([self._texts[side][row] for row in rows])
        return {"side": np.full(len(rows), side), "row": np.arange(rows.start, rows.stop), "embedding": embeddings}


def _read_dim(name: str, dtype: Dtype) -> int:
    """The model's dimension; it is loaded once where the actors will be: one that fails to start is started again and again."""
    return DualEncoder(name, dtype).embed_queries(["a"]).shape[1]


def embed_texts(
    items: Sequence[str],
    queries: Sequence[str],
    name: str,
    dtype: Dtype,
    workers: int,
    shard_rows: int = 1024,
    threads: int = 1,
) -> tuple[FloatArray, FloatArray]:
    """Texts of items (n) and of queries (m) -> (n, dim) and (m, dim) float32, in order.

    Up to `workers` processes share the work, one for each `shard_rows` texts: it takes longer to start than to embed fewer.
    """
    gpus, sides = gpus_per_worker(), (list(items), list(queries))
    n_texts = len(items) + len(queries)
    dim = ray.get(ray.remote(num_gpus=gpus)(_read_dim).remote(name, dtype))
    ranges = [
        {"side": side, "start": r.start, "stop": r.stop}
        for side in (1, 0)  # the queries first: what ends the pass is one of many shards of items
        for r in split_evenly(len(sides[side]), shard_rows)
    ]
    embedded = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(
        _EmbedActor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, -(-n_texts // shard_rows))),
        num_gpus=gpus,
        fn_constructor_kwargs={
            "name": name,
            "dtype": dtype,
            "texts": [ray.put(texts) for texts in sides],  # in a list, so that Ray hands over references and not values
            "threads": threads,
        },
    )
    embeddings = tuple(np.empty((len(texts), dim), dtype=np.float32) for texts in sides)
    batches = embedded.iter_batches(batch_size=None, batch_format="numpy")
    for batch in track(batches, total=n_texts, description="embed items and queries", size=lambda b: len(b["row"])):
        for side, found in enumerate(embeddings):
            chosen = batch["side"] == side
            found[batch["row"][chosen]] = batch["embedding"][chosen]
    return embeddings[0], embeddings[1]


def embed(config: EmbedConfig, out: Path) -> EmbeddedCorpus:
    """Write the `embeddings` artifact `out`.

    Raises:
        InputError: see `read_items`, `read_queries`, `choose_queries`.
        ModelError: the dual-encoder cannot be loaded.
    """
    if Path(config.dual_encoder).is_dir():  # it is to be found from anywhere
        config = config.model_copy(update={"dual_encoder": str(Path(config.dual_encoder).resolve())})
    items = read_items(config.items, config.world)
    queries = read_queries(config.queries, config.world)
    splits = read_splits(config.queries, queries) or assign_splits(queries, config.dev_queries, config.test_queries)
    kept = choose_queries(splits, config.train_queries, np.random.default_rng(config.seed))
    queries = queries.take(kept)
    manifest = Manifest(
        kind="embeddings",
        config=config.model_dump(mode="json"),
        counts={"items": len(items), "queries": len(queries)},
        made_from={"items": items.fingerprint, "queries": queries.fingerprint},
    )
    with new_artifact(out, manifest) as folder:
        texts = items.full_texts, queries.texts
        item_embeddings, query_embeddings = embed_texts(*texts, config.dual_encoder, config.dtype, config.workers)
        corpus = EmbeddedCorpus(
            items=items,
            queries=queries,
            splits=tuple(splits[row] for row in kept),
            item_embeddings=item_embeddings,
            query_embeddings=query_embeddings,
            dual_encoder=config.dual_encoder,
        )
        save_embedded_corpus(folder, corpus)
    logger.info("embedded %d items and %d queries into %s", len(items), len(queries), out)
    return load_embedded_corpus(out)
