"""One search on its way: drives the core's generator, counts what it costs, and knows what to say when it is cut short.

Knows no HTTP and no Ray: scores and items come from functions that it awaits.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from axn_ray.core.adaptive import Score, Search
from axn_ray.core.index import Retrieve, Retrieved
from axn_ray.core.pairs import FloatArray
from axn_ray.core.ranking import order_by_score
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError, ModelError
from serve_app.index_folder import Index
from serve_app.messages import Refused, Round, Scored, SearchJob, SearchReply
from serve_app.tracing import span

Ask = Callable[[Retrieve], Awaitable[Retrieved]]
ScoreItems = Callable[[Int32Array, float, bool], Awaitable[Scored | Refused]]
Nearest = Callable[[int, Int32Array], Retrieve]  # so many items that are best by what is known by then, without these
Start = Callable[[SearchJob, Int32Array], Awaitable[tuple[Search, Nearest]]]


class SearchRun:
    """One search under an exact budget and a deadline.

    `start` makes the generator once the query's embedding is known: the job and the items (m,) that it may not look at
    -> the search, and what asks for the best items by then.
    """

    def __init__(self, job: SearchJob, index: Index, retrieve: Ask, score: ScoreItems) -> None:
        self._job, self._index, self._retrieve, self._score_items = job, index, retrieve, score
        self._started = time.monotonic()
        self._outside = np.empty(0, dtype=np.int32)  # items that the filter keeps out
        self._items, self._scores = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        self._found_in = np.empty(0, dtype=np.int32)
        self.rounds_done = 0  # whose scores are in
        self._scorer = ""
        self._asked = np.empty(0, dtype=np.int32)  # the scored ones, and those that could not be
        self._failures: list[dict[str, str]] = []
        self._tokens = self._truncated = self._queued_pairs = 0
        self._pairs_per_second = 0.0
        self._seconds = dict.fromkeys(("scoring", "regression", "retrieval"), 0.0)
        self._trace: list[dict[str, Any]] = []

    async def run(self, start: Start) -> AsyncIterator[Round | SearchReply | Refused]:
        """Yield a `Round` after each round, then the reply, or why there is none."""
        stopped: Refused | None = None
        nearest: Nearest | None = None
        try:
            self._job = await self._apply_filter()
            request: Score | Retrieve | None = None
            if self._job.ce_calls:
                search, nearest = await self._timed("retrieval", start(self._job, self._outside))
                request = next(search)
            while request is not None:
                if isinstance(request, Score):
                    scored = await self._score(request.item_index)
                    if isinstance(scored, Refused):
                        stopped = scored
                        break
                    yield Round(self._describe_round())
                    answer: FloatArray | Retrieved = scored.scores
                else:
                    answer = await self._timed("retrieval", self._ask(request))
                begun = time.monotonic()
                request = search.send(answer)
                self._seconds["regression"] += time.monotonic() - begun
        except StopIteration:
            pass
        except TimeoutError:
            stopped = Refused("deadline", f"no result within {self._job.timeout_s * 1000:.0f} ms; raise deadline_ms")
        except InputError as error:
            stopped = Refused("invalid", str(error))
        except ModelError as error:
            stopped = Refused("scorer_failed", str(error))
        yield await self._finish(stopped, nearest)

    async def _apply_filter(self) -> SearchJob:
        """The job with no more to score than its filter lets in; a client cannot know how much that is."""
        job, items = self._job, self._index.corpus.items
        if not job.filter:
            return job
        self._outside = np.flatnonzero(~await asyncio.to_thread(items.match, job.filter)).astype(np.int32)
        ce_calls = min(job.ce_calls, len(items) - len(self._outside))
        return replace(job, ce_calls=ce_calls, rounds=min(job.rounds, ce_calls))

    async def _ask(self, request: Retrieve) -> Retrieved:
        if len(self._outside):
            request = replace(request, excluded=np.concatenate([request.excluded, self._outside]))
        return await self._retrieve(request)

    async def _timed(self, what: str, awaitable: Awaitable[Any]) -> Any:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._left()):
                return await awaitable
        finally:
            self._seconds[what] += time.monotonic() - begun

    def _left(self) -> float:
        return self._job.timeout_s - (time.monotonic() - self._started)

    async def _score(self, chosen: Int32Array) -> Scored | Refused:
        """Have a round scored. An item that cannot be spends its call and is named; where none could so far, the search ends."""
        with span("round", self._job.carrier, round=self.rounds_done + 1, pairs=len(chosen)):
            scored = await self._timed("scoring", self._score_items(chosen, self._left(), self.rounds_done > 0))
        if isinstance(scored, Refused):
            return scored
        if self._scorer not in ("", scored.scorer):
            return Refused("not_ready", "the cross-encoder was replaced while this search ran; try again", 1.0)
        self._scorer = scored.scorer
        ids, good = self._index.corpus.items.ids, ~np.isnan(scored.scores)
        self._failures += [{"id": ids[chosen[row]], "reason": reason} for row, reason in sorted(scored.failures.items())]
        self.rounds_done += 1
        self._asked = np.concatenate([self._asked, chosen])
        self._items = np.concatenate([self._items, chosen[good]])
        self._scores = np.concatenate([self._scores, scored.scores[good]])
        self._found_in = np.concatenate([self._found_in, np.full(good.sum(), self.rounds_done, dtype=np.int32)])
        self._tokens += scored.tokens
        self._truncated += scored.truncated
        self._queued_pairs, self._pairs_per_second = scored.queued_pairs, scored.pairs_per_second
        if not len(self._items):
            first = f"{self._failures[0]['id']!r} ({self._failures[0]['reason']})"
            return Refused("scorer_failed", f"the cross-encoder cannot score items such as {first}; mend or remove them")
        return scored

    def _describe_round(self) -> Mapping[str, Any]:
        """The ranking so far, and for the trace what this round asked and got."""
        ids = self._index.corpus.items.ids
        number, last = self.rounds_done, self._found_in == self.rounds_done
        if self._job.trace:
            asked = [{"id": ids[i], "score": float(s)} for i, s in zip(self._items[last], self._scores[last], strict=True)]
            milliseconds = round((time.monotonic() - self._started) * 1000, 1)
            self._trace.append({"round": number, "after_ms": milliseconds, "scored": asked})
        return {"round": number, "rounds": self._job.rounds, "ce_calls": len(self._asked), "results": self._results()}

    def _results(self) -> list[dict[str, Any]]:
        """The best `top_k` of what was scored; ties go to the smaller item index."""
        best = order_by_score(self._items, self._scores)[: self._job.top_k]
        return [self._describe_item(int(self._items[row]), float(self._scores[row]), int(self._found_in[row])) for row in best]

    def _describe_item(self, item: int, score: float, found_in: int | None) -> dict[str, Any]:
        items = self._index.corpus.items
        named = {"title": items.titles[item]} if items.titles[item] else {}
        exact = {"exact": True, "round": found_in} if found_in is not None else {"exact": False}
        return {"id": items.ids[item], "score": score, **exact, **named, "text": items.texts[item]}

    async def _finish(self, stopped: Refused | None, nearest: Nearest | None) -> SearchReply | Refused:
        """The reply, which may be degraded, or the refusal where there is nothing to give or nothing else was asked for."""
        job = self._job
        if stopped is not None:
            is_open = stopped.kind == "scorer_failed" and job.fail_open and nearest is not None
            if not (is_open or (stopped.kind == "deadline" and len(self._items))):
                return replace(stopped, ce_calls=len(self._asked), tokens=self._tokens)
        results = self._results()
        missing = job.top_k - len(results)
        is_open_and_empty = stopped is not None and not results
        if nearest is not None and missing > 0 and (job.return_all or is_open_and_empty):
            results += await self._approximate(nearest, missing)
        scored_before = [hit["round"] < self.rounds_done for hit in results if hit["exact"]]
        degraded = {
            "deadline": stopped is not None and stopped.kind == "deadline",
            "scorer_error": bool(self._failures) or (stopped is not None and stopped.kind == "scorer_failed"),
            "rounds_done": self.rounds_done,
        }
        body: dict[str, Any] = {
            "results": results,
            "score_type": "logit",
            "usage": {"ce_calls": len(self._asked), "cache_hits": 0, "truncated": self._truncated, "tokens": self._tokens},
            "degraded": degraded,
            "index_version": self._index.version,
            "timing_ms": {name: round(seconds * 1000, 2) for name, seconds in self._seconds.items()},
        }
        if self._failures:
            body["failures"] = self._failures
        if job.trace:
            body["trace"] = self._trace
        proxy = sum(scored_before) / len(scored_before) if scored_before and self.rounds_done > 1 else 0.0
        return SearchReply(body, proxy, self._queued_pairs, self._pairs_per_second)

    async def _approximate(self, nearest: Nearest, n: int) -> list[dict[str, Any]]:
        """The n best items that the CE has not scored, with the scores that are estimated for them."""
        n = min(n, len(self._index.corpus.items) - len(self._outside) - len(self._asked))
        if not n:
            return []
        found = await self._ask(nearest(n, self._asked))
        scale: ScoreScale = self._index.factorization.scale
        logits = found.approx_score / scale.beta + scale.alpha
        return [self._describe_item(int(i), float(score), None) for i, score in zip(found.item_index, logits, strict=True)]
