"""`POST /v1/search` over real HTTP: the same results as the search in one process, an exact budget, honest when cut short."""

import json

import numpy as np
import pytest

from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.searcher import SearchConfig, Searcher
from tests.serve_app.conftest import KNOWN, N_ITEMS
from tests.serve_app.scorers import known_score

QUERY = "somebody who sang on a stage"


@pytest.fixture(scope="module")
def corpus(index_folder):
    return load_embedded_corpus(index_folder / "embeddings")


def searched_here(corpus, index_folder, query, budget, rounds):
    """(id, score, round) of every scored item, by the search in one process."""
    config = SearchConfig(cross_encoder=KNOWN, budget=budget, rounds=rounds, top_k=budget)
    searcher = Searcher(corpus, index_folder / "bayes", config)
    return [(hit.item_id, hit.score, hit.round) for hit in searcher.hits(searcher.search(query))]


def events(response):
    """(kind, body) of each server-sent event."""
    found = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def ask(client, **body):
    return client.post("/v1/search", json={"query": QUERY, "budget": {"ce_calls": 20, "rounds": 4}, **body})


@pytest.mark.parametrize(("budget", "rounds"), [(20, 4), (7, 1), (N_ITEMS, 5), (11, 3)])
def test_finds_what_the_search_in_one_process_finds(client, corpus, index_folder, budget, rounds):
    answer = ask(client, top_k=1000, budget={"ce_calls": budget, "rounds": rounds}).json()
    found = [(hit["id"], hit["score"], hit["round"]) for hit in answer["results"]]
    assert found == searched_here(corpus, index_folder, QUERY, budget, rounds)
    assert answer["usage"]["ce_calls"] == budget
    assert all(hit["exact"] for hit in answer["results"])
    assert answer["degraded"] == {"deadline": False, "scorer_error": False, "rounds_done": rounds}
    assert answer["score_type"] == "logit"
    assert set(answer["timing_ms"]) == {"total", "scoring", "regression", "retrieval"}


