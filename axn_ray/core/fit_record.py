"""How a fit went, and whether it is worth having. Knows no model."""

import logging
from dataclasses import dataclass

import numpy as np

from axn_ray.core.epochs import Epoch, best_epoch
from axn_ray.core.fitting import FactorizationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitRecord:
    """How a fit went: epochs run, the best one's number, and held-out RMSE there and of the dual-encoder's embeddings."""

    epochs: int
    best_epoch: int
    held_out_rmse: float
    start_rmse: float


def record_fit(epochs: list[Epoch], start_rmse: float, config: FactorizationConfig) -> FitRecord:
    """How a fit by epochs went; warns when it is worse than no fit."""
    chosen = best_epoch(epochs)
    record = FitRecord(len(epochs), chosen.number, chosen.held_out_rmse, start_rmse)
    judge_fit(
        record, cure=f"raise ridge={config.ridge}" if config.method == "als" else f"change learning_rate={config.learning_rate}"
    )
    return record


def judge_fit(record: FitRecord, cure: str, of_one_score: float = np.inf) -> None:
    """Say how good the fit is; loudly when it is worse than no fit, or than one score for all (`of_one_score`, its RMSE)."""
    both = record.held_out_rmse, record.start_rmse
    if record.held_out_rmse >= record.start_rmse:
        logger.warning("THE FIT IS WORSE THAN NONE: held-out RMSE %.5f, the dual-encoder's is %.5f; %s", *both, cure)
    elif record.held_out_rmse >= of_one_score:
        said = record.held_out_rmse, of_one_score, cure
        logger.warning("THE FIT IS WORSE THAN NONE: held-out RMSE %.5f, that of one score for all is %.5f; %s", *said)
    else:
        logger.info("held-out RMSE %.5f after epoch %d, the dual-encoder's is %.5f", both[0], record.best_epoch, both[1])
