"""More than the app can do, and clients that leave: pairs go with them, refusals say when to come back, nothing is lost."""

import asyncio
import time

import httpx
import pytest


async def statistics(client):
    """The cross-encoder's own counts, by way of its handle."""
    from ray import serve

    handle = serve.get_deployment_handle("CrossEncoder", app_name="axn")
    return await handle.statistics.remote()


async def until_idle(client):
    async with asyncio.timeout(20):
        while (found := await statistics(client))["queued_pairs"]:
            await asyncio.sleep(0.05)
    return found


def run(ask, url):
    async def opened():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            return await ask(client)

    return asyncio.run(opened())


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/rerank", {"query": "slow", "documents": [f"document number {n}" for n in range(100)]}),
        ("/v1/search", {"query": "slow", "budget": {"ce_calls": 60, "rounds": 2}}),
        ("/v1/search", {"query": "slow", "budget": {"ce_calls": 60, "rounds": 2}, "stream": True}),
    ],
)
def test_a_client_that_leaves_takes_its_pairs_along(url, route, body):
    pairs = 100 if "documents" in body else 60

    async def ask(client):
        before = await until_idle(client)
        with pytest.raises(httpx.ReadTimeout):
            await client.post(route, json=body, timeout=0.5)
        await until_idle(client)
        await asyncio.sleep(0.5)  # the batch at work ends
        left = await statistics(client)
        await asyncio.sleep(1.0)
        after = await statistics(client)
        assert after == left  # nothing goes on behind the client's back
        return after["pairs"] - before["pairs"]

    assert 0 < run(ask, url) < pairs


def test_a_burst_is_shed_with_429_and_the_app_recovers(url):
    async def ask(client):
        await until_idle(client)
        body = {"query": "slow", "documents": [f"document {n}" for n in range(50)]}
        answers = await asyncio.gather(*(client.post("/v1/rerank", json=body) for _ in range(80)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert len(refused) >= 70  # room for 200 pairs, 4000 asked
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["type"] == "overloaded"
        started = time.monotonic()
        assert (await client.post("/v1/rerank", json={**body, "query": "quick"})).status_code == 200
        return time.monotonic() - started

    assert run(ask, url) < 20


def test_concurrent_searches_find_what_each_finds_alone(url):
    bodies = [{"query": f"somebody who {word}", "top_k": 60, "budget": {"ce_calls": 16, "rounds": 4}} for word in "abcdefghij"]

    async def ask(client):
        alone = [(await client.post("/v1/search", json=body)).json() for body in bodies]
        together = await asyncio.gather(*(client.post("/v1/search", json=body) for body in bodies))
        return alone, [answer.json() for answer in together]

    for alone, together in zip(*run(ask, url), strict=True):
        assert [hit["id"] for hit in together["results"]] == [hit["id"] for hit in alone["results"]]
        assert together["usage"]["ce_calls"] == 16
