"""Spreads the examination over queries on Ray Data: a shard is a few queries, the bundle lies in the object store."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import torch
from pydantic import Field
from ray.data import ActorPoolStrategy

from axn_ray.core.choice import Choice, list_trials
from axn_ray.core.comparison import STOPS, MethodAt
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.evaluation import EvaluationPlan, Examination, evaluate_queries
from axn_ray.core.methods import METHODS, Method, choose_methods, methods_for
from axn_ray.distributed.cluster import split_evenly
from axn_ray.distributed.progress import track
from axn_ray.errors import ArtifactError

logger = logging.getLogger(__name__)


class EvaluateConfig(CrossEncoderConfig):
    """Which methods at which budgets against which baseline, and how many workers share the queries."""

    methods: list[str] = Field([], description=f"of {', '.join(METHODS)}; default: all that the given artifacts allow")
    rounds: list[int] = Field([10], description="rounds of each method that searches; RnR has one, ANNCUR two")
    budgets: list[int] = Field([100, 200, 500], description="CE calls per query")
    k: list[int] = Field([1, 10, 100], description="recall@k to report")
    target_recall: list[float] = Field(
        [], description="also let the methods with a posterior stop where this share of the top k (10, or the last k) is found"
    )
    baseline: str = Field("rnr_de", description="the method that all are compared with, at its last number of rounds")
    choose: bool = Field(False, description="try the free settings on dev queries and keep the best; without it, test queries")
    max_queries: int | None = Field(None, ge=1, description="judge only the truth's first queries; default: all")
    known_scores: list[str] = Field([], description="scores artifacts to look pairs up in, where truth is still to be scored")
    workers: int = Field(2, ge=1, description="processes that search")
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    shard_queries: int = Field(4, ge=1, description="queries that a worker takes at a time")

    @property
    def split(self) -> Literal["dev", "test"]:
        """The queries that this evaluation may look at: dev ones choose, test ones judge."""
        return "dev" if self.choose else "test"

    def method_names(self, embeddings: Iterable[str]) -> list[str]:
        """Keys of the methods to compare, to judge them with the baseline first, given the embeddings at hand."""
        names = self.methods or methods_for(embeddings)
        return names if self.choose or self.baseline in names else [self.baseline, *names]

    def plan(self, embeddings: Iterable[str], chosen: Choice | None = None) -> EvaluationPlan:
        """What is compared, given the names of the embeddings at hand: all settings to try, or those that were chosen.

        Raises:
            InputError: an unknown method, or see `EvaluationPlan`.
        """
        methods = self._list_methods(self.method_names(embeddings), chosen)
        return EvaluationPlan(methods, tuple(self.budgets), tuple(self.k))

    def find_baseline(self, chosen: Choice | None = None) -> MethodAt:
        """Name and rounds of the baseline, as they stand in the plan."""
        spends_all = [method for method in self._list_methods([self.baseline], chosen) if method.target_recall is None]
        return spends_all[-1].name, spends_all[-1].rounds

    def _list_methods(self, names: Sequence[str], chosen: Choice | None) -> tuple[Method, ...]:
        if self.choose:
            return tuple(trial.method for trial in list_trials(names, self.rounds))
        methods = choose_methods(names, self.rounds) if chosen is None else chosen.apply(names, self.rounds)
        k = 10 if 10 in self.k else self.k[-1]
        stopping = [
            replace(method, name=f"{method.name}{STOPS}{target:.0%}", target_recall=target, k=k)
            for method in methods
            for target in self.target_recall
            if method.estimator == "ridge"
        ]
        return (*methods, *stopping)


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
