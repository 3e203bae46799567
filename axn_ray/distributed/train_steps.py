"""A training of so many steps on Ray Train: checkpointed, and taken up again where it was left."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from axn_ray.core.train_steps import check_loss

REPORT_EVERY = 50
MODEL = "model"  # the folder of a checkpoint that holds the model as it will ship


def run_steps(loop: Callable[[dict[str, Any]], None], loop_config: dict[str, Any], name: str, workers: int, storage: Path) -> Any:
    """Run `loop` in so many workers, one GPU each where there are any; the result of Ray Train.

    Checkpoints go to `storage` under `name`; the same ones go on where an earlier call stopped.
    """
    run_config = RunConfig(
        name=name,
        storage_path=str(storage.resolve()),
        failure_config=FailureConfig(max_failures=3),
        checkpoint_config=CheckpointConfig(num_to_keep=1),
    )
    scaling = ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available())
    return TorchTrainer(loop, train_loop_config=loop_config, scaling_config=scaling, run_config=run_config).fit()


def train_steps(
    model: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    steps: int,
    loss_of: Callable[[int], torch.Tensor],
    save: Callable[[Path], None],
) -> None:
    """In a worker: what is left of `steps` steps. `save` writes the model as it will ship; only rank 0 does.

    Raises:
        FitError: the loss is NaN or infinite.
    """
    is_first, losses = ray.train.get_context().get_world_rank() == 0, []
    for step in range(_restore(model, optimizer, schedule), steps):
        loss = loss_of(step)
        losses.append(float(loss.detach()))
        check_loss(losses[-1], step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            metrics = {"step": step + 1, "loss": float(np.mean(losses))}
            losses = []
            with tempfile.TemporaryDirectory() as folder:
                if is_first:
                    (Path(folder) / MODEL).mkdir()
                    save(Path(folder) / MODEL)
                    _save_state(Path(folder), model, optimizer, schedule, step + 1)
                ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if is_first else None)


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
