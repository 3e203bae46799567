"""Spreads alternating least squares over Ray tasks: queries in ranges, then items in ranges, as often as it takes.

`core.als` solves the rows. Each observation lies in the object store twice, by query and by item; V lies on the shared disk
in parts, and a task reads the rows that it needs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from threadpoolctl import threadpool_limits

from axn_ray.core.als import join_columns, solve_rows, sum_squared_errors, transpose
from axn_ray.core.embedded_corpus import ITEM_EMBEDDINGS
from axn_ray.core.epochs import FitProgress
from axn_ray.core.factorization import Factorization
from axn_ray.core.fit_record import record_fit
from axn_ray.core.fit_share import StoredInputs, share_rows
from axn_ray.core.fitting import FactorizationConfig, draw_held_out
from axn_ray.core.row_parts import RowParts, write_part
from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale, sum_moments

ITEMS_PER_TASK = 1 << 16


@dataclass(frozen=True)
class _Job:
    """What every task is told."""

    inputs: StoredInputs
    config: FactorizationConfig
    folder: Path
    threads: int

    def items_after(self, epoch: int) -> Any:
        """V as an epoch left it; before the first, the dual-encoder's embeddings."""
        if epoch == 0:
            return np.load(self.inputs.embeddings / ITEM_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        return RowParts(self.folder, f"items-{epoch}")


@dataclass(frozen=True)
class _Queries:
    """Some queries: what is known of them, what is held out, and their embeddings (n, dim)."""

    known: ScoreMatrix
    hidden: ScoreMatrix
    embeddings: FloatArray


def factorize_by_als(
    inputs: StoredInputs, config: FactorizationConfig, folder: Path, num_workers: int, threads: int
) -> Factorization:
    """What `core.als.fit_als` gives, by at least `num_workers` tasks at a time, each with so many threads.

    V is memory-mapped from a file in `folder`, which all nodes must see.

    Raises:
        FitError: see `FitProgress.add`.
    """
    job, progress, cpus = _Job(inputs, config, folder, threads), FitProgress(config), {"num_cpus": threads}
    n_items = len(job.items_after(0))
    ranges = share_rows(n_items, max(num_workers, -(-n_items // ITEMS_PER_TASK)))
    told = ray.put(job)
    opened = [
        _open.options(num_returns=2 + len(ranges), **cpus).remote(told, rank, num_workers, ranges) for rank in range(num_workers)
    ]
    shares = [parts[0] for parts in opened]
    moments, n_hidden = (sum(values) for values in zip(*ray.get([parts[1] for parts in opened]), strict=True))
    scale = ScoreScale.from_moments(moments)
    by_item = [_join.options(**cpus).remote(*[parts[2 + n] for parts in opened]) for n in range(len(ranges))]

    def measure(vectors: list[Any], epoch: int) -> npt.NDArray[np.float64]:
        tasks = [_measure.options(**cpus).remote(told, share, scale, u, epoch) for share, u in zip(shares, vectors, strict=True)]
        squared: npt.NDArray[np.float64] = sum(ray.get(tasks)) / [inputs.n_observed - n_hidden, n_hidden]
        return squared

    start_mse = measure([None] * len(shares), 0)[1]
    while not progress.is_done:
        epoch = progress.start()
        solved = [_solve_queries.options(**cpus).remote(told, share, scale, epoch - 1) for share in shares]
        solving = [
            _solve_items.options(**cpus).remote(told, rows, part, scale, epoch, *solved)
            for rows, part in zip(ranges, by_item, strict=True)
        ]
        ray.get(solving)
        progress.add(*measure(solved, epoch))
    record = record_fit(progress.epochs, float(np.sqrt(start_mse)), config)
    RowParts(folder, f"items-{record.best_epoch}").join(folder / ITEM_EMBEDDINGS)
    embeddings = np.load(folder / ITEM_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
    return Factorization(embeddings, scale, None, record, index_ce_calls=inputs.n_observed)


@ray.remote
def _open(job: _Job, rank: int, size: int, ranges: list[range]) -> tuple[Any, ...]:
    """Read a share: `_Queries`, then the moments of its scores and how many are held out, then its part of each item range."""
    share = job.inputs.share(rank, size)
    u, items = share.query_embeddings, share.item_embeddings
    approx = [items[share.matrix.row(query)[0]] @ u[query] for query in range(len(u))]
    moments = sum_moments(share.matrix.scores, np.concatenate([np.zeros(0, np.float32), *approx]))
    own = slice(share.first_observation, share.first_observation + share.matrix.n_observed)
    held_out = draw_held_out(share.n_observed, job.config)[own]
    known = share.matrix.keep(~held_out)
    by_item = transpose(known)
    parts = [by_item.rows(rows) for rows in ranges]
    return _Queries(known, share.matrix.keep(held_out), u), (moments, int(held_out.sum())), *parts


@ray.remote
def _join(*parts: ScoreMatrix) -> ScoreMatrix:
    return join_columns(parts)


@ray.remote
def _solve_queries(job: _Job, share: _Queries, scale: ScoreScale, epoch: int) -> FloatArray:
    with threadpool_limits(job.threads):
        return solve_rows(share.known, scale, job.items_after(epoch), share.embeddings, job.config.ridge)


@ray.remote
def _solve_items(job: _Job, rows: range, observed: ScoreMatrix, scale: ScoreScale, epoch: int, *queries: FloatArray) -> None:
    priors = np.array(job.items_after(0)[rows.start : rows.stop])
    with threadpool_limits(job.threads):
        solved = solve_rows(observed, scale, np.concatenate(queries), priors, job.config.ridge)
    write_part(job.folder, f"items-{epoch}", rows.start, solved)


@ray.remote
def _measure(job: _Job, share: _Queries, scale: ScoreScale, u: FloatArray | None, epoch: int) -> npt.NDArray[np.float64]:
    """(2,): squared errors of what is known and of what is held out; without `u`, of the dual-encoder's embeddings."""
    items, u = job.items_after(epoch), share.embeddings if u is None else u
    return np.array([sum_squared_errors(part, scale, u, items) for part in (share.known, share.hidden)])
