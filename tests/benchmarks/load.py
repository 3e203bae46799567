"""A load in a process of its own, closed loop: `python -m tests.benchmarks.load URL CLIENTS SECONDS < bodies.json`."""

import asyncio
import itertools
import json
import sys
import time

import httpx

WARM_UP = 4


async def drive(url, clients, seconds, bodies):
    """(latency in seconds, status, when it ended) of all requests that began within `seconds`, after a few uncounted ones.

    And the time that they took together.
    """
    done, numbers = [], itertools.count()

    async def ask(client):
        start = time.monotonic()
        answer = await client.post(url, json=bodies[next(numbers) % len(bodies)])
        return time.monotonic() - start, answer.status_code, time.time()

    async def ask_again(client, end):
        while time.monotonic() < end:
            done.append(await ask(client))

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:
        await asyncio.gather(*(ask(client) for _ in range(min(clients, WARM_UP))))
        start = time.monotonic()
        await asyncio.gather(*(ask_again(client, start + seconds) for _ in range(clients)))
    return done, time.monotonic() - start


def main():
    """Print one JSON object: seconds, statuses and when each request ended."""
    url, clients, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    done, took = asyncio.run(drive(url, clients, seconds, json.load(sys.stdin)))
    seconds, statuses, ended = zip(*done, strict=True)
    json.dump({"seconds": seconds, "statuses": statuses, "ended": ended, "took": took}, sys.stdout)


if __name__ == "__main__":
    main()
