"""Trains a cross-encoder adapter on Ray Train from labelled queries; candidates are mined on Ray Data."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from axn_ray.core import cross_encoder_training as training
from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.cross_encoder_training import CrossEncoderTrainingConfig
from axn_ray.distributed.embed import embed_texts
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)


def train_cross_encoder(
    items: Items,
    queries: Queries,
    config: CrossEncoderTrainingConfig,
    out: Path,
    *,
    dual_encoder: str,
    num_workers: int,
    threads: int,
    storage: Path,
) -> dict[str, float]:
    """Write the adapter folder `out`, a sealed artifact of kind `cross_encoder`; returns the last loss and the steps.

    Raises:
        InputError: queries without labels, or a label that is no item.
        FitError: the loss diverged.
    """
    examples = _mine(items, queries, config, dual_encoder, workers=2)
    used = queries.take(examples["queries"])
    logger.info("training on %d queries x %d candidates", len(used), examples["candidates"].shape[1])
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "config": config.model_dump(),
            "threads": threads,
            "queries": ray.put(list(used.texts)),
            "items": ray.put(items.full_texts),
            "candidates": ray.put(examples["candidates"]),
        },
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name=f"cross-encoder-{config.seed}",
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    result = trainer.fit()
    manifest = Manifest(
        kind="cross_encoder",
        config=config.model_dump(),
        counts={"queries": len(used), "loss": float(result.return_value["loss"])},
        made_from={"items": items.fingerprint, "queries": queries.fingerprint},
    )
    with new_artifact(out, manifest) as folder, result.checkpoint.as_directory() as checkpoint:
        for path in (Path(checkpoint) / "adapter").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return dict(result.return_value)


def _mine(items: Items, queries: Queries, config: CrossEncoderTrainingConfig, dual_encoder: str, workers: int) -> dict[str, Any]:
    """Draw the queries that the run needs and their candidates."""
    if queries.labels is None:
        raise InputError(f"{queries.source} has no column 'item_id'; training needs a labelled item per query")
    rng = np.random.default_rng(config.seed)
    needed = min(len(queries), config.steps * config.queries_per_step)
    chosen = np.sort(rng.choice(len(queries), needed, replace=False))
    labels = [queries.labels[r] for r in chosen]
    unknown = next((label for label in labels if label not in items.index_of), None)
    if unknown is not None:
        raise InputError(f"{queries.source}: label {unknown!r} is no item of {items.source}; drop the query or add the item")
    item_embeddings = embed_texts(items.full_texts, dual_encoder, "auto", "items", workers)
    query_embeddings = embed_texts([queries.texts[r] for r in chosen], dual_encoder, "auto", "queries", workers)
    label_index = np.array([items.index_of[label] for label in labels], dtype=np.int32)
    candidates = training.mine_candidates(query_embeddings, item_embeddings, label_index, config, rng)
    return {"queries": chosen, "candidates": candidates}


def _train_loop(loop_config: dict[str, Any]) -> dict[str, float]:
    """One worker: its share of each step's queries; rank 0 keeps the checkpoint."""
    config = CrossEncoderTrainingConfig(**loop_config["config"])
    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    queries, items = ray.get(loop_config["queries"]), ray.get(loop_config["items"])
    candidates = ray.get(loop_config["candidates"])
    model, tokenizer = training.new_adapter(config)
    wrapped = prepare_model(model)
    optimizer, schedule = training.new_optimizer(model, config)
    step = _restore(model, optimizer, schedule)
    order = np.random.default_rng(config.seed + 1)
    steps_per_pass = max(1, len(queries) // config.queries_per_step)
    loss_sum, loss_count = 0.0, 0
    while step < config.steps:
        order = np.random.default_rng([config.seed, step // steps_per_pass]).permutation(len(queries))
        start = (step % steps_per_pass) * config.queries_per_step
        rows = order[start : start + config.queries_per_step][rank::world]
        texts = [[items[i] for i in candidates[r]] for r in rows]
        loss = training.listwise_loss(wrapped, tokenizer, [queries[r] for r in rows], texts, config.max_length)
        training.check_loss(float(loss), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        loss_sum, loss_count = loss_sum + float(loss), loss_count + 1
        if step % 50 == 0 or step == config.steps:
            mean_loss = loss_sum / loss_count
            loss_sum, loss_count = 0.0, 0
            _report(model, tokenizer, optimizer, schedule, step, mean_loss, config, rank)
    return {"loss": mean_loss, "steps": float(step)}


def _report(
    model: Any,
    tokenizer: Any,
    optimizer: Any,
    schedule: Any,
    step: int,
    loss: float,
    config: CrossEncoderTrainingConfig,
    rank: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            adapter = Path(folder) / "adapter"
            adapter.mkdir()
            training.save_adapter(model, tokenizer, adapter, config)
            trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            state = {"model": trained, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step}
            torch.save(state, Path(folder) / "state.pt")
        checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({"step": step, "loss": loss}, checkpoint=checkpoint)


def _restore(model: Any, optimizer: Any, schedule: Any) -> int:
    """Load the newest checkpoint of this run, if there is one; returns the steps done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])
