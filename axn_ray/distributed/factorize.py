"""Spreads a factorization over workers on Ray Train: each holds the observations of its own share of the queries.

`core.fitting` says what a step is; here are the collectives, the checkpoints and the restarts.
"""

import logging
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ray.util.queue import Queue
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from axn_ray.core.artifact import check_replaceable, check_same_inputs, hash_json, new_artifact, read_manifest
from axn_ray.core.bayes import BayesInputs, BayesModel, SufficientStatistics, e_step
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.factorization import (
    Factorization,
    build_factorization,
    describe_factorization,
    fit_closed_form,
    load_factorization,
    save_factorization,
)
from axn_ray.core.fitting import Epoch, FactorizationConfig, Fit, FitInputs, share_queries
from axn_ray.core.score_matrix import FloatArray, ScoreMatrix, ScoreScale
from axn_ray.core.score_store import load_scores
from axn_ray.core.towers import State
from axn_ray.distributed.cluster import split_evenly
from axn_ray.errors import ArtifactError, FitError

logger = logging.getLogger(__name__)

STATE = "state.pt"


def factorize(
    score_matrix: ScoreMatrix,
    item_embeddings: FloatArray,
    query_embeddings: FloatArray,
    config: FactorizationConfig,
    out: Path,
    *,
    made_from: Mapping[str, str],
    num_workers: int,
    threads: int,
    storage: Path,
) -> Factorization:
    """Write the `factorization` artifact `out`: items (n_items, dim), train queries (n_queries, dim) of the dual-encoder.

    Takes the steps of `core.factorization.fit`, on `num_workers` processes with `threads` CPU threads each. Checkpoints go
    to `storage`, which all nodes must see; the same call with the same storage goes on where an earlier one stopped, also
    with another number of workers.

    Raises:
        InputError: see `FitInputs` and `ScoreScale.fit`.
        FitError: the fit diverged.
    """
    check_replaceable(out)
    inputs = FitInputs(score_matrix, np.asarray(item_embeddings), np.asarray(query_embeddings))
    scale = inputs.fit_scale()
    if config.method == "bayes":
        factorization = fit_closed_form(inputs, scale, config, SumOnRay(num_workers, threads))
        with new_artifact(out, describe_factorization(factorization, config, made_from)) as folder:
            save_factorization(folder, factorization)
        return load_factorization(out)
    run_config = RunConfig(
        name=_run_name(config, scale, made_from),
        storage_path=str(storage.resolve()),
        failure_config=FailureConfig(max_failures=3),
        checkpoint_config=CheckpointConfig(num_to_keep=1),
    )
    loop_config = {"inputs": ray.put(inputs), "scale": scale, "config": config.model_dump(), "threads": threads}
    scaling = _scaling(num_workers, threads)
    with _epochs_logged(config) as queue:
        loop_config["queue"] = queue
        trainer = TorchTrainer(_train_loop, train_loop_config=loop_config, scaling_config=scaling, run_config=run_config)
        result = trainer.fit()
    if result.return_value is not None:
        raise FitError(result.return_value)
    state = _read_state(result.checkpoint)
    epochs = [Epoch(**epoch) for epoch in state["epochs"]]
    factorization = build_factorization(inputs, scale, config, state["best"], epochs)
    with new_artifact(out, describe_factorization(factorization, config, made_from)) as folder:
        save_factorization(folder, factorization)
    return load_factorization(out)


def factorize_scores(
    embeddings: Path,
    scores: Path,
    config: FactorizationConfig,
    out: Path,
    *,
    num_workers: int = 2,
    threads: int = 1,
    storage: Path = Path("runs/train"),
) -> Factorization:
    """The stage: artifacts `embeddings` and `scores` in, the `factorization` artifact `out`. See `factorize`.

    Raises:
        ArtifactError: scores of other items or queries than those embedded.
    """
    corpus, observed = load_embedded_corpus(embeddings), load_scores(scores)
    check_same_inputs(scores, read_manifest(scores, "scores"), {"items": corpus.items.fingerprint})
    unknown = [query_id for query_id in observed.query_ids if query_id not in corpus.queries.index_of]
    if unknown:
        raise ArtifactError(f"{scores} knows query {unknown[0]!r}, {embeddings} does not; score the embedded queries")
    rows = [corpus.queries.index_of[query_id] for query_id in observed.query_ids]
    return factorize(
        observed.matrix,
        corpus.item_embeddings,
        corpus.query_embeddings[rows],
        config,
        out,
        made_from={**observed.made_from, "dual_encoder": corpus.dual_encoder},
        num_workers=num_workers,
        threads=threads,
        storage=storage,
    )


