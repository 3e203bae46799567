"""Spreads MF_Trns and MF_Ind over workers on Ray Train: each reads its own shards of scores and its own rows of items.

`core.gradient_fit` says what a step is; here are the collectives, the checkpoints, the restarts and the final embedding.
"""

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from axn_ray.core.embedded_corpus import ITEM_EMBEDDINGS
from axn_ray.core.epochs import Epoch
from axn_ray.core.factorization import Factorization
from axn_ray.core.fit_record import record_fit
from axn_ray.core.fit_share import StoredInputs, share_rows
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.gradient_fit import GradientFit, read_shared_state
from axn_ray.core.row_parts import RowParts, write_part
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.core.score_store import lock_folder
from axn_ray.core.towers import GatedTower, split_towers
from axn_ray.distributed import train_steps
from axn_ray.distributed.cluster import gpus_per_worker
from axn_ray.distributed.train_steps import lines_logged
from axn_ray.errors import AxnError

logger = logging.getLogger(__name__)

ITEMS = "items"
ROWS_PER_TASK = 1 << 18


def train_factorization(
    inputs: StoredInputs,
    config: FactorizationConfig,
    folder: Path,
    *,
    name: str,
    num_workers: int | tuple[int, int],
    threads: int,
    storage: Path,
) -> Factorization:
    """Fit on Ray Train; the item embeddings are memory-mapped from a file in `folder`, which all nodes must see.

    Checkpoints go to `storage` under `name`; with the same ones a later call goes on where this one stopped, also with
    another number of workers. With `num_workers` (least, most) the fit has as many as find room, and grows and shrinks as
    nodes come and go; the epoch that a change interrupts runs again.

    Raises:
        ArtifactError: another process runs the same fit.
        FitError: the fit diverged, its inputs cannot be fitted, or see `run_training`.
    """
    run_config = RunConfig(
        name=name,
        storage_path=str(storage.resolve()),
        failure_config=FailureConfig(max_failures=train_steps.MAX_FAILURES),
        # The best one is kept, and so is the last: Ray never deletes that.
        checkpoint_config=CheckpointConfig(
            num_to_keep=1, checkpoint_score_attribute="held_out_rmse", checkpoint_score_order="min"
        ),
    )
    with lock_folder(storage.resolve() / name), lines_logged(config.method) as queue:
        loop_config = {"inputs": inputs, "config": config.model_dump(), "threads": threads, "queue": queue}
        scaling = scale_workers(num_workers, threads)
        trainer = TorchTrainer(_train_loop, train_loop_config=loop_config, scaling_config=scaling, run_config=run_config)
        result = train_steps.run_training(trainer)
    ((best, _),) = result.best_checkpoints[-1:]
    with best.as_directory() as at_best, result.checkpoint.as_directory() as at_last:
        state = read_shared_state(Path(at_last))
        record = record_fit([Epoch(**epoch) for epoch in state["epochs"]], state["start_rmse"], config)
        tower = None
        if config.method == "mf_ind":
            tower, item_tower = split_towers(read_shared_state(Path(at_best))["model"]["towers"])
            _embed_items(inputs, item_tower, folder, threads)
            at_best = str(folder)
        RowParts(Path(at_best), ITEMS).join(folder / ITEM_EMBEDDINGS)
    embeddings = np.load(folder / ITEM_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
    return Factorization(embeddings, ScoreScale(**state["scale"]), tower, record, index_ce_calls=inputs.n_observed)


def _embed_items(inputs: StoredInputs, tower: GatedTower, folder: Path, threads: int) -> None:
    """Every item through the tower, a range of rows per task; each task writes its part."""
    item_embeddings = inputs.embeddings / ITEM_EMBEDDINGS

    @ray.remote(num_cpus=threads)
    def embed(rows: range) -> None:
        torch.set_num_threads(threads)
        items = np.load(item_embeddings, mmap_mode="r", allow_pickle=False)
        write_part(folder, ITEMS, rows.start, tower.embed(items[rows.start : rows.stop]))

    n_items = len(np.load(item_embeddings, mmap_mode="r", allow_pickle=False))
    ray.get([embed.remote(rows) for rows in share_rows(n_items, -(-n_items // ROWS_PER_TASK))])


def scale_workers(num_workers: int | tuple[int, int], threads: int) -> ScalingConfig:
    """Processes with a GPU each, where there are any; says so when the cluster is too small for the fewest of them now."""
    fewest = num_workers if isinstance(num_workers, int) else num_workers[0]
    needed, there = fewest * threads, ray.cluster_resources().get("CPU", 0)
    if needed > there:
        logger.warning(
            "%d workers x %d threads need %d CPUs, the cluster has %d: waiting for nodes; add some or lower workers or threads",
            *(fewest, threads, needed, there),
        )
    return ScalingConfig(num_workers=num_workers, use_gpu=bool(gpus_per_worker()), resources_per_worker={"CPU": threads})


def _train_loop(loop_config: dict[str, Any]) -> str | None:
    """One worker's part of the fit. Returns what went wrong with a fit that would go wrong again on a retry."""
    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    problems: list[str | None] = [None] * size
    share, problem = None, None
    try:
        share = loop_config["inputs"].share(rank, size)
    except AxnError as error:
        problem = str(error)
    dist.all_gather_object(problems, problem)  # or the others would wait forever for the one that has a problem
    if share is None or any(problems):
        return next(filter(None, problems))
    try:
        fit = GradientFit(share, FactorizationConfig(**loop_config["config"]), _RayWorkers())
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                fit.load(Path(folder))
        while not fit.progress.is_done:
            epoch = fit.run_epoch()
            if rank == 0:
                loop_config["queue"].put(str(epoch))
            with tempfile.TemporaryDirectory() as folder:
                fit.save(Path(folder))
                is_empty = not any(Path(folder).iterdir())  # a worker that holds no rows
                ray.train.report(asdict(epoch), checkpoint=None if is_empty else Checkpoint.from_directory(folder))
    except AxnError as error:  # of figures that all workers share: all of them stop here
        return str(error)
    return None


class _RayWorkers:
    """The workers of a Ray Train run; see `core.towers.Workers`."""

    def __init__(self) -> None:
        self.device: torch.device = get_device()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sent_bytes = 0

    def replicate(self, towers: nn.Module) -> nn.Module:
        """DDP over the towers, with a sum in the place of DDP's mean."""
        replica = prepare_model(towers)
        if isinstance(replica, DistributedDataParallel):
            replica.register_comm_hook(None, self._sum_gradients)
        return replica

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather of blocks padded to the longest."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=self.device))
        lengths = [int(size) for size in sizes]
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        self.sent_bytes += padded.nbytes * (self.size - 1)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """One all-to-all of uneven blocks; gloo and NCCL have it."""
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, receive, send)
        self.sent_bytes += (sum(send) - send[self.rank]) * (rows.nbytes // max(len(rows), 1))
        return received

    def _sum_gradients(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.sent_bytes += bucket.buffer().nbytes * 2 * (self.size - 1) // self.size  # of a ring
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])
