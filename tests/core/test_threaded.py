import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.threaded import ThreadedScorer, split_by_tokens
from axn_ray.errors import InputError, ModelError

QUERIES = ["he [ran] home", "the bank was [closed]"]
ITEMS = [f"item {n}: {'a longer text ' * (n % 7)}" for n in range(40)]
SEEN = []


class Watched:
    """Says in which thread it was called and how many threads torch had there."""

    fingerprint = "watched"

    def score_texts(self, queries, items):
        SEEN.append((threading.get_ident(), torch.get_num_threads()))
        return [float(len(item)) for item in items]


def tiny(folder, **settings):
    return CrossEncoderConfig(cross_encoder=str(folder), dtype="float32", **settings)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gives_what_the_cross_encoder_gives(tiny_cross_encoder, threads):
    config = tiny(tiny_cross_encoder, max_length=20)
    alone, threaded = CrossEncoder(config), ThreadedScorer(config, threads)
    rows = np.arange(80, dtype=np.int32)
    asked = (threaded.tokenize_queries(QUERIES), threaded.tokenize([*ITEMS, ""]), rows % 2, (rows % 41).astype(np.int32))
    expected, scored = alone.score_pairs(*asked), threaded.score_pairs(*asked)
    np.testing.assert_allclose(scored.scores, expected.scores, atol=1e-5)
    assert scored.failures == expected.failures == {40: "the item has no text"}
    assert scored.n_truncated == expected.n_truncated > 0
    assert threaded.fingerprint == alone.fingerprint
    assert (threaded.max_length, threaded.n_special) == (20, 3)
    nothing = threaded.score_pairs(*asked[:2], rows[:0], rows[:0])
    assert (nothing.scores.shape, nothing.failures, nothing.n_truncated) == ((0,), {}, 0)


def test_a_pair_that_the_policy_refuses_is_an_error_of_the_whole(tiny_cross_encoder):
    threaded = ThreadedScorer(tiny(tiny_cross_encoder, max_length=16, overlong="error"), 2)
    with pytest.raises(InputError, match="max_length"):
        threaded.score_texts(["a"] * 9, [*ITEMS[:8], "many words " * 20])


def test_the_models_threads_compute_alone(tiny_cross_encoder, monkeypatch):
    threaded = ThreadedScorer(tiny(tiny_cross_encoder), 2)
    forward, seen = threaded._scorer._engine.logits, []
    meet = threading.Barrier(2, timeout=30)  # each part waits here until the other one runs, too

    def watched(*given):
        meet.wait()
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return forward(*given)

    monkeypatch.setattr(threaded._scorer._engine, "logits", watched)
    threaded.score_texts(QUERIES, ITEMS[:2])
    assert len({thread for thread, _ in seen}) == 2
    assert {threads for _, threads in seen} == {1}


def test_an_object_gets_one_thread_in_which_torch_may_use_several():
    SEEN.clear()
    threaded = ThreadedScorer(CrossEncoderConfig(cross_encoder=f"python:{__name__}:Watched"), 3)
    for _ in range(2):
        assert threaded.score_texts(["a"] * 200, ["word"] * 200).tolist() == [4.0] * 200
    assert len({thread for thread, _ in SEEN}) == 1
    assert SEEN[0][0] != threading.get_ident()
    assert {threads for _, threads in SEEN} == {3}


def test_a_model_that_is_missing_is_named():
    with pytest.raises(ModelError, match="no-such-model"):
        ThreadedScorer(CrossEncoderConfig(cross_encoder="no-such-model"), 2)


@given(st.lists(st.integers(0, 600), max_size=300), st.integers(1, 4))
def test_parts_hold_each_row_once_and_about_as_many_tokens(lengths, n):
    tokens = np.array(lengths, dtype=np.int64)
    parts = split_by_tokens(tokens, n)
    assert sorted(np.concatenate([*parts, np.zeros(0, np.int64)]).tolist()) == list(range(len(tokens)))
    assert all(len(part) for part in parts)
    assert len(parts) <= n
    assert all(tokens[part].sum() <= max(tokens.sum() / n, 1) + tokens.max() for part in parts)
