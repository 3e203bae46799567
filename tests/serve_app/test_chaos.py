"""Things that go wrong under load: killed or stuck replicas, a rolling update, a thousand clients that leave."""

import asyncio
import threading
import time
from contextlib import suppress

import httpx
import psutil
import pytest

from serve_app.app import build_app
from tests.serve_app.test_load import run, statistics, until_idle

BODY = {"query": "slow somebody sang", "top_k": 60, "budget": {"ce_calls": 20, "rounds": 4}}


def replicas(deployment, name="axn"):
    """Processes of a deployment, of this test session alone."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended since
            title = next(iter(child.cmdline()), "")  # while a method runs, its name follows after a dot
            found += [child] * (title.split(".")[0] == f"ray::ServeReplica:{name}:{deployment}")
    return found


async def load(client, stop, answers):
    """One client that searches again and again."""
    while not stop.is_set():
        answers.append(await client.post("/v1/search", json=BODY, timeout=120))


async def under_load(client, disturb, enough=12):
    """Searches of four clients, of which `disturb` is in the middle of; then until each has been answered since."""
    stop, answers = threading.Event(), []
    clients = [asyncio.create_task(load(client, stop, answers)) for _ in range(4)]
    while len(answers) < 4:
        await asyncio.sleep(0.05)
    await disturb()
    done = len(answers)
    while len(answers) < done + enough:
        await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*clients)
    return answers


def check(answers, expected):
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200]
    for answer in answers:
        body = answer.json()
        assert body["results"] == expected["results"]
        assert body["usage"]["ce_calls"] == 20


@pytest.mark.parametrize("deployment", ["CrossEncoder", "Retriever"])
def test_a_replica_killed_under_load_costs_no_request(url, deployment):
    async def ask(client):
        expected = (await client.post("/v1/search", json=BODY)).json()
        (victim,) = replicas(deployment)

        async def disturb():
            victim.kill()

        answers = await under_load(client, disturb)
        assert [process.pid for process in replicas(deployment)] != [victim.pid]
        return answers, expected

    check(*run(ask, url))


def test_a_rolling_update_under_load_costs_no_request(url, app_args):
    from ray import serve

    changed = app_args.model_copy(update={"stuck_after_s": 61.0})
    before = {process.pid for name in ("Ingress", "Retriever", "CrossEncoder") for process in replicas(name)}

    async def ask(client):
        expected = (await client.post("/v1/search", json=BODY)).json()

        async def disturb():
            await asyncio.to_thread(serve.run, build_app(changed), name="axn", route_prefix="/")

        return await under_load(client, disturb), expected

    check(*run(ask, url))
    after = {process.pid for name in ("Ingress", "Retriever", "CrossEncoder") for process in replicas(name)}
    assert not before & after


def test_a_thousand_clients_that_leave(url):
    host, port = httpx.URL(url).host, httpx.URL(url).port
    body = b'{"query": "slow a fire", "budget": {"ce_calls": 30, "rounds": 3}}'
    head = f"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def leave():
        _, writer = await asyncio.open_connection(host, port)
        writer.write(head.encode() + body)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()

    async def shed(client):
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("axn_shed_total"))

    def memory():
        found = [process for name in ("Ingress", "Retriever", "CrossEncoder") for process in replicas(name)]
        assert len(found) == 3
        return sum(process.memory_info().rss for process in found) / 2**20

    async def ask(client):
        async with asyncio.timeout(60):
            while any(len(replicas(name)) != 1 for name in ("Ingress", "Retriever", "CrossEncoder")):
                await asyncio.sleep(0.1)  # those that the update replaced end
        await client.post("/v1/search", json=BODY)
        before, start, refused = memory(), await statistics(client), await shed(client)
        for _ in range(20):
            await asyncio.gather(*(leave() for _ in range(50)))
        polls = 0
        async with asyncio.timeout(60):  # the app hears of those who left one by one; until then they hold their places
            while (answer := await client.post("/v1/search", json={**BODY, "query": "somebody sang"})).status_code == 429:
                polls += 1
                await asyncio.sleep(0.1)
        end = await until_idle(client)
        admitted = 1000 - (await shed(client) - refused - polls)
        return answer, memory() - before, end["pairs"] - start["pairs"], admitted

    answer, grown, pairs, admitted = run(ask, url)
    assert answer.status_code == 200
    assert admitted >= 50
    assert pairs < 30 * admitted / 2  # of those that got in most pairs never reached the model
    assert grown < 100  # MB, of three processes


def test_a_cross_encoder_that_hangs_meets_the_deadline_and_is_replaced(serve_url, app_args):
    from ray import serve

    args = app_args.model_copy(update={"deadline_ms": 3000, "stuck_after_s": 1.0})
    serve.run(build_app(args), name="hang", route_prefix="/hang")
    with httpx.Client(base_url=f"{serve_url}/hang", timeout=30) as client:
        body = {**BODY, "query": "somebody hangs"}
        cut = client.post("/v1/search", json=body).json()
        assert cut["degraded"] == {"deadline": True, "scorer_error": False, "rounds_done": 1}
        assert cut["usage"]["ce_calls"] == len(cut["results"]) == 5
        assert client.post("/v1/rerank", json={"query": "who", "documents": ["a"]}).status_code == 504
        (stuck,) = replicas("CrossEncoder", "hang")
        end, statuses = time.monotonic() + 90, []
        while not statuses or statuses[-1] != 200:
            assert time.monotonic() < end, statuses
            statuses.append(client.post("/v1/search", json={**BODY, "query": "somebody sang", "deadline_ms": 500}).status_code)
        assert set(statuses) == {504, 200}
        assert {process.pid for process in replicas("CrossEncoder", "hang")} - {stuck.pid}
    serve.delete("hang", _blocking=False)
