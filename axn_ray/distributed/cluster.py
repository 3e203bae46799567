"""Joins a Ray cluster, or starts one on this machine. Knows no stage."""

import logging
import os
from collections.abc import Sequence

import ray
import ray.data

logger = logging.getLogger(__name__)

CPUS_PER_CORE = 4


def join_cluster(address: str | None = None) -> None:
    """Connect to the cluster at `address` (or in RAY_ADDRESS); without either start one on this machine.

    A local cluster gets `CPUS_PER_CORE` logical CPUs a core: Ray Train's controller, its workers and Ray Data's tasks
    each hold one while they wait for each other, and none of them is busy all the time.
    """
    if not ray.is_initialized():
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **quiet)
        else:
            logger.info("starting Ray on this machine")
            ray.init(address="local", num_cpus=CPUS_PER_CORE * (os.cpu_count() or 1), include_dashboard=False, **quiet)
    _quiet_ray_data()


def _quiet_ray_data() -> None:
    """Our own bars say what is done; Ray Data's plans and bars would say it twice."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a worker's AxnError reaches the command line as itself
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def gpus_per_worker() -> int:
    """One where the cluster has any: also for a driver on a node that has none."""
    return int(ray.cluster_resources().get("GPU", 0) >= 1)


def warn_of_threads(threads: int) -> None:
    """Say so where no node has as many CPUs as a process asks for: Ray then waits for one, without a word."""
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if threads > largest:
        said = threads, threads, largest
        logger.warning(
            "processes of %d threads need a node of %d CPUs, the largest has %d: waiting for one; lower threads", *said
        )


def split_evenly(n: int, size: int) -> Sequence[range]:
    """Rows 0..n-1 in ranges of at most `size`."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]
