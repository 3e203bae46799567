"""A load in a process of its own, closed loop: `python -m tests.benchmarks.load URL CLIENTS SECONDS < bodies.json`."""

import asyncio
import json
import sys
import time

import httpx


async def drive(url, clients, seconds, bodies):
    """Latencies in seconds and statuses of all requests that ended within `seconds`, after one uncounted each."""
    done, numbers = [], iter(range(10**9))

    async def one(client):
        await client.post(url, json=bodies[next(numbers) % len(bodies)])
        while time.monotonic() < end:
            start = time.monotonic()
            answer = await client.post(url, json=bodies[next(numbers) % len(bodies)])
            done.append((time.monotonic() - start, answer.status_code))

    limits = httpx.Limits(max_connections=clients)
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return done


def main():
    """Print one JSON object: seconds and statuses."""
    url, clients, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    start = time.monotonic()
    done = asyncio.run(drive(url, clients, seconds, json.load(sys.stdin)))
    facts = {"seconds": [s for s, _ in done], "statuses": [status for _, status in done], "took": time.monotonic() - start}
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
