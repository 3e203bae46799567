"""The queue before the cross-encoder, without Ray: merged batches equal the model alone; nobody waits for ever."""

import asyncio
import threading

import numpy as np
import pytest

from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.pairs import PairScorer, TextPairScorer, count_tokens, gather_texts
from axn_ray.errors import ModelError
from serve_app.pair_queue import PairQueue, Pairs, QueueFullError
from tests.serve_app.scorers import Known, known_score


class Watched(PairScorer):
    """A scorer that notes the size of each call and can be held."""

    def __init__(self, scorer):
        self._scorer, self.fingerprint = scorer, scorer.fingerprint
        self.calls, self.gate = [], threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def tokenize(self, texts):
        return self._scorer.tokenize(texts)

    def score_pairs(self, queries, items, query_index, item_index):
        self.entered.set()
        assert self.gate.wait(10)
        self.calls.append(len(query_index))
        return self._scorer.score_pairs(queries, items, query_index, item_index)


def watched(scorer=None):
    return Watched(scorer or TextPairScorer(Known()))


def pairs(scorer, query, items):
    queries, prepared = scorer.tokenize([query]), scorer.tokenize(items)
    rows = np.arange(len(items), dtype=np.int32)
    zero = np.zeros_like(rows)
    return Pairs(queries, prepared, zero, rows, count_tokens(queries)[zero] + count_tokens(prepared))


def expected(query, items):
    return np.array([known_score(query, item) for item in items], dtype=np.float32)


async def until(is_true):
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.005)


def items_of(name, n, words=3):
    return [f"{name} {number}" + " w" * (words - 2) for number in range(n)]


def test_batches_of_several_requests_equal_the_model_alone(tiny_cross_encoder):
    model = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32"))
    rng = np.random.default_rng(0)
    words = ["tree", "fire", "sings", "walked", "a", "mountains", "of", "quickly"]
    texts = {f"query {n}": [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(20)] for n in range(7)}
    alone = {query: model.score_texts([query] * 20, items) for query, items in texts.items()}

    async def serve():
        scorer = watched(model)
        queue = PairQueue(scorer, batch_tokens=512, max_pairs=1000)
        asked = [queue.score(pairs(scorer, query, items), timeout_s=30) for query, items in texts.items()]
        return await asyncio.gather(*asked), scorer.calls, queue

    answers, calls, queue = asyncio.run(serve())
    for answer, query in zip(answers, texts, strict=True):
        assert not answer.failures
        np.testing.assert_allclose(answer.scores, alone[query], rtol=0, atol=2e-5)
    assert sum(calls) == 140 == queue.n_batched_pairs
    assert len(calls) < 14
    assert queue.n_queued == 0


def test_a_batch_holds_no_more_tokens_than_its_budget_and_takes_turns():
    async def serve():
        scorer = watched()
        scorer.gate.clear()
        queue = PairQueue(scorer, batch_tokens=40, max_pairs=1000)
        first = asyncio.create_task(queue.score(pairs(scorer, "q", items_of("a", 1)), timeout_s=10))
        await until(scorer.entered.is_set)
        done = []

        async def ask(name, n):
            answer = await queue.score(pairs(scorer, name, items_of(name, n)), timeout_s=10)
            done.append(name)
            return answer

        large, small = asyncio.create_task(ask("large", 50)), asyncio.create_task(ask("small", 5))
        await until(lambda: queue.n_queued == 55)
        scorer.gate.set()
        answers = await asyncio.gather(first, large, small)
        return answers, done, scorer.calls

    answers, done, calls = asyncio.run(serve())
    assert done == ["small", "large"]  # fifty pairs do not hold up five
    assert max(calls) == 10  # of 4 tokens each
    np.testing.assert_array_equal(answers[1].scores, expected("large", items_of("large", 50)))
    np.testing.assert_array_equal(answers[2].scores, expected("small", items_of("small", 5)))


@pytest.mark.parametrize("leave", ["cancel", "timeout"])
def test_who_leaves_takes_the_waiting_pairs_along(leave):
    async def serve():
        scorer = watched()
        scorer.gate.clear()
        queue = PairQueue(scorer, batch_tokens=40, max_pairs=1000)
        held = asyncio.create_task(queue.score(pairs(scorer, "q", items_of("a", 10)), timeout_s=10))
        await until(scorer.entered.is_set)
        leaving = asyncio.create_task(
            queue.score(pairs(scorer, "q", items_of("b", 300)), timeout_s=0.05 if leave == "timeout" else 10)
        )
        await until(lambda: queue.n_queued == 300)
        if leave == "cancel":
            leaving.cancel()
        with pytest.raises(TimeoutError if leave == "timeout" else asyncio.CancelledError):
            await leaving
        assert queue.n_queued == 0
        scorer.gate.set()
        await held
        after = await queue.score(pairs(scorer, "q", items_of("c", 3)), timeout_s=10)
        return scorer.calls, after

    calls, after = asyncio.run(serve())
    assert calls == [10, 3]
    np.testing.assert_array_equal(after.scores, expected("q", items_of("c", 3)))


