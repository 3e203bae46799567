"""Spreads the closed-form fit over Ray tasks: each holds the scores and items of its own share of the queries."""

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from threadpoolctl import threadpool_limits

from axn_ray.core.bayes import BayesInputs, BayesModel, SufficientStatistics, SumStatistics, e_step
from axn_ray.core.closed_form import TrainData
from axn_ray.distributed.cluster import split_evenly


def spread_on_ray(num_workers: int, threads: int) -> Callable[[TrainData], SumStatistics]:
    """Share the queries out over `num_workers` tasks of `threads` CPUs; see `core.closed_form.Spread`.

    A share goes to the object store once. Tasks keep nothing, so one whose worker or node is lost runs again elsewhere.
    """

    def spread(data: TrainData) -> SumStatistics:
        n_queries = data.matrix.n_queries
        shares = [ray.put(data.share(queries)) for queries in split_evenly(n_queries, -(-n_queries // num_workers))]
        return partial(_sum_shares, shares=shares, threads=threads)

    return spread


def _sum_shares(model: BayesModel, shares: list[Any], threads: int) -> SufficientStatistics:
    """One E-step, its sums added up in pairs by the workers, always the same pairs: one set of sums reaches the driver."""
    task, held = ray.remote(num_cpus=threads)(_sum_share), ray.put(model)
    parts = [task.remote(held, share, threads) for share in shares]
    while len(parts) > 1:
        pairs = [_add.remote(*parts[at : at + 2]) for at in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return ray.get(parts[0])


def _sum_share(model: BayesModel, inputs: BayesInputs, threads: int) -> SufficientStatistics:
    with threadpool_limits(threads):  # a worker that Ray uses again has the threads of its first task
        return e_step(model, inputs)


@ray.remote
def _add(one: SufficientStatistics, other: SufficientStatistics) -> SufficientStatistics:
    return one + other
