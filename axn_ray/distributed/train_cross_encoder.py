"""Trains a cross-encoder adapter on Ray Train from labelled queries; candidates are mined with Ray Data's embeddings."""

import hashlib
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from pydantic import Field
from ray.train.torch import prepare_model

from axn_ray import sample
from axn_ray.core import cross_encoder_training as training
from axn_ray.core.artifact import Manifest, check_replaceable, hash_json, new_artifact
from axn_ray.core.corpus import Items, Queries, read_items, read_queries
from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.cross_encoder_training import CrossEncoderTrainingConfig
from axn_ray.core.embedded_corpus import read_splits
from axn_ray.core.models import MINILM
from axn_ray.core.tokens import Int32Array
from axn_ray.core.train_steps import check_workers, new_optimizer, rows_of_step
from axn_ray.distributed.embed import embed_texts
from axn_ray.distributed.train_steps import MODEL, run_steps, train_steps
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)


class TrainCrossEncoderConfig(CrossEncoderTrainingConfig):
    """The training, its labelled pairs, and where it runs."""

    items: Path = Field(sample.ITEMS, description="items: Parquet, JSONL or TSV with item_id, text[, title, world]")
    queries: Path = Field(sample.QUERIES, description="labelled queries: query_id, text, item_id[, world, split]")
    world: list[str] = Field([], description="train on these worlds; default: all")
    check_world: list[str] = Field([], description="after training, pick the labelled item in these held-out worlds")
    check_queries: int = Field(1000, ge=1, description="queries of that check")
    dual_encoder: str = Field(MINILM, description="mines the hard negatives")
    workers: int = Field(1, ge=1, description="training processes")
    threads: int = Field(2, ge=1, description="CPU threads of each worker")

    @property
    def training(self) -> CrossEncoderTrainingConfig:
        """The part that shapes the result."""
        return CrossEncoderTrainingConfig(**self.model_dump(include=set(CrossEncoderTrainingConfig.model_fields)))


@dataclass(frozen=True)
class _Examples:
    """Labelled queries with their candidates: `candidates (n, width)` item indices, the label first."""

    items: Items
    queries: Queries
    candidates: Int32Array


def train_cross_encoder(config: TrainCrossEncoderConfig, out: Path, storage: Path) -> dict[str, float]:
    """Write the adapter folder `out`, a sealed artifact of kind `cross_encoder`; returns its counts.

    Checkpoints go to `storage`; the same call with the same storage goes on where an earlier one stopped.

    Raises:
        InputError: queries without labels, a label that is no item, or more workers than queries in a step.
        FitError: the loss diverged.
    """
    check_replaceable(out, "cross_encoder")
    needed = config.steps * config.queries_per_step
    examples = _mine(config, config.world, "train", needed)
    check_workers(config.queries_per_step, len(examples.queries), config.workers)
    logger.info("training on %d queries x %d candidates", *examples.candidates.shape)
    candidates = hashlib.sha256(examples.candidates.tobytes()).hexdigest()  # by labels and dual-encoder, too
    made_from = {"items": examples.items.fingerprint, "queries": examples.queries.fingerprint, "candidates": candidates}
    loop_config = {
        "config": config.training.model_dump(),
        "threads": config.threads,
        "queries": ray.put(examples.queries.texts),
        "items": ray.put(examples.items.full_texts),
        "candidates": ray.put(examples.candidates),
    }
    name = f"cross-encoder-{hash_json({**made_from, **config.training.model_dump()})[:12]}"
    result = run_steps(_train_loop, loop_config, "cross-encoder", name, config.workers, storage)
    counts = {"queries": len(examples.queries), **result.metrics}
    with tempfile.TemporaryDirectory() as kept, result.checkpoint.as_directory() as checkpoint:
        adapter = Path(kept) / "adapter"
        shutil.copytree(Path(checkpoint) / MODEL, adapter)
        if config.check_world:
            counts["pick_accuracy"] = _check(config, adapter)
            logger.info("picks the labelled item among %d for %.3f of held-out queries", examples.candidates.shape[1],
                        counts["pick_accuracy"])  # fmt: skip
        described = config.model_dump(mode="json", exclude={"items", "queries"})
        with new_artifact(out, Manifest(kind="cross_encoder", config=described, counts=counts, made_from=made_from)) as folder:
            shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return counts


def _mine(config: TrainCrossEncoderConfig, world: list[str], split: str | None, needed: int) -> _Examples:
    """Draw up to `needed` labelled queries (of one split, where the file has splits) and mine their candidates."""
    items, queries = read_items(config.items, world), read_queries(config.queries, world)
    splits = read_splits(config.queries, queries)
    if split is not None and splits is not None:
        queries = queries.take([row for row, own in enumerate(splits) if own == split])
    if queries.labels is None:
        raise InputError(f"{queries.source} has no column 'item_id'; training needs a labelled item per query")
    rng = np.random.default_rng(config.seed)
    used = queries.take(np.sort(rng.permutation(len(queries))[:needed]).tolist())
    labels = used.labels or ()
    unknown = next((label for label in labels if label not in items.index_of), None)
    if unknown is not None:
        raise InputError(f"label {unknown!r} is no item of {items.source}; drop the query or add the item")
    item_embeddings, query_embeddings = embed_texts(items.full_texts, used.texts, config.dual_encoder, "auto", workers=2)
    label_index = np.array([items.index_of[label] for label in labels], dtype=np.int32)
    candidates = training.mine_candidates(query_embeddings, item_embeddings, label_index, config, rng)
    return _Examples(items, used, candidates)


def _check(config: TrainCrossEncoderConfig, adapter: Path) -> float:
    """Share of held-out queries whose labelled item scores above its mined candidates."""
    held_out = _mine(config, config.check_world, None, config.check_queries)
    cross_encoder = CrossEncoder(CrossEncoderConfig(cross_encoder=str(adapter)))
    rows = np.repeat(np.arange(len(held_out.queries), dtype=np.int32), held_out.candidates.shape[1])
    scores = cross_encoder.score(
        cross_encoder.tokenize_queries(held_out.queries.texts),
        cross_encoder.tokenize(held_out.items.full_texts),
        rows,
        held_out.candidates.ravel(),
    )
    return training.pick_accuracy(scores.reshape(held_out.candidates.shape))


def _train_loop(loop_config: dict[str, Any]) -> None:
    """One worker: its share of each step's queries. The order of queries depends on the seed and the step alone."""
    config = CrossEncoderTrainingConfig(**loop_config["config"])
    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    queries, items, candidates = ray.get([loop_config[name] for name in ("queries", "items", "candidates")])
    model, tokenizer = training.new_adapter(config)
    wrapped = prepare_model(model)
    optimizer, schedule = new_optimizer(model, config.learning_rate, config.steps)

    def loss_of(step: int) -> torch.Tensor:
        step_rows = rows_of_step(step, len(queries), config.queries_per_step, config.seed)
        rows = step_rows[rank::world]
        texts = [[items[i] for i in candidates[r]] for r in rows]
        loss = training.listwise_loss(wrapped, tokenizer, [queries[r] for r in rows], texts, config.max_length)
        return loss * (len(rows) / len(step_rows))

    def save(folder: Path) -> None:
        training.save_adapter(model, tokenizer, folder, config)

    train_steps(model, optimizer, schedule, config.steps, loss_of, save, loop_config["queue"])
