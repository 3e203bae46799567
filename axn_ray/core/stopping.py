"""When a search may stop: which share of the CE's top k has been scored, by the posterior. Knows no CE and no loop.

The forecast takes what was scored as exact and what was not as Gaussian; a calibration, fitted to searches whose exact
top k is known (`make bench-stop`), turns it into the recall that was then reached.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit, ndtr

from axn_ray.core.estimators import Float64Array, Ridge
from axn_ray.core.score_matrix import FloatArray
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

HEAD = 1000  # unscored items that the forecast looks at, those of the highest posterior mean
BISECTIONS = 50
TINY = 1e-6  # forecasts are kept this far from 0 and 1


@dataclass(frozen=True)
class Calibration:
    """Achieved recall from the forecast: `logit(recall) = offset + slope * logit(forecast)`.

    The forecast is made with `shrinkage` times the posterior's standard deviations.
    """

    offset: float = 0.0
    slope: float = 1.0
    shrinkage: float = 1.0

    @classmethod
    def fit(cls, forecast: Float64Array, achieved: Float64Array, shrinkage: float = 1.0) -> "Calibration":
        """Logistic regression of achieved recalls on forecasts that were made with this shrinkage, (n,) and (n,), in 0..1.

        Raises:
            InputError: lengths that differ, none at all, or values outside 0..1.
        """
        if forecast.shape != achieved.shape or not forecast.size:
            raise InputError(f"{forecast.shape} forecasts for {achieved.shape} recalls; give one for each, at least one")
        if min(forecast.min(), achieved.min()) < 0.0 or max(forecast.max(), achieved.max()) > 1.0:
            raise InputError("forecasts and recalls must lie in 0..1; divide them by k")
        x = logit(np.clip(forecast, TINY, 1.0 - TINY))

        def loss(line: Float64Array) -> float:
            z = line[0] + line[1] * x
            return -float((achieved * log_expit(z) + (1.0 - achieved) * log_expit(-z)).mean())

        offset, slope = minimize(loss, np.array([0.0, 1.0])).x
        return cls(float(offset), float(slope), shrinkage)

    def apply(self, forecast: float) -> float:
        """The recall to expect where the posterior forecasts this one."""
        return float(expit(self.offset + self.slope * logit(np.clip(forecast, TINY, 1.0 - TINY))))


# Fitted to the sample's 50 dev queries, k = 1, 10, 100, after 40 to 500 scores: see docs/method-notes.md.
SAMPLE = Calibration(offset=-0.02, slope=0.36, shrinkage=0.7)


@dataclass(frozen=True)
class Stop:
    """Stop as soon as the recall to expect of the CE's top `k` reaches `target_recall`.

    Raises:
        InputError: a target outside 0..1, both excluded, or a k below 1.
    """

    target_recall: float
    k: int
    calibration: Calibration = SAMPLE

    def __post_init__(self) -> None:
        if not 0.0 < self.target_recall < 1.0:
            raise InputError(f"target_recall={self.target_recall} must lie between 0 and 1; without one the budget is spent")
        if self.k < 1:
            raise InputError(f"k={self.k} must be at least 1")

    def is_reached(self, posterior: Ridge, scores: FloatArray, head: Int32Array, approx_scores: FloatArray) -> bool:
        """Whether a search with these raw scores (m,) may stop, given the head (h,) of the unscored items and their means."""
        if len(scores) < self.k:
            return False
        return self.calibration.apply(self.forecast(posterior, scores, head, approx_scores)) >= self.target_recall

    def forecast(self, posterior: Ridge, scores: FloatArray, head: Int32Array, approx_scores: FloatArray) -> float:
        """The posterior's own estimate of the recall, of k or more raw scores (m,)."""
        # The noise is left out: most of it is what a compressed index does not see, and no item's chance to be high.
        deviations = self.calibration.shrinkage * np.sqrt(posterior.variance(head))
        return forecast_recall(posterior.scale.scale(scores), approx_scores, np.maximum(deviations, TINY), self.k)


def forecast_recall(
    scores: npt.NDArray[np.floating], means: npt.NDArray[np.floating], deviations: npt.NDArray[np.floating], k: int
) -> float:
    """Share of the top k that is among the scored: scores (m,), m >= k; unscored `N(means, deviations²)`, (h,) each.

    The k-th highest score t is where `#{scores >= t} + sum_i P(y_i >= t) = k`; of the k items above it, the sum's are missing.
    """
    low = float(np.sort(scores)[-k])  # k scored items lie at or above it, so t does, too
    high = max(float(scores.max()), float((means + 10.0 * deviations).max(initial=low)))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = np.count_nonzero(scores >= middle) + ndtr((means - middle) / deviations).sum()
        low, high = (middle, high) if above >= k else (low, middle)
    return max(0.0, 1.0 - float(ndtr((means - low) / deviations).sum()) / k)
