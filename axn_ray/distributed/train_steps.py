"""A training of so many steps on Ray Train: checkpointed, and taken up again where it was left."""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from axn_ray.core.score_store import lock_folder
from axn_ray.core.train_steps import check_loss
from axn_ray.distributed.cluster import gpus_per_worker
from axn_ray.errors import FitError

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # workers or nodes lost, over a whole training
LOG_EVERY, REPORT_EVERY = 10, 50  # steps
MODEL = "model"  # the folder of a checkpoint that holds the model as it will ship


@contextmanager
def lines_logged(what: str) -> Iterator[Queue]:
    """A queue whose entries, lines of text, the driver logs as they come from the workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not where it could be lost
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def log() -> None:
        for line in iter(queue.get, None):
            logger.info("%s, %s", what, line)

    logger.info("%s: starting the workers", what)
    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def run_steps(
    loop: Callable[[dict[str, Any]], None], loop_config: dict[str, Any], what: str, name: str, workers: int, storage: Path
) -> Any:
    """Run `loop` in so many workers, one GPU each where there are any; the result of Ray Train.

    Checkpoints go to `storage` under `name`; the same ones go on where an earlier call stopped. The loop gets a `queue` beside
    its `loop_config`, whose lines are logged as those of `what`.

    Raises:
        ArtifactError: another process runs the same training.
        FitError: the loss diverged, or see `run_training`.
    """
    run_config = RunConfig(
        name=name,
        storage_path=str(storage.resolve()),
        failure_config=FailureConfig(max_failures=MAX_FAILURES),
        checkpoint_config=CheckpointConfig(num_to_keep=1),
    )
    scaling = ScalingConfig(num_workers=workers, use_gpu=bool(gpus_per_worker()))
    with lock_folder(storage.resolve() / name), lines_logged(what) as queue:
        given = {**loop_config, "queue": queue}
        guarded = partial(_say_what_failed, loop)
        return run_training(TorchTrainer(guarded, train_loop_config=given, scaling_config=scaling, run_config=run_config))


def run_training(trainer: TorchTrainer) -> Any:
    """The result of Ray Train.

    Raises:
        FitError: what the loop returned, which would go wrong again on a retry; or more workers than may be were lost.
    """
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        cure = "see why, then run the same again: it goes on from its last checkpoint"
        raise FitError(f"training ended after {MAX_FAILURES + 1} failures, the last one: {reason}; {cure}") from error
    if result.return_value is not None:
        raise FitError(result.return_value)
    return result


def _say_what_failed(loop: Callable[[dict[str, Any]], None], loop_config: dict[str, Any]) -> str | None:
    """A diverged fit diverges again: it is an answer, not a failure that Ray Train would try three times more."""
    try:
        loop(loop_config)
    except FitError as error:
        return str(error)
    return None


def train_steps(
    model: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    steps: int,
    loss_of: Callable[[int], torch.Tensor],
    save: Callable[[Path], None],
    queue: Queue,
) -> None:
    """In a worker: what is left of `steps` steps. `save` writes the model as it will ship; only rank 0 does, and fills `queue`.

    `loss_of` is the mean over the worker's own queries times their share of the step's, so that the workers' sum is the step's.

    Raises:
        FitError: the loss is NaN or infinite.
    """
    context = ray.train.get_context()
    is_first, world, losses = context.get_world_rank() == 0, context.get_world_size(), []
    for step in range(_restore(model, optimizer, schedule), steps):
        loss = loss_of(step)
        losses.append(_sum_over_workers(loss.detach()))
        check_loss(losses[-1], step)
        optimizer.zero_grad()
        (loss * world).backward()  # DDP takes the mean of the workers' gradients
        optimizer.step()
        schedule.step()
        if is_first and ((step + 1) % LOG_EVERY == 0 or step + 1 == steps):
            queue.put(f"step {step + 1} of {steps}, loss {np.mean(losses[-LOG_EVERY:]):.4f}")
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            metrics = {"step": step + 1, "loss": float(np.mean(losses))}
            losses = []
            with tempfile.TemporaryDirectory() as folder:
                if is_first:
                    (Path(folder) / MODEL).mkdir()
                    save(Path(folder) / MODEL)
                    _save_state(Path(folder), model, optimizer, schedule, step + 1)
                ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if is_first else None)


def _sum_over_workers(loss: torch.Tensor) -> float:
    """All workers see the same, so that all of them stop at a loss that is none."""
    total = loss.clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return float(total)


def _save_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> None:
    """The exact state to go on from."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"model": trained, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step}
    torch.save(state, folder / "state.pt")


def _restore(model: Any, optimizer: torch.optim.Optimizer, schedule: Any) -> int:
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
