"""The fit of a factorization, epoch by epoch: what is held out, which observations make a step, when to stop.

`Fit` is one worker's part; with one worker it is the whole. Knows no file and no Ray.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.core.towers import Alone, FreeEmbeddings, GatedTowers, Rows, State, Workers
from axn_ray.errors import FitError, InputError

logger = logging.getLogger(__name__)

BLOCK = 1 << 16
METHOD_DEFAULTS = {"mf_trns": {"epochs": 10}, "bayes": {"epochs": 6}}


class FactorizationConfig(BaseModel):
    """How to fit. The defaults are those of mf_ind; where other methods differ, `METHOD_DEFAULTS` holds theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["mf_ind", "mf_trns", "bayes"] = Field(
        "mf_ind", description="towers over frozen embeddings, free embeddings, or the closed-form fit"
    )
    epochs: int = Field(12, ge=1, description="passes over the observations, at most; mf_trns: 10, bayes: 6")
    learning_rate: float = Field(1e-3, gt=0, description="of the gradient methods (mf_ind, mf_trns)")
    batch_size: int = Field(2048, ge=1, description="observations per step of the gradient methods, over all workers")
    validation_share: float = Field(0.05, gt=0, le=0.5, description="of the observations, held out to choose the best epoch")
    patience: int = Field(3, ge=1, description="stop after this many epochs without a smaller held-out error")
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_of_the_method(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("method") in METHOD_DEFAULTS:
            return {**METHOD_DEFAULTS[given["method"]], **given}
        return given


@dataclass(frozen=True)
class FitInputs:
    """What a fit starts from: `item_embeddings (n_items, dim)`, `query_embeddings (n_queries, dim)` of the dual-encoder.

    Raises:
        InputError: fewer than two observations, arrays that do not fit together, or a NaN or infinite value.
    """

    score_matrix: ScoreMatrix
    item_embeddings: FloatArray
    query_embeddings: FloatArray

    def __post_init__(self) -> None:
        matrix = self.score_matrix
        if matrix.n_observed < 2:
            raise InputError(f"{matrix.n_observed} observed scores are too few to factorize; score at least 2 pairs")
        if not np.isfinite(matrix.scores).all():
            raise InputError("the score matrix holds NaN or infinite scores; score those pairs again")
        _check_embeddings("item", self.item_embeddings, matrix.n_items)
        _check_embeddings("query", self.query_embeddings, matrix.n_queries)
        if self.item_embeddings.shape[1] != self.query_embeddings.shape[1]:
            dims = f"{self.item_embeddings.shape[1]} and {self.query_embeddings.shape[1]}"
            raise InputError(f"item and query embeddings have {dims} dimensions; take both from one dual-encoder")

    def fit_scale(self) -> ScoreScale:
        """The scale that brings the observed CE scores to the range of the dual-encoder's."""
        every = np.arange(self.score_matrix.n_observed)
        return ScoreScale.fit(self.score_matrix.scores, self.approx_scores(every))

    def approx_scores(self, observations: Rows) -> FloatArray:
        """Inner products of the dual-encoder's embeddings for these observations: (n,) -> (n,)."""
        queries, items = self.score_matrix.query_index, self.score_matrix.item_index
        scores = np.empty(len(observations), dtype=np.float32)
        for start in range(0, len(observations), BLOCK):
            block = observations[start : start + BLOCK]
            u, v = self.query_embeddings[queries[block]], self.item_embeddings[items[block]]
            scores[start : start + BLOCK] = np.einsum("nd,nd->n", u, v)
        return scores

    def held_out(self, config: FactorizationConfig) -> npt.NDArray[np.bool_]:
        """Which observations are held out, (n_observed,): a share drawn by the seed alone, at least one."""
        n_observed = self.score_matrix.n_observed
        drawn = np.random.default_rng([config.seed, 0]).permutation(n_observed)
        held_out = np.zeros(n_observed, dtype=np.bool_)
        held_out[drawn[: max(1, round(config.validation_share * n_observed))]] = True
        return held_out

    def start_rmse(self, config: FactorizationConfig, scale: ScoreScale) -> float:
        """Held-out error of the dual-encoder's embeddings themselves, in scaled units."""
        rows = np.flatnonzero(self.held_out(config))
        errors = self.approx_scores(rows) - scale.scale(self.score_matrix.scores[rows])
        return float(np.sqrt(np.mean(np.square(errors, dtype=np.float64))))


def _check_embeddings(side: str, embeddings: FloatArray, rows: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) != rows or embeddings.dtype != np.float32:
        raise InputError(
            f"{side} embeddings are {embeddings.dtype} {embeddings.shape}, the score matrix needs float32 ({rows}, dim); "
            "give the dual-encoder's embeddings of exactly its rows"
        )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise InputError(f"{len(bad)} {side} embeddings are NaN or infinite (first: row {bad[0]}); embed them again")


def share_queries(score_matrix: ScoreMatrix, workers: int) -> list[range]:
    """One contiguous range of queries per worker, with about equally many observations in each."""
    marks = np.linspace(0, score_matrix.n_observed, workers + 1)[1:-1]
    bounds = [0, *np.searchsorted(score_matrix.indptr, marks).tolist(), score_matrix.n_queries]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class Epoch:
    """One pass over the observations: its number from 1, root mean squared errors in scaled units, wall time."""

    number: int
    train_rmse: float
    held_out_rmse: float
    seconds: float

    def __str__(self) -> str:
        errors = f"train RMSE {self.train_rmse:.5f}, held-out RMSE {self.held_out_rmse:.5f}"
        return f"epoch {self.number}: {errors}, {self.seconds:.1f} s"


class Fit:
    """One worker's part of a fit: the observations of its `queries`, a range of rows.

    The order of observations depends on seed and epoch alone. A step takes the next `batch_size` of them, each worker
    those of its own queries, and gradients are summed over workers before they are applied: any number of workers takes
    the same steps, up to the order of floating-point sums. The order costs every worker 8 bytes per observation.
    """

    def __init__(
        self,
        inputs: FitInputs,
        scale: ScoreScale,
        config: FactorizationConfig,
        queries: range | None = None,
        workers: Workers | None = None,
    ) -> None:
        matrix = inputs.score_matrix
        self._config, self._workers = config, workers or Alone()
        self._queries = queries if queries is not None else range(matrix.n_queries)
        start, stop = self._queries.start, self._queries.stop
        self._span = int(matrix.indptr[start]), int(matrix.indptr[stop])
        mine = slice(*self._span)
        self._observed = (
            np.repeat(np.arange(len(self._queries)), np.diff(matrix.indptr[start : stop + 1])),
            matrix.item_index[mine].astype(np.int64),
            scale.scale(matrix.scores[mine]),
        )
        held_out = inputs.held_out(config)
        self._train, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._model = new_model(config, inputs.item_embeddings, inputs.query_embeddings[start:stop]).to(self._workers.device)
        self._shared = self._model.share(self._workers)
        self._optimizer = self._model.new_optimizer(config.learning_rate)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}

    @property
    def is_done(self) -> bool:
        """All epochs are run, or the last `patience` of them brought no smaller held-out error."""
        since_best = len(self.epochs) - best_epoch(self.epochs).number if self.epochs else 0
        return len(self.epochs) >= self._config.epochs or since_best >= self._config.patience

    def run_epoch(self) -> Epoch:
        """Run one epoch and keep its parameters if it is the best so far.

        Raises:
            FitError: the error is NaN or infinite; every worker raises it after the same epoch.
        """
        started, number = time.monotonic(), len(self.epochs) + 1
        order = np.random.default_rng([self._config.seed, number]).permutation(self._train)
        squared = torch.zeros(2, dtype=torch.float64, device=self._workers.device)
        for step in _cut(order, self._config.batch_size):
            squared[0] += self._step(self._mine(step), len(step))
        with torch.no_grad():
            for rows in _cut(self._mine(self._held_out), BLOCK):
                squared[1] += _squared(self._errors(self._model, rows))
        total = self._workers.gather(squared[None]).sum(dim=0).tolist()
        train_rmse, held_out_rmse = np.sqrt(np.array(total) / [len(self._train), len(self._held_out)]).tolist()
        if not np.isfinite([train_rmse, held_out_rmse]).all():
            rate = self._config.learning_rate
            raise FitError(f"the error is {train_rmse} (held out: {held_out_rmse}) in epoch {number}; lower learning_rate={rate}")
        self.epochs.append(Epoch(number, train_rmse, held_out_rmse, time.monotonic() - started))
        if best_epoch(self.epochs).number == number:
            self.best = self._model.fitted_state()
        logger.info("%s", self.epochs[-1])
        return self.epochs[-1]

    def _step(self, rows: Rows, n_observations: int) -> Tensor:
        """One gradient step on the mean squared error; `rows` (n,) are this worker's among `n_observations`."""
        errors = self._errors(self._shared, rows)
        self._optimizer.zero_grad()
        (errors.square().sum() / n_observations).backward()
        self._model.sum_gradients(self._workers)
        self._optimizer.step()
        return _squared(errors.detach())

    def _errors(self, model: nn.Module, rows: Rows) -> Tensor:
        """`u_q · v_i - y` for rows (n,) of this worker's observations; a query or item is embedded once."""
        queries, items, targets = (part[rows] for part in self._observed)
        unique_queries, query_at = np.unique(queries, return_inverse=True)
        unique_items, item_at = np.unique(items, return_inverse=True)
        u, v = model(unique_queries, unique_items)
        at_query, at_item, y = (torch.from_numpy(part).to(u.device) for part in (query_at, item_at, targets))
        return (u.index_select(0, at_query) * v.index_select(0, at_item)).sum(dim=1) - y

    def _mine(self, observations: Rows) -> Rows:
        """Of these observations those that this worker holds, as rows of its own."""
        start, stop = self._span
        return observations[(observations >= start) & (observations < stop)] - start

    def state_dict(self) -> State:
        """All that the fit needs to go on, with any number of workers. Every worker calls it, since rows are gathered."""
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        epochs = [asdict(epoch) for epoch in self.epochs]
        return {**self._model.map_query_rows(state, self._workers.gather), "best": self.best, "epochs": epochs}

    def load_state_dict(self, state: State) -> None:
        """Go on from `state`."""
        mine = slice(self._queries.start, self._queries.stop)
        own = self._model.map_query_rows(state, lambda rows: rows[mine])
        self._model.load_state_dict(own["model"])
        self._optimizer.load_state_dict(own["optimizer"])
        self.best, self.epochs = state["best"], [Epoch(**epoch) for epoch in state["epochs"]]


def new_model(
    config: FactorizationConfig, item_embeddings: FloatArray, query_embeddings: FloatArray
) -> GatedTowers | FreeEmbeddings:
    """The method's model at its start: items (n_items, dim), queries (n, dim)."""
    if config.method == "mf_ind":
        return GatedTowers(item_embeddings, query_embeddings, config.seed)
    return FreeEmbeddings(item_embeddings, query_embeddings)


def best_epoch(epochs: list[Epoch]) -> Epoch:
    """The epoch with the smallest held-out error, the first of equals."""
    return min(epochs, key=lambda epoch: epoch.held_out_rmse)


def _cut(rows: Rows, size: int) -> Iterator[Rows]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _squared(errors: Tensor) -> Tensor:
    return errors.double().square().sum()
