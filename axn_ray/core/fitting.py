"""What every fit starts from: its settings, its inputs in memory, what is held out. Knows no file and no Ray."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.errors import InputError

Rows = npt.NDArray[np.int64]
BLOCK = 1 << 16
VIEWS = "of bayes: what it sees of an item beside its embedding; default: all of de, ce, last layer and half, text and title"
PASSES = "bayes, als: 6, mf_trns: 10, mf_ind: 12; the first of bayes reads a fourth of the queries"
METHOD_DEFAULTS = {"mf_trns": {"epochs": 10}, "bayes": {"epochs": 6}, "als": {"epochs": 6, "patience": 1}}


class FactorizationConfig(BaseModel):
    """How to fit: in closed form (`bayes`), or what else is named. `METHOD_DEFAULTS` holds what differs between methods."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["mf_ind", "mf_trns", "bayes", "als"] = Field(
        "bayes", description="the closed form over views; towers over frozen embeddings; free embeddings, by steps or by als"
    )
    epochs: int = Field(12, ge=1, description=f"passes over the observations, at most; {PASSES}")
    learning_rate: float = Field(1e-3, gt=0, description="of the gradient methods (mf_ind, mf_trns)")
    batch_size: int = Field(2048, ge=1, description="observations per step of the gradient methods, over all workers")
    validation_share: float = Field(0.05, gt=0, le=0.5, description="of the observations, held out to choose the best epoch")
    patience: int = Field(3, ge=1, description="stop after this many epochs without a smaller held-out error; als: 1")
    ridge: float = Field(0.01, gt=0, description="of als: pull per observation towards the dual-encoder's embeddings")
    views: list[str] | None = Field(None, description=VIEWS)
    lexical: bool = Field(True, description="of bayes: let the words that query and item share (BM25) shift the prior mean")
    width: int = Field(512, ge=1, description="of bayes: numbers per item, at most")
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_of_the_method(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {**METHOD_DEFAULTS.get(given.get("method", "bayes"), {}), **given}
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
        return draw_held_out(self.score_matrix.n_observed, config)

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
    check_finite(side, embeddings)


def check_finite(side: str, embeddings: FloatArray) -> None:
    """Refuse NaN and infinity in the embeddings of items or queries (n, dim), a block at a time.

    Raises:
        InputError: a row holds one.
    """
    blocks = (embeddings[start : start + BLOCK] for start in range(0, len(embeddings), BLOCK))
    bad = np.flatnonzero(np.concatenate([np.zeros(0, dtype=bool), *(~np.isfinite(block).all(axis=1) for block in blocks)]))
    if len(bad):
        raise InputError(f"{len(bad)} {side} embeddings are NaN or infinite (first: row {bad[0]}); embed them again")


def draw_held_out(n_observed: int, config: FactorizationConfig) -> npt.NDArray[np.bool_]:
    """Which of the observations are held out, (n_observed,): a share drawn by the seed alone, at least one."""
    drawn = np.random.default_rng([config.seed, 0]).permutation(n_observed)
    held_out = np.zeros(n_observed, dtype=np.bool_)
    held_out[drawn[: max(1, round(config.validation_share * n_observed))]] = True
    return held_out
