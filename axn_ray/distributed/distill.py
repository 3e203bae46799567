"""The distill stage: `embeddings` and `scores` in, out a dual-encoder that has learned from the scores, on Ray Train."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from pydantic import Field
from ray.train.torch import prepare_model

from axn_ray.core.artifact import (
    MANIFEST,
    Manifest,
    check_replaceable,
    hash_file,
    hash_json,
    new_artifact,
    read_manifest,
)
from axn_ray.core.distillation import DistillationConfig, choose_listed, distillation_loss, new_student
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.models import locate_model
from axn_ray.core.score_store import load_scores
from axn_ray.core.train_steps import check_workers, new_optimizer, rows_of_step
from axn_ray.distributed.factorize import find_queries
from axn_ray.distributed.train_steps import MODEL, run_steps, train_steps
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)


class DistillConfig(DistillationConfig):
    """The training and where it runs."""

    workers: int = Field(1, ge=1, description="training processes")
    threads: int = Field(2, ge=1, description="CPU threads of each worker")

    @property
    def distillation(self) -> DistillationConfig:
        """The part that shapes the result."""
        return DistillationConfig(**self.model_dump(include=set(DistillationConfig.model_fields)))


def distill(config: DistillConfig, embeddings: Path, scores: Path, out: Path, storage: Path) -> dict[str, float]:
    """Write the folder `out`, a dual-encoder for `embed` and a sealed artifact of kind `dual_encoder`; returns its counts.

    It starts from the dual-encoder that made `embeddings`. Checkpoints go to `storage`; the same call with the same storage
    goes on where an earlier one stopped.

    Raises:
        ArtifactError: scores of other items or queries than those embedded, or a damaged artifact.
        InputError: scores of no query, or of dev or test queries, or more workers than queries in a step.
        FitError: the loss diverged.
    """
    check_replaceable(out, "dual_encoder")
    corpus, manifest, observed = load_embedded_corpus(embeddings), read_manifest(scores, "scores"), load_scores(scores).matrix
    rows = find_queries(corpus, embeddings, scores, manifest)
    taught = np.flatnonzero(np.diff(observed.indptr) > 1)
    if not len(taught):
        raise InputError(f"{scores} holds no query with two scored items; score more pairs")
    check_workers(config.queries_per_step, len(taught), config.workers)
    made_from = {**manifest.made_from, "scores": hash_file(scores / MANIFEST), "dual_encoder": corpus.dual_encoder}
    logger.info("%d steps of %d queries", config.steps(len(taught)), config.queries_per_step)
    name = locate_model(corpus.dual_encoder)
    loop_config = {
        "config": config.distillation.model_dump(),
        "threads": config.threads,
        "dual_encoder": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "queries": ray.put([corpus.queries.texts[row] for row in rows[taught]]),
        "items": ray.put(corpus.items.full_texts),
        "observed": ray.put(observed.take(taught)),
    }
    run_name = f"distill-{hash_json({**made_from, **config.distillation.model_dump()})[:12]}"
    result = run_steps(_train_loop, loop_config, "distill", run_name, config.workers, storage)
    counts = {"queries": len(taught), **result.metrics}
    described = {**config.model_dump(mode="json"), "dual_encoder": corpus.dual_encoder}
    sealed = Manifest(kind="dual_encoder", config=described, counts=counts, made_from=made_from)
    with result.checkpoint.as_directory() as checkpoint, new_artifact(out, sealed) as folder:
        shutil.copytree(Path(checkpoint) / MODEL, folder, dirs_exist_ok=True)
    return counts


def _train_loop(loop_config: dict[str, Any]) -> None:
    """One worker: its share of each step's queries. What a step sees depends on the seed and the step alone."""
    config = DistillationConfig(**loop_config["config"])
    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    queries, items, observed = ray.get([loop_config[name] for name in ("queries", "items", "observed")])
    torch.manual_seed(config.seed)
    student = new_student(loop_config["dual_encoder"])
    wrapped = prepare_model(student, parallel_strategy_kwargs={"find_unused_parameters": True})  # a pooler, for one
    optimizer, schedule = new_optimizer(student, config.learning_rate, config.steps(len(queries)))

    def loss_of(step: int) -> torch.Tensor:
        step_rows = rows_of_step(step, len(queries), config.queries_per_step, config.seed)
        rows = step_rows[rank::world].tolist()
        texts, scores = [], []
        for row in rows:
            scored, values = observed.row(row)
            chosen = choose_listed(values, config.items_per_query, np.random.default_rng([config.seed, step, row]))
            texts.append([items[item] for item in scored[chosen]])
            scores.append(values[chosen])
        loss = distillation_loss(wrapped, student, [queries[row] for row in rows], texts, scores, config.temperature)
        return loss * (len(rows) / len(step_rows))

    def save(folder: Path) -> None:
        student.save(str(folder))

    train_steps(student, optimizer, schedule, config.steps(len(queries)), loss_of, save, loop_config["queue"])
