"""The drop-in routes, driven by the clients that people have: cohere's SDK, LiteLLM, TEI's shape, vLLM's and Jina's."""

import math

import cohere
import numpy as np
import pytest

from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.open_cross_encoder import open_cross_encoder
from tests.serve_app.scorers import known_score

QUERY = "who sang"
DOCUMENTS = ["a bird sang", "the tree burned", "", "they carried it home", "poison", "a choir of the sea"]
GOOD = [0, 1, 3, 5]


def sigmoid(query, document):
    return 1 / (1 + math.exp(-np.float32(known_score(query, document))))


def ranking(documents=DOCUMENTS, rows=GOOD):
    return sorted(rows, key=lambda row: -known_score(QUERY, documents[row]))


def check_scores(results, name="relevance_score"):
    assert [result["index"] for result in results] == ranking()
    for result in results:
        assert result[name] == pytest.approx(sigmoid(QUERY, DOCUMENTS[result["index"]]), abs=1e-6)


@pytest.mark.parametrize("route", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_a_bad_document_fails_alone(client, route):
    answer = client.post(route, json={"query": QUERY, "documents": DOCUMENTS}).json()
    check_scores(answer["results"])
    assert answer["failures"] == [
        {"index": 2, "message": "the item has no text"},
        {"index": 4, "message": "ValueError: this item breaks the model"},
    ]


@pytest.mark.parametrize(("top_n", "expected"), [(None, 4), (0, 4), (2, 2), (99, 4)])
def test_top_n_and_documents(client, top_n, expected):
    body = {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS], "top_n": top_n, "return_documents": True}
    answer = client.post("/v1/rerank", json=body).json()
    assert [result["index"] for result in answer["results"]] == ranking()[:expected]
    for result in answer["results"]:
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert answer["usage"]["total_tokens"] > 0
    plain = client.post("/v1/rerank", json={**body, "return_documents": False}).json()
    assert not any("document" in result for result in plain["results"])


def test_ties_go_to_the_smaller_index(client):
    answer = client.post("/v1/rerank", json={"query": QUERY, "documents": ["same", "other", "same", "same"]}).json()
    same = [result["index"] for result in answer["results"] if result["index"] != 1]
    assert same == [0, 2, 3]


def test_long_documents_are_cut_where_asked(client):
    body = {"query": QUERY, "documents": ["a bird sang loudly", "a bird"], "max_tokens_per_doc": 2}
    results = client.post("/v2/rerank", json=body).json()["results"]
    assert [result["relevance_score"] for result in results] == pytest.approx([sigmoid(QUERY, "a bird")] * 2, abs=1e-6)


def test_a_list_longer_than_a_batch(client):
    documents = [f"document number {n}" for n in range(100)]
    answer = client.post("/v1/rerank", json={"query": QUERY, "documents": documents}).json()
    assert [result["index"] for result in answer["results"]] == ranking(documents, range(100))


def test_tei(client):
    body = {"query": QUERY, "texts": DOCUMENTS, "return_text": True, "truncate": True}
    answer = client.post("/rerank", json=body).json()
    check_scores(answer, "score")
    assert all(result["text"] == DOCUMENTS[result["index"]] for result in answer)
    raw = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}).json()
    assert [(r["index"], r["score"]) for r in raw] == [(i, np.float32(known_score(QUERY, DOCUMENTS[i]))) for i in ranking()]
    assert "text" not in raw[0]


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": QUERY, "text_2": DOCUMENTS},
        {"queries": [QUERY], "documents": DOCUMENTS},
        {"text_1": [QUERY] * 6, "text_2": DOCUMENTS},
    ],
)
def test_vllm_score(client, body):
    answer = client.post("/v1/score", json=body).json()
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(6))
    for row, entry in enumerate(answer["data"]):
        expected = pytest.approx(sigmoid(QUERY, DOCUMENTS[row]), abs=1e-6) if row in GOOD else None
        assert entry["score"] == expected


