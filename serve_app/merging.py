"""Merges calls that come one by one into calls for many: whatever waits while one call runs goes into the next.

No timer: a lone caller never waits for company. Knows no model and no Ray.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

X = TypeVar("X")
Y = TypeVar("Y")


class Merged(Generic[X, Y]):
    """`function` of many arguments, awaited with one; at most `max_batch` go into a call, in a thread of its own.

    Where a call for several fails, each is tried alone, so that one bad argument fails alone.
    """

    def __init__(self, function: Callable[[list[X]], Sequence[Y]], max_batch: int) -> None:
        self._function, self._max_batch = function, max_batch
        self._waiting: list[tuple[X, asyncio.Future[Y]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def __call__(self, argument: X) -> Y:
        """The function's value for one argument."""
        answer: asyncio.Future[Y] = asyncio.get_running_loop().create_future()
        self._waiting.append((argument, answer))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [(x, answer) for x, answer in self._waiting[: self._max_batch] if not answer.done()]
            self._waiting = self._waiting[self._max_batch :]
            if batch:
                values = await loop.run_in_executor(self._thread, self._apply, [x for x, _ in batch])
                for (_, answer), value in zip(batch, values, strict=True):
                    _settle(answer, value)
        self._worker = None

    def _apply(self, arguments: list[X]) -> list[Y | Exception]:
        try:
            values: list[Y | Exception] = list(self._function(arguments))
        except Exception as error:
            return [error] if len(arguments) == 1 else [self._apply([x])[0] for x in arguments]
        if len(values) != len(arguments):
            return [RuntimeError(f"{len(arguments)} arguments gave {len(values)} values")] * len(arguments)
        return values


def _settle(answer: "asyncio.Future[Y]", value: Y | Exception) -> None:
    if answer.done():  # the caller is gone
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)
