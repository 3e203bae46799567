"""Merged calls: everybody gets the value of their own argument, few calls are made, a bad argument fails alone."""

import asyncio
import threading

import pytest

from serve_app.merging import Merged


def test_what_waits_goes_into_one_call():
    calls, gate = [], threading.Event()

    def square(numbers):
        assert gate.wait(5)
        calls.append(list(numbers))
        return [number * number for number in numbers]

    async def ask():
        merged = Merged(square, max_batch=4)
        asked = [asyncio.create_task(merged(number)) for number in range(10)]
        await asyncio.sleep(0.05)
        asked[5].cancel()
        gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    values = asyncio.run(ask())
    assert isinstance(values.pop(5), asyncio.CancelledError)
    assert values == [number * number for number in range(10) if number != 5]
    assert len(calls) == 3
    assert max(map(len, calls)) <= 4


def test_a_bad_argument_fails_alone_and_a_wrong_count_is_found():
    def invert(numbers):
        return [1 / number for number in numbers]

    async def ask(function):
        merged = Merged(function, max_batch=8)
        return await asyncio.gather(*(merged(number) for number in (1, 0, 2)), return_exceptions=True)

    one, bad, half = asyncio.run(ask(invert))
    assert (one, half) == (1, 0.5)
    assert isinstance(bad, ZeroDivisionError)
    found = asyncio.run(ask(lambda numbers: [1]))
    assert [(type(each), str(each)) for each in found] == [(RuntimeError, "3 arguments gave 1 values")] * 3
    with pytest.raises(RuntimeError, match="1 arguments gave 2 values"):
        asyncio.run(Merged(lambda numbers: [1, 2], max_batch=8)(1))
