import threading

import numpy as np
import pytest
import torch

from axn_ray.core.cross_encoder import CrossEncoder, CrossEncoderConfig
from axn_ray.core.pairs import TextPairScorer
from axn_ray.core.threaded import open_threaded
from axn_ray.errors import ModelError


class Lengths:
    fingerprint = "lengths"

    def score_texts(self, queries, items):
        return [float(len(item)) for item in items]


def torch_threads(threads):
    """(thread, how many of torch's it may use), of as many threads as there are."""
    meet = threading.Barrier(threads.n, timeout=30)

    def look():
        meet.wait()
        return threading.get_ident(), torch.get_num_threads()

    found = [threads.pool.submit(look) for _ in range(threads.n)]
    return {answer.result() for answer in found}


def test_a_models_threads_compute_alone_and_score_alike(tiny_cross_encoder):
    config = CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32")
    scorer, threads = open_threaded(config, 3)
    assert threads.n == 3
    assert sorted(n for _, n in torch_threads(threads)) == [1, 1, 1]
    assert threading.get_ident() not in {thread for thread, _ in torch_threads(threads)}
    asked = ["he [ran] home"] * 20, [f"item {n}: {'a longer text ' * (n % 7)}" for n in range(20)]
    parts = [threads.pool.submit(scorer.score_texts, *asked) for _ in range(6)]
    expected = CrossEncoder(config).score_texts(*asked)
    for part in parts:
        np.testing.assert_allclose(part.result(), expected, atol=1e-5)


def test_an_object_gets_one_thread_in_which_torch_may_use_several():
    scorer, threads = open_threaded(CrossEncoderConfig(cross_encoder=f"python:{__name__}:Lengths"), 3)
    assert isinstance(scorer, TextPairScorer)
    ((_, n),) = torch_threads(threads)
    assert n == 3


def test_a_model_that_is_missing_is_named():
    with pytest.raises(ModelError, match="no-such-model"):
        open_threaded(CrossEncoderConfig(cross_encoder="no-such-model"), 2)