def test_a_full_queue_refuses_new_requests_and_lets_later_rounds_in():
    async def serve():
        scorer = watched()
        scorer.gate.clear()
        queue = PairQueue(scorer, batch_tokens=40, max_pairs=30)
        whole = asyncio.create_task(queue.score(pairs(scorer, "q", items_of("a", 50)), timeout_s=10))  # finds it empty
        await until(lambda: queue.n_queued == 40)
        with pytest.raises(QueueFullError) as refused:
            await queue.score(pairs(scorer, "q", items_of("b", 1)), timeout_s=10)
        later = asyncio.create_task(queue.score(pairs(scorer, "q", items_of("c", 5)), timeout_s=10, is_admitted=True))
        await until(lambda: queue.n_queued == 45)
        scorer.gate.set()
        await asyncio.gather(whole, later)
        return refused.value.retry_after_s, queue.n_queued

    retry_after_s, left = asyncio.run(serve())
    assert retry_after_s >= 1
    assert left == 0


def test_one_bad_pair_fails_alone_and_a_broken_request_fails_alone():
    async def serve():
        scorer = watched()
        queue = PairQueue(scorer, batch_tokens=400, max_pairs=1000)
        scorer.gate.clear()
        held = asyncio.create_task(queue.score(pairs(scorer, "q", ["first"]), timeout_s=10))
        await until(scorer.entered.is_set)
        asked = [
            asyncio.create_task(queue.score(pairs(scorer, query, items), timeout_s=10))
            for query, items in (("q", ["a", "poison", "b", ""]), ("broken", ["a", "b"]), ("r", ["c", "d"]))
        ]
        await until(lambda: queue.n_queued == 8)
        scorer.gate.set()
        await held
        return await asyncio.gather(*asked, return_exceptions=True)

    poisoned, broken, good = asyncio.run(serve())
    assert poisoned.failures == {1: "ValueError: this item breaks the model", 3: "the item has no text"}
    np.testing.assert_array_equal(poisoned.scores[[0, 2]], expected("q", ["a", "b"]))
    assert isinstance(broken, ModelError)
    np.testing.assert_array_equal(good.scores, expected("r", ["c", "d"]))


def test_a_request_that_failed_sends_no_more_batches():
    async def serve():
        scorer = watched()
        queue = PairQueue(scorer, batch_tokens=40, max_pairs=1000)
        with pytest.raises(ModelError):
            await queue.score(pairs(scorer, "broken", items_of("a", 50)), timeout_s=10)
        assert queue.n_queued == 0
        await queue.score(pairs(scorer, "q", items_of("b", 3)), timeout_s=10)
        return scorer.calls

    assert asyncio.run(serve()) == [10, 3]


@pytest.mark.parametrize("batch_tokens", [4096, 64])  # in a batch with others, and in one of its own
def test_an_overlong_item_that_the_policy_refuses_fails_alone(tiny_cross_encoder, batch_tokens):
    model = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32", overlong="error"))

    async def serve():
        queue = PairQueue(model, batch_tokens, max_pairs=100)
        return await queue.score(pairs(model, "a query", ["short", "long " * 90, "tree"]), timeout_s=10)

    answer = asyncio.run(serve())
    assert list(answer.failures) == [1]
    assert "exceed the" in answer.failures[1]
    np.testing.assert_allclose(answer.scores[[0, 2]], model.score_texts(["a query"] * 2, ["short", "tree"]), atol=2e-5)


def test_a_hanging_model_lets_callers_go_and_is_seen():
    async def serve():
        scorer = watched()
        scorer.gate.clear()
        queue = PairQueue(scorer, batch_tokens=40, max_pairs=100)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await queue.score(pairs(scorer, "q", items_of("a", 5)), timeout_s=0.05)
        assert queue.busy_s > 0.1
        assert queue.n_queued == 0
        scorer.gate.set()
        await until(lambda: queue.busy_s == 0)
        return scorer.calls

    assert asyncio.run(serve()) == [5]


def test_gathered_rows_are_the_texts_of_their_rows(tiny_cross_encoder):
    model = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32"))
    left, right = ["one", "two words", ""], ["three little words", "four"]
    chosen = np.array([1, 0, 1, 2], dtype=np.int32), np.array([1, 0], dtype=np.int32)
    names = [left[i] for i in chosen[0]] + [right[i] for i in chosen[1]]
    gathered = gather_texts([(model.tokenize(texts), rows) for texts, rows in zip((left, right), chosen, strict=True)])
    direct = model.tokenize(names)
    np.testing.assert_array_equal(gathered.ids, direct.ids)
    np.testing.assert_array_equal(gathered.offsets, direct.offsets)
    assert gather_texts([(tuple(left), chosen[0]), (tuple(right), chosen[1])]) == tuple(names)
