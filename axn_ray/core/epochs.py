"""How a fit goes: its epochs with their errors, which is the best, when to stop. Knows no model."""

import logging
import time
from dataclasses import dataclass

import numpy as np

from axn_ray.core.fitting import FactorizationConfig
from axn_ray.errors import FitError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """One pass over the observations: its number from 1, root mean squared errors in scaled units, wall time.

    `sent_bytes` is what this worker sent to others.
    """

    number: int
    train_rmse: float
    held_out_rmse: float
    seconds: float
    sent_bytes: int = 0

    def __str__(self) -> str:
        errors = f"train RMSE {self.train_rmse:.5f}, held-out RMSE {self.held_out_rmse:.5f}"
        return f"epoch {self.number}: {errors}, {self.seconds:.1f} s"


class FitProgress:
    """The epochs of one fit so far, and whether it should go on."""

    def __init__(self, config: FactorizationConfig) -> None:
        self._config, self._started = config, time.monotonic()
        self.epochs: list[Epoch] = []

    @property
    def is_done(self) -> bool:
        """All epochs are run, or the last `patience` of them brought no smaller held-out error."""
        since_best = len(self.epochs) - best_epoch(self.epochs).number if self.epochs else 0
        return len(self.epochs) >= self._config.epochs or since_best >= self._config.patience

    @property
    def is_at_best(self) -> bool:
        """The last epoch is the best so far."""
        return bool(self.epochs) and best_epoch(self.epochs) is self.epochs[-1]

    def start(self) -> int:
        """Start the clock of an epoch; its number."""
        self._started = time.monotonic()
        return len(self.epochs) + 1

    def add(self, train_mse: float, held_out_mse: float, sent_bytes: int = 0) -> Epoch:
        """The epoch that `start` began is over, with these mean squared errors.

        Raises:
            FitError: an error is NaN or infinite.
        """
        number = len(self.epochs) + 1
        errors = float(np.sqrt(train_mse)), float(np.sqrt(held_out_mse))
        if not np.isfinite(errors).all():
            cure = "raise ridge" if self._config.method == "als" else "lower learning_rate"
            now = self._config.ridge if self._config.method == "als" else self._config.learning_rate
            raise FitError(f"the error is {errors[0]} (held out: {errors[1]}) in epoch {number}; {cure}={now}")
        self.epochs.append(Epoch(number, *errors, time.monotonic() - self._started, sent_bytes))
        logger.info("%s, %s", self._config.method, self.epochs[-1])
        return self.epochs[-1]


def best_epoch(epochs: list[Epoch]) -> Epoch:
    """The epoch with the smallest held-out error, the first of equals."""
    return min(epochs, key=lambda epoch: epoch.held_out_rmse)
