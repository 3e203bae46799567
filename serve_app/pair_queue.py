"""The line before the expensive scale: pairs of many requests, merged into batches under a token budget.

Bounded in pairs. A caller that goes away takes its waiting pairs with it; a pair that fails, fails alone; a model that
fails, fails the requests that it fails for. Knows no HTTP and no Ray.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from axn_ray.core.pairs import FloatArray, PairScorer, PairScores, gather_texts
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)
Rows = npt.NDArray[np.int64]
RATE_MEMORY = 0.8  # of the moving average of pairs per second


class QueueFullError(Exception):
    """No room for these pairs; `retry_after_s` is how long those that wait will take."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Pairs:
    """The n pairs (query_index[j], item_index[j]) of prepared texts; `tokens int64 (n,)` of each."""

    queries: Any
    items: Any
    query_index: Int32Array
    item_index: Int32Array
    tokens: Rows

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(eq=False)
class _Job:
    pairs: Pairs
    answer: "asyncio.Future[PairScores]"
    waiting: Rows  # rows that no batch has taken yet, longest first
    scores: FloatArray
    n_left: int
    failures: dict[int, str] = field(default_factory=dict)


Part = tuple[_Job, Rows]


class PairQueue:
    """Scores pairs in the order in which their requests came, one batch of each request in turn.

    `scorer` is called from one thread. A request with more pairs than fit into a batch lets others pass between its batches.
    `max_pairs` bounds what waits; a request that finds the queue empty always gets in.
    """

    def __init__(self, scorer: PairScorer, batch_tokens: int, max_pairs: int) -> None:
        self._scorer, self._batch_tokens, self._max_pairs = scorer, batch_tokens, max_pairs
        self._jobs: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pair-queue")
        self._worker: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self.n_queued = self.n_at_work = 0
        self.n_batches = 0
        self.n_batched_pairs = self.n_batched_tokens = 0
        self.batch_fill = self.seconds_at_work = 0.0
        self.pairs_per_second = 0.0

    @property
    def retry_after_s(self) -> float:
        """Seconds until what waits now is done, at least 1."""
        return max(1.0, self.n_queued / self.pairs_per_second) if self.pairs_per_second else 1.0

    @property
    def busy_s(self) -> float:
        """Seconds that the batch at work has taken so far; 0 where none is."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    async def score(self, pairs: Pairs, *, timeout_s: float, is_admitted: bool = False) -> PairScores:
        """Score n pairs -> (n,) raw logits; NaN and a reason where a pair failed.

        `is_admitted` is for the later rounds of a search: they pass a full queue, for their search got in.

        Raises:
            QueueFullError: no room.
            TimeoutError: not done within `timeout_s`; its waiting pairs have left the queue.
            ModelError: the model failed.
        """
        if not is_admitted and self.n_queued and self.n_queued + len(pairs) > self._max_pairs:
            raise QueueFullError(self.retry_after_s)
        order = np.argsort(-pairs.tokens, kind="stable")
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        job = _Job(pairs, asyncio.get_running_loop().create_future(), order, scores, len(pairs))
        if not len(pairs):
            return PairScores(scores)
        self._jobs.append(job)
        self.n_queued += len(pairs)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(timeout_s):
                return await job.answer
        finally:
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        """Take out what a job still has in the queue."""
        job.answer.cancel()
        self.n_queued -= len(job.waiting)
        job.waiting = job.waiting[:0]
        if job in self._jobs:
            self._jobs.remove(job)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while parts := self._take_batch():
            self._busy_since = start = time.monotonic()
            self.n_at_work = sum(len(rows) for _, rows in parts)
            try:
                results = await loop.run_in_executor(self._thread, self._score_parts, parts)
            except Exception as error:  # a bug of ours must not leave callers waiting
                logger.exception("a batch failed outside the model")
                results = [error] * len(parts)
            self._measure(parts, time.monotonic() - start)
            self._busy_since, self.n_at_work = None, 0
            for (job, rows), result in zip(parts, results, strict=True):
                self._deliver(job, rows, result)
        self._worker = None

    def _take_batch(self) -> list[Part]:
        """The next pairs of each waiting job in turn, while they fit; at least one pair where any waits."""
        parts: list[Part] = []
        room = self._batch_tokens
        for _ in range(len(self._jobs)):
            job = self._jobs.popleft()
            ends = np.cumsum(np.minimum(job.pairs.tokens[job.waiting], self._batch_tokens))
            n = max(int(np.searchsorted(ends, room, side="right")), 0 if parts else 1)
            if not n:
                self._jobs.appendleft(job)
                break
            parts.append((job, job.waiting[:n]))
            room -= int(ends[n - 1])
            job.waiting = job.waiting[n:]
            self.n_queued -= n
            if len(job.waiting):
                self._jobs.append(job)
        return parts

    def _score_parts(self, parts: Sequence[Part]) -> list[PairScores | Exception]:
        """Score a batch; where the model fails on all, each request alone, for it may be one request's fault."""
        try:
            scored = self._score_rows(parts)
        except InputError as error:  # pairs that the policy for overlong items refuses
            if len(parts) == len(parts[0][1]) == 1:
                return [PairScores(np.full(1, np.nan, dtype=np.float32), {0: str(error)})]
            return [self._score_alone(part) for part in parts]
        except Exception as error:
            return [error] if len(parts) == 1 else [self._score_parts([part])[0] for part in parts]
        results: list[PairScores | Exception] = []
        start = 0
        for _, rows in parts:
            stop = start + len(rows)
            failures = {row - start: why for row, why in scored.failures.items() if start <= row < stop}
            results.append(PairScores(scored.scores[start:stop], failures))
            start = stop
        return results

    def _score_alone(self, part: Part) -> PairScores | Exception:
        """Each pair of a part by itself: those that are refused have their reason."""
        job, rows = part
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        failures: dict[int, str] = {}
        for place in range(len(rows)):
            (result,) = self._score_parts([(job, rows[place : place + 1])])
            if isinstance(result, Exception):
                return result
            scores[place] = result.scores[0]
            if result.failures:
                failures[place] = result.failures[0]
        return PairScores(scores, failures)

    def _score_rows(self, parts: Sequence[Part]) -> PairScores:
        queries = gather_texts([(job.pairs.queries, job.pairs.query_index[rows]) for job, rows in parts])
        items = gather_texts([(job.pairs.items, job.pairs.item_index[rows]) for job, rows in parts])
        every = np.arange(sum(len(rows) for _, rows in parts), dtype=np.int32)
        return self._scorer.score_pairs(queries, items, every, every)

    def _measure(self, parts: Sequence[Part], seconds: float) -> None:
        n = sum(len(rows) for _, rows in parts)
        tokens = sum(int(job.pairs.tokens[rows].sum()) for job, rows in parts)
        rate = n / max(seconds, 1e-6)
        self.seconds_at_work += seconds
        self.pairs_per_second = RATE_MEMORY * self.pairs_per_second + (1 - RATE_MEMORY) * rate if self.pairs_per_second else rate
        self.batch_fill = min(1.0, tokens / self._batch_tokens)
        self.n_batches += 1
        self.n_batched_pairs += n
        self.n_batched_tokens += tokens

    def _deliver(self, job: _Job, rows: Rows, result: PairScores | Exception) -> None:
        if job.answer.done():  # its caller is gone
            return
        if isinstance(result, Exception):
            job.answer.set_exception(result)
            self._forget(job)  # now: the next batch is taken before its caller hears of it
            return
        job.scores[rows] = result.scores
        job.failures |= {int(rows[place]): why for place, why in result.failures.items()}
        job.n_left -= len(rows)
        if not job.n_left:
            job.answer.set_result(PairScores(job.scores, job.failures))
