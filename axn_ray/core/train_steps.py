"""What every training of so many steps shares: the optimizer, which queries a step sees, a check of the loss."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from axn_ray.errors import FitError, InputError


def new_optimizer(model: Any, learning_rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over what is trained, with a linear warm-up over 5 % of the steps and a linear decay to zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def rows_of_step(step: int, n_queries: int, queries_per_step: int, seed: int) -> npt.NDArray[np.int64]:
    """The queries of one step, in passes over all queries, each pass in an order of its own."""
    steps_per_pass = max(1, n_queries // queries_per_step)
    order = np.random.default_rng([seed, step // steps_per_pass]).permutation(n_queries)
    start = (step % steps_per_pass) * queries_per_step
    return order[start : start + queries_per_step]


def check_workers(queries_per_step: int, n_queries: int, workers: int) -> None:
    """Refuse steps in which a worker would have no query.

    Raises:
        InputError: they are too small.
    """
    least = min(queries_per_step, n_queries)
    if least < workers:
        raise InputError(f"a step has {least} queries for {workers} workers; lower workers or raise queries_per_step")


def check_loss(loss: float, step: int) -> None:
    """Stop a diverged run.

    Raises:
        FitError: the loss is NaN or infinite.
    """
    if not np.isfinite(loss):
        raise FitError(f"the loss is {loss} at step {step}; lower learning_rate")
