"""Threads in which a cross-encoder computes, each by itself. Knows no queue and no model's inside."""

from concurrent.futures import ThreadPoolExecutor

import torch

from axn_ray.core.cross_encoder import CrossEncoderConfig
from axn_ray.core.models import choose_device
from axn_ray.core.open_cross_encoder import is_model, open_cross_encoder
from axn_ray.core.pairs import PairScorer


class ScorerThreads:
    """`n` threads with `torch_threads` of torch's own in each, and the `pool` that runs work in them."""

    def __init__(self, n: int, torch_threads: int) -> None:
        self.n = n
        self.pool = ThreadPoolExecutor(n, "cross-encoder", initializer=torch.set_num_threads, initargs=(torch_threads,))


def open_threaded(config: CrossEncoderConfig, cores: int) -> tuple[PairScorer, ScorerThreads]:
    """The CE that `config` names, and the threads to call it from.

    Torch's own threads wait for each other after every product, so that whoever takes one core for a moment stops all of
    them. So weights that run here on the CPU get `cores` threads of one core each, which never meet; a GPU, a server or a
    Python object gets one thread, in which torch may use `cores`: only one thread of a process may do so, for each has a
    team of its own, and where teams have more threads than there are cores, all sleep between any two products.

    Raises:
        ModelError: see `open_cross_encoder`.
    """
    is_spread = is_model(config) and choose_device().type == "cpu"
    threads = ScorerThreads(cores, 1) if is_spread else ScorerThreads(1, cores)
    return threads.pool.submit(open_cross_encoder, config).result(), threads
