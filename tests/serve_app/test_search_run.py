"""One search on its way, with scores and items from functions: what an item that cannot be scored costs it."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from axn_ray.core.adaptive import search
from axn_ray.core.corpus import Items
from axn_ray.core.estimators import Ridge
from axn_ray.core.index import ItemIndex, Retrieve
from axn_ray.core.score_matrix import ScoreScale
from serve_app.messages import Refused, Scored, SearchJob, SearchReply
from serve_app.search_run import SearchRun

N_ITEMS, DIM = 40, 4
RNG = np.random.default_rng(0)
VECTORS, QUERY = RNG.normal(size=(N_ITEMS, DIM)).astype(np.float32), RNG.normal(size=DIM).astype(np.float32)
ITEMS = Items(tuple(f"i{n}" for n in range(N_ITEMS)), ("",) * N_ITEMS, ("text",) * N_ITEMS)


def run(bad, replaced_in=9, **settings):
    """The end of a search of 20 items in 4 rounds whose `bad` items cannot be scored, and all items that were asked for.

    From round `replaced_in` on another cross-encoder scores.
    """
    asked, index = [], ItemIndex(VECTORS)
    corpus = SimpleNamespace(corpus=SimpleNamespace(items=ITEMS), version="v", factorization=SimpleNamespace(scale=ScoreScale()))

    async def score(chosen, left_s, is_admitted):
        asked.extend(chosen.tolist())
        failures = {row: "it has no text" for row, item in enumerate(chosen) if item in bad}
        scores = (VECTORS[chosen] @ QUERY).astype(np.float32)
        scores[list(failures)] = np.nan
        scorer = "old" if len(asked) <= 5 * (replaced_in - 1) else "new"
        return Scored(scores, failures, 0, 3 * (len(chosen) - len(failures)), 0, scorer=scorer)

    async def retrieve(request):
        return index.retrieve([request])[0]

    async def start(job, excluded):
        estimator = Ridge(VECTORS, ScoreScale(), QUERY, 0.1)
        running = search(estimator, None, n_items=N_ITEMS, budget=job.ce_calls, rounds=job.rounds)
        return running, lambda n, known: Retrieve(estimator.query_embedding, n, known)

    async def last():
        job = SearchJob(query="q", top_k=10, ce_calls=20, rounds=4, timeout_s=30, **settings)
        return [message async for message in SearchRun(job, corpus, retrieve, score).run(start)][-1]

    return asyncio.run(last()), asked


def test_one_item_fails_alone_spends_its_call_and_is_named():
    best = int((VECTORS @ QUERY).argmax())
    reply, asked = run({best}, return_all=True)
    assert isinstance(reply, SearchReply)
    assert len(set(asked)) == len(asked) == 20
    assert reply.body["usage"]["ce_calls"] == 20
    assert reply.body["failures"] == [{"id": f"i{best}", "reason": "it has no text"}]
    assert reply.body["degraded"] == {"deadline": False, "scorer_error": True, "rounds_done": 4}
    found = [hit["id"] for hit in reply.body["results"]]
    assert len(found) == 10 and f"i{best}" not in found


def test_without_a_failure_the_reply_names_none():
    reply, _ = run(set())
    assert "failures" not in reply.body and not reply.body["degraded"]["scorer_error"]


def test_a_round_of_which_nothing_can_be_scored_ends_no_search():
    _, asked = run(set())
    reply, again = run(set(asked[10:15]))
    assert again[:15] == asked[:15]
    assert len(set(again)) == reply.body["usage"]["ce_calls"] == 20
    assert [failure["id"] for failure in reply.body["failures"]] == [f"i{item}" for item in asked[10:15]]
    assert reply.body["degraded"]["rounds_done"] == 4
    assert {hit["round"] for hit in reply.body["results"]} <= {1, 2, 4}


@pytest.mark.parametrize("fail_open", [False, True])
def test_scores_of_two_cross_encoders_are_never_ranked_together(fail_open):
    refused, asked = run(set(), replaced_in=3, fail_open=fail_open)
    assert isinstance(refused, Refused) and refused.kind == "not_ready"
    assert "the cross-encoder was replaced" in refused.message
    assert len(asked) == 15
    assert (refused.ce_calls, refused.tokens) == (10, 30), "two rounds were scored, and are counted"


@pytest.mark.parametrize("fail_open", [False, True])
def test_where_nothing_can_be_scored_the_search_ends(fail_open):
    reply, asked = run(set(range(N_ITEMS)), fail_open=fail_open)
    assert len(asked) == 5
    if not fail_open:
        assert isinstance(reply, Refused) and reply.kind == "scorer_failed"
        assert "cannot score items such as" in reply.message and "it has no text" in reply.message
        return
    assert [hit["exact"] for hit in reply.body["results"]] == [False] * 10
    assert reply.body["degraded"]["scorer_error"]