def test_pairs_of_different_queries(client):
    answer = client.post("/v1/score", json={"text_1": ["one", "two"], "text_2": ["a", "b"]}).json()
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == pytest.approx([sigmoid("one", "a"), sigmoid("two", "b")], abs=1e-6)


def test_cohere_v1(url):
    with cohere.Client(api_key="none", base_url=url) as client:
        answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=3, return_documents=True)
    assert [result.index for result in answer.results] == ranking()[:3]
    assert answer.results[0].document.text == DOCUMENTS[ranking()[0]]
    assert answer.results[0].relevance_score == pytest.approx(sigmoid(QUERY, DOCUMENTS[ranking()[0]]), abs=1e-6)


def test_cohere_v2(url):
    with cohere.ClientV2(api_key="none", base_url=url) as client:
        answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=2)
        assert [result.index for result in answer.results] == ranking()[:2]
        with pytest.raises(cohere.BadRequestError) as refused:
            client.rerank(model="rerank-v3.5", query=" ", documents=DOCUMENTS)
    assert refused.value.body["message"] == "the query is empty; give some text"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # litellm's own
@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "infinity", "hosted_vllm", "huggingface"])
def test_litellm(url, provider):
    import litellm

    asked = {"model": f"{provider}/any", "api_base": url, "api_key": "none", "query": QUERY, "documents": DOCUMENTS}
    # Its `infinity` takes a document for a string, where the others take an object.
    answer = litellm.rerank(**asked, top_n=3, return_documents=provider != "infinity")
    assert [result["index"] for result in answer.results][:3] == ranking()[:3]
    for result in answer.results:
        assert result["relevance_score"] == pytest.approx(sigmoid(QUERY, DOCUMENTS[result["index"]]), abs=1e-6)
    with pytest.raises(Exception, match="the query is empty; give some text"):
        litellm.rerank(**{**asked, "query": " "})


@pytest.mark.parametrize(
    ("route", "body", "status", "said"),
    [
        ("/v1/rerank", {"query": "", "documents": ["a"]}, 400, "the query is empty"),
        ("/v1/rerank", {"query": "q", "documents": []}, 400, "there are no documents"),
        ("/rerank", {"query": "q", "texts": []}, 400, "there are no texts"),
        ("/v2/rerank", {"query": "q", "documents": ["a"] * 101}, 422, "101 documents exceed the limit of 100"),
        ("/v1/rerank", {"query": "q"}, 422, "documents: Field required"),
        ("/v1/rerank", {"query": "q", "documents": ["poison", " "]}, 424, "no document could be scored"),
        ("/v1/rerank", {"query": "broken", "documents": ["a"]}, 424, "the model is broken"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 422, "2 and 1 texts do not pair up"),
        ("/v1/score", {"text_1": "a"}, 422, "text_2 is missing"),
        ("/v1/rerank", {"query": "q", "documents": ["a" * 100_000]}, 413, "the body exceeds 100000 bytes"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_errors_have_one_body(client, route, body, status, said):
    response = client.post(route, json=body)
    assert response.status_code == status
    answer = response.json()
    assert said in answer["message"]
    assert answer["error"]["message"] == answer["message"]
    assert answer["error"]["code"] == status
    assert answer["id"] == response.headers["x-request-id"]


def test_unknown_fields_are_ignored_on_routes_of_others(client):
    body = {"query": QUERY, "documents": ["a"], "priority": 3, "rank_fields": ["x"]}
    assert client.post("/v1/rerank", json=body).status_code == 200


def test_the_app_is_a_cross_encoder_to_others(url):
    remote = open_cross_encoder(CrossEncoderConfig(cross_encoder=f"{url}#axn"))
    items = ["run home", "a poison item", "walk uphill"]
    rows = np.arange(3, dtype=np.int32)
    scored = remote.score_pairs(("they run",), tuple(items), np.zeros_like(rows), rows)
    assert list(scored.failures) == [1]
    np.testing.assert_allclose(scored.scores[[0, 2]], [known_score("they run", items[0]), known_score("they run", items[2])])
    assert remote.fingerprint["served"] == {"scorer": "known-v1"}