def test_exact_scores_in_order_with_texts(client, corpus):
    answer = ask(client, top_k=5, budget={"ce_calls": 30, "rounds": 3}).json()
    scores = [hit["score"] for hit in answer["results"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    for hit in answer["results"]:
        full_text = f"{hit['title']}: {hit['text']}"
        assert hit["score"] == np.float32(known_score(QUERY, full_text))
        assert corpus.items.texts[corpus.items.index_of[hit["id"]]] == hit["text"]


def test_a_stream_shows_every_round_and_ends_with_the_reply(client):
    settings = {"top_k": 60, "budget": {"ce_calls": 20, "rounds": 4}}
    response = ask(client, stream=True, **settings)
    assert response.headers["content-type"].startswith("text/event-stream")
    *rounds, (last, reply) = events(response)
    assert [kind for kind, _ in rounds] == ["round"] * 4
    assert last == "result"
    assert [body["ce_calls"] for _, body in rounds] == [5, 10, 15, 20]
    seen = [{(hit["id"], hit["score"], hit["round"]) for hit in body["results"]} for _, body in rounds]
    for number, (before, after) in enumerate(zip(seen, seen[1:], strict=False), start=2):
        assert before < after
        assert {found_in for _, _, found_in in after - before} == {number}
    assert reply["results"] == rounds[-1][1]["results"] == ask(client, **settings).json()["results"]


def test_a_list_of_queries_gives_what_each_gives_alone(client):
    queries = [QUERY, "  ", "a fire at night"]
    settings = {"budget": {"ce_calls": 12, "rounds": 2}}
    answers = ask(client, **{**settings, "query": queries}).json()["data"]
    alone = [ask(client, **{**settings, "query": query}).json() for query in queries]
    assert [answer.get("results") for answer in answers] == [answer.get("results") for answer in alone]
    assert answers[1]["error"]["code"] == 400
    assert len({answer["id"] for answer in answers}) == 3


def test_retrieve_and_rerank_scores_the_dual_encoders_first(client, corpus):
    answer = ask(client, method="rnr", top_k=60, budget={"ce_calls": 15, "rounds": 5}).json()
    near = corpus.item_embeddings @ DualEncoder(corpus.dual_encoder).embed_queries([QUERY])[0]
    expected = {corpus.items.ids[i] for i in np.argsort(-near)[:15]}
    assert {hit["id"] for hit in answer["results"]} == expected
    assert {hit["round"] for hit in answer["results"]} == {1}


def test_approximate_scores_fill_up_where_asked(client):
    settings = {"top_k": 25, "budget": {"ce_calls": 10, "rounds": 2}}
    exact = ask(client, **settings).json()["results"]
    filled = ask(client, return_scores="all", **settings).json()
    assert filled["results"][:10] == exact
    assert filled["usage"]["ce_calls"] == 10
    rest = filled["results"][10:]
    assert len(rest) == 15
    assert not any(hit["exact"] for hit in rest)
    assert not {hit["id"] for hit in rest} & {hit["id"] for hit in exact}
    assert [hit["score"] for hit in rest] == sorted((hit["score"] for hit in rest), reverse=True)


@pytest.mark.parametrize("method", ["axn", "rnr"])
def test_a_filter_keeps_items_out_of_every_round(client, corpus, method):
    wanted = {"verb": ["sing", "burn"], "place": ["on stage", "at night", "slowly", "nowhere"]}
    chosen = {"sing on stage", "sing at night", "sing slowly", "burn on stage", "burn at night", "burn slowly"}
    inside = {item for item, text in zip(corpus.items.ids, corpus.items.texts, strict=True) if text in chosen}
    answer = ask(client, filter=wanted, method=method, top_k=60, return_scores="all", budget={"ce_calls": 4, "rounds": 2}).json()
    assert {hit["id"] for hit in answer["results"]} == inside
    assert [hit["exact"] for hit in answer["results"]] == [True] * 4 + [False] * 2
    assert answer["usage"]["ce_calls"] == 4


def test_a_filter_that_lets_in_less_than_the_budget(client):
    few = ask(client, filter={"verb": "walk"}, top_k=60).json()
    assert {hit["title"] for hit in few["results"]} == {"walk"}
    assert few["usage"]["ce_calls"] == 10
    assert few["degraded"]["rounds_done"] == 4
    none = ask(client, filter={"verb": "walk", "place": "nowhere"}, return_scores="all")
    assert none.status_code == 200
    assert (none.json()["results"], none.json()["usage"]["ce_calls"]) == ([], 0)


def test_the_trace_holds_every_scored_item_once(client):
    answer = ask(client, trace=True, top_k=60, budget={"ce_calls": 20, "rounds": 3}).json()
    assert [len(part["scored"]) for part in answer["trace"]] == [7, 7, 6]
    traced = {(item["id"], item["score"]) for part in answer["trace"] for item in part["scored"]}
    assert traced == {(hit["id"], hit["score"]) for hit in answer["results"]}


def test_a_deadline_gives_the_best_so_far(client):
    budget = {"ce_calls": 40, "rounds": 4}
    answer = ask(client, query=f"slow {QUERY}", deadline_ms=900, top_k=60, budget=budget).json()
    degraded = answer["degraded"]
    assert degraded["deadline"]
    assert 1 <= degraded["rounds_done"] < 4
    assert answer["usage"]["ce_calls"] == len(answer["results"]) == 10 * degraded["rounds_done"]


def test_a_deadline_with_nothing_scored_is_504(client):
    response = ask(client, query="sleepy", deadline_ms=300)
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "deadline"


def test_a_broken_cross_encoder_is_424_or_the_last_ranking(client):
    response = ask(client, query="broken")
    assert response.status_code == 424
    assert "the model is broken" in response.json()["message"]
    opened = ask(client, query="broken", fail_open=True, top_k=4)
    assert opened.status_code == 200
    assert opened.json()["degraded"] == {"deadline": False, "scorer_error": True, "rounds_done": 0}
    assert [hit["exact"] for hit in opened.json()["results"]] == [False] * 4
    assert ask(client).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"query": " "}, 400, "the query is empty; give some text"),
        ({"query": []}, 400, "the list of queries is empty"),
        ({"query": ["a"] * 65}, 422, "65 queries exceed the limit of 64"),
        ({"query": ["a"], "stream": True}, 422, "stream=true takes one query"),
        ({"budget": {"ce_calls": 61}}, 422, "budget=61 exceeds the 60 items in the index"),
        ({"budget": {"ce_calls": 1001}}, 422, "budget.ce_calls=1001 exceeds the limit of 1000"),
        ({"budget": {"ce_calls": 2, "rounds": 3}}, 422, "rounds=3 exceeds budget=2"),
        ({"budget": {"ce_call": 2}}, 422, "unknown field 'budget.ce_call'; did you mean 'ce_calls'?"),
        ({"topk": 2}, 422, "unknown field 'topk'; did you mean 'top_k'?"),
        ({"filter": {"colour": "red"}}, 422, "the items have no column 'colour' to filter by; their columns: place, verb"),
        ({"filter": {"verb": 7}}, 422, "filter.verb"),
        ({"filter": "verb"}, 422, "filter: Input should be a valid dictionary"),
        ({"top_k": 0}, 422, "top_k: Input should be greater than or equal to 1"),
        ({"query": "\ud800"}, 422, "lone surrogate"),
    ],
)
def test_bad_requests_say_what_is_wrong(client, body, status, said):
    for stream in ({}, {"stream": True}) if isinstance(body.get("query", ""), str) else ({},):
        content = json.dumps({"query": QUERY, **body, **stream})
        headers = {"x-request-id": "mine-1", "content-type": "application/json"}
        response = client.post("/v1/search", content=content, headers=headers)
        assert response.status_code == status
        answer = response.json()
        assert said in answer["message"]
        assert answer["error"]["message"] == answer["message"]
        assert answer["error"]["code"] == status
        assert answer["id"] == response.headers["x-request-id"] == "mine-1"
