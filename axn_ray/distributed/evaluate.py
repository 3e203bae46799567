"""Spreads the examination over queries on Ray Data: a shard is a few queries, the bundle lies in the object store."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from pydantic import BaseModel, ConfigDict, Field
from ray.data import ActorPoolStrategy

from axn_ray.core.evaluation import EvaluationPlan, Examination, evaluate_queries
from axn_ray.core.methods import METHODS, choose_methods, methods_for
from axn_ray.distributed.cluster import split_evenly
from axn_ray.distributed.progress import track
from axn_ray.errors import ArtifactError

logger = logging.getLogger(__name__)


class EvaluateConfig(BaseModel):
    """Which methods at which budgets, and how many workers share the queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: list[str] = Field([], description=f"of {', '.join(METHODS)}; default: all that the given artifacts allow")
    rounds: list[int] = Field([10], description="rounds of each method that searches; RnR has one, ANNCUR two")
    budgets: list[int] = Field([100, 200, 500], description="CE calls per query")
    k: list[int] = Field([1, 10, 100], description="recall@k to report")
    max_queries: int | None = Field(None, ge=1, description="judge only the truth's first queries; default: all")
    workers: int = Field(2, ge=1, description="processes that search")
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    shard_queries: int = Field(4, ge=1, description="queries that a worker takes at a time")

    def plan(self, embeddings: Iterable[str]) -> EvaluationPlan:
        """The part that says what is compared, given the names of the embeddings at hand.

        Raises:
            InputError: an unknown method, or see `EvaluationPlan`.
        """
        methods = choose_methods(self.methods or methods_for(embeddings), self.rounds)
        return EvaluationPlan(methods, tuple(self.budgets), tuple(self.k))


class _EvaluateActor:
    """The examination in one process; evaluates one shard of queries at a time."""

    def __init__(self, examination: list[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._examination: Examination = ray.get(examination[0])

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        return evaluate_queries(self._examination, range(int(batch["start"][0]), int(batch["stop"][0])))


def evaluate(examination: Examination, *, workers: int = 2, threads: int = 1, shard_queries: int = 4) -> pa.Table:
    """The rows of `evaluate_in_process`, in the same order, from `workers` processes.

    Raises:
        ArtifactError: rows are missing or come twice.
        InputError, ModelError: see `evaluate_queries`; from a worker they come wrapped in Ray's error.
    """
    n_queries, rows_per_query = examination.n_queries, examination.plan.rows_per_query
    ranges = split_evenly(n_queries, shard_queries)
    shards = ray.data.from_items([{"start": r.start, "stop": r.stop} for r in ranges], override_num_blocks=len(ranges))
    evaluated = shards.map_batches(
        _EvaluateActor,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers, len(ranges))),
        num_cpus=threads,
        # In a list, so that Ray hands over the reference and not the value.
        fn_constructor_kwargs={"examination": [ray.put(examination)], "threads": threads},
    )
    batches = evaluated.iter_batches(batch_size=None, batch_format="pyarrow")
    parts = list(track(batches, n_queries, "evaluate queries", size=lambda batch: batch.num_rows // rows_per_query))
    table = pa.concat_tables(parts)
    query_index = table["query_index"].to_numpy()
    counts = np.bincount(query_index, minlength=n_queries)
    if len(counts) != n_queries or (counts != rows_per_query).any():
        wrong = int(np.flatnonzero(counts != rows_per_query)[0])
        raise ArtifactError(f"query index {wrong} has {counts[wrong]} rows instead of {rows_per_query}; run the evaluation again")
    return table.take(np.argsort(query_index, kind="stable"))  # a query's rows come from one shard, in order