def _scaling(num_workers: int, threads: int) -> ScalingConfig:
    """`num_workers` processes with a GPU each, where there are any; says so when the cluster is too small for them now."""
    needed, there = num_workers * threads, ray.cluster_resources().get("CPU", 0)
    if needed > there:
        logger.warning(
            "%d workers x %d threads need %d CPUs, the cluster has %d: waiting for nodes; add some or lower workers or threads",
            *(num_workers, threads, needed, there),
        )
    return ScalingConfig(num_workers=num_workers, use_gpu=torch.cuda.is_available(), resources_per_worker={"CPU": threads})


@contextmanager
def _epochs_logged(config: FactorizationConfig) -> Iterator[Queue]:
    """A queue whose entries, one per epoch, the driver logs as they come."""
    queue = Queue(actor_options={"num_cpus": 0})

    def log() -> None:
        for epoch in iter(queue.get, None):
            logger.info("%s, %s", config.method, epoch)

    logger.info("%s: starting the workers", config.method)
    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def _run_name(config: FactorizationConfig, scale: ScoreScale, made_from: Mapping[str, str]) -> str:
    """The same for the same fit. The fitted scale stands for the arrays, should `made_from` not name all of them."""
    identity = {**config.model_dump(), "made_from": dict(made_from), "scale": f"{scale.alpha:.6g} {scale.beta:.6g}"}
    return f"factorization-{hash_json(identity)[:12]}"


def _train_loop(loop_config: dict[str, Any]) -> str | None:
    """One worker's part of the fit. Returns what went wrong with a fit that diverged: it would diverge again on a retry."""
    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    inputs: FitInputs = ray.get(loop_config["inputs"])
    queries = share_queries(inputs.score_matrix, world)[rank]
    fit = Fit(inputs, loop_config["scale"], FactorizationConfig(**loop_config["config"]), queries, _RayWorkers())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        fit.load_state_dict(_read_state(checkpoint))
    while not fit.is_done:
        try:
            epoch = fit.run_epoch()
        except FitError as error:
            return str(error)
        if rank == 0:
            loop_config["queue"].put(str(epoch))
        state = fit.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                torch.save(state, Path(folder) / STATE)
            ray.train.report(asdict(epoch), checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)
    return None


def _read_state(checkpoint: Checkpoint) -> State:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")


class _RayWorkers:
    """The workers of a Ray Train run; see `core.towers.Workers`."""

    def __init__(self) -> None:
        self.device: torch.device = get_device()

    def replicate(self, towers: nn.Module) -> nn.Module:
        """DDP over the towers, with a sum in the place of DDP's mean."""
        replica = prepare_model(towers)
        if isinstance(replica, DistributedDataParallel):
            replica.register_comm_hook(None, _sum_gradients)
        return replica

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather of blocks padded to the longest; NCCL, unlike gloo, has no sparse all-reduce."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=self.device))
        lengths = [int(size) for size in sizes]
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _sum_gradients(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda done: done.value()[0])


class SumOnRay:
    """The E-step of `bayes`, its queries shared out over `num_workers` tasks; the inputs go to the object store once."""

    def __init__(self, num_workers: int, threads: int) -> None:
        self._num_workers, self._threads = num_workers, threads
        self._inputs: Any = None

    def __call__(self, model: BayesModel, inputs: BayesInputs) -> SufficientStatistics:
        """Sums over all queries, added up in the order of the tasks; `inputs` are those of the first call."""
        self._inputs = ray.put(inputs) if self._inputs is None else self._inputs
        shares = split_evenly(inputs.matrix.n_queries, -(-inputs.matrix.n_queries // self._num_workers))
        task = ray.remote(num_cpus=self._threads)(e_step)
        parts = ray.get([task.remote(model, self._inputs, share) for share in shares])
        return sum(parts[1:], parts[0])
