"""What a scoring run would take, from a timed sample on as many workers as the run itself would use."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.tokens import Int32Array
from axn_ray.distributed.cluster import gpus_per_worker
from axn_ray.distributed.score import ScoreConfig, count_done, plan_first_pass, plan_second_pass, prepare_job, read_done
from axn_ray.errors import InputError

SAMPLE_PAIRS = 512
REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """`n_pairs` asked for, `n_done` of them in the folder already; rates in pairs per second and worker."""

    n_pairs: int
    n_done: int
    rates: tuple[float, ...]
    workers: int
    on_gpu: bool
    price_per_hour: float | None

    @property
    def seconds(self) -> float:
        """Of scoring alone; starting the workers takes some more."""
        return (self.n_pairs - self.n_done) / (float(np.median(self.rates)) * self.workers)

    @property
    def worker_hours(self) -> float:
        """Hours of all workers together."""
        return self.seconds * self.workers / 3600

    def __str__(self) -> str:
        low, middle, high = min(self.rates), float(np.median(self.rates)), max(self.rates)
        kind = "GPU-hours" if self.on_gpu else "worker-hours"
        price = self.price_per_hour
        cost = "" if price is None else f", {self.worker_hours * price:,.2f} at {price:g} per {kind.removesuffix('s')}"
        return (
            f"{self.n_pairs:,} pairs, {self.n_done:,} of them done: about {self.seconds:,.0f} s on {self.workers} workers "
            f"({middle:,.0f} pairs/s each, {low:,.0f} to {high:,.0f} in the sample), {self.worker_hours:,.3f} {kind}{cost}"
        )


def estimate(corpus: EmbeddedCorpus, config: ScoreConfig, out: Path, price_per_hour: float | None = None) -> Estimate:
    """Time a sample of the run's own pairs, `config.workers` workers at once; nothing is written.

    Pairs that `known_scores` would give count as calls: an upper bound.

    Raises:
        ArtifactError, InputError, ModelError: as the run would.
    """
    job = prepare_job(corpus, config)
    first = plan_first_pass(job)
    second = plan_second_pass(job, first)
    drawn = np.random.default_rng(config.seed).permutation(len(first.shards))
    query_index, item_index = _sample(first, drawn.tolist())
    free = int(ray.cluster_resources().get("GPU" if gpus_per_worker() else "CPU", 0) // (gpus_per_worker() or config.threads))
    workers = min(config.workers, free)
    if not workers:
        raise InputError("the cluster has no free worker to time a sample on; add a node or lower threads")
    task = ray.remote(num_cpus=config.threads, num_gpus=gpus_per_worker())(_time_sample)
    tokens = job.inputs["query_tokens"], job.inputs["item_tokens"]
    timed = [task.remote(config, config.threads, *tokens, query_index, item_index) for _ in range(workers)]
    rates = [rate for part in ray.get(timed) for rate in part]
    n_pairs = first.n_pairs + second.n_pairs
    n_done = sum(count_done(read_done(part, out).values()) for part in (first, second))
    return Estimate(n_pairs, n_done, tuple(rates), config.workers, bool(gpus_per_worker()), price_per_hour)


def _sample(first: Any, shards: list[int]) -> tuple[Int32Array, Int32Array]:
    """Pairs of the run's own, drawn over its shards."""
    chooser = ray.get(first.inputs["chooser"])
    parts, n = [], 0
    for shard in shards:
        parts.append(chooser.choose(shard, first.shards[shard]))
        n += len(parts[-1][0])
        if n >= REPEATS * SAMPLE_PAIRS:
            break
    query_index, item_index = (np.concatenate(column) for column in zip(*parts, strict=True))
    return query_index, item_index


def _time_sample(
    config: CrossEncoderConfig, threads: int, query_tokens: Any, item_tokens: Any, query_index: Int32Array, item_index: Int32Array
) -> list[float]:
    """Pairs per second in each of a few goes, after one that warms up."""
    torch.set_num_threads(threads)
    cross_encoder = open_cross_encoder(config)
    cross_encoder.score_pairs(query_tokens, item_tokens, query_index[:64], item_index[:64])
    rates = []
    for part in np.array_split(np.random.default_rng(0).permutation(len(query_index))[: REPEATS * SAMPLE_PAIRS], REPEATS):
        start = time.monotonic()
        cross_encoder.score_pairs(query_tokens, item_tokens, query_index[part], item_index[part])
        rates.append(len(part) / (time.monotonic() - start))
    return rates
