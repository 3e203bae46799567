import threading
import time
from email.utils import formatdate

import numpy as np
import pytest
from pydantic import SecretStr

from axn_ray.core import remote_cross_encoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.remote_apis import to_logits
from axn_ray.core.remote_cross_encoder import RemoteCrossEncoder
from axn_ray.errors import ModelError
from tests.pair_server import logit, pair_server

QUERIES = ["he ran home", "the bank was closed", "a"]
ITEMS = [f"item {number} " + word for number, word in enumerate("ran home bank closed the a was x".split())]
KINDS = {"axn": "axn", "tei": "tei", "vllm": "vllm", "cohere": "cohere:rerank-v3.5", "jina": "jina:reranker-v2"}
RAW_KINDS = ("axn", "tei", "vllm")


@pytest.fixture
def server():
    with pair_server() as running:
        yield running


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote_cross_encoder, "FIRST_WAIT", 0.005)


def opened(server, kind="tei", **settings):
    scorer = open_cross_encoder(CrossEncoderConfig(cross_encoder=f"{server.url}#{KINDS.get(kind, kind)}", **settings))
    assert isinstance(scorer, RemoteCrossEncoder)
    server.bodies.clear()
    return scorer


def every_pair():
    rng = np.random.default_rng(1)
    order = rng.permutation(len(QUERIES) * len(ITEMS))
    return (order // len(ITEMS)).astype(np.int32), (order % len(ITEMS)).astype(np.int32)


def score(scorer, queries=QUERIES, items=ITEMS):
    return scorer.score_pairs(scorer.tokenize_queries(queries), scorer.tokenize(items), *every_pair())


EXPECTED = np.array([logit(QUERIES[q], ITEMS[i]) for q, i in zip(*every_pair(), strict=True)], dtype=np.float32)


def once(fault):
    """The fault strikes the first request only."""
    left, lock = [fault], threading.Lock()

    def strike(handler, body):
        with lock:
            mine = left.pop() if left else None
        return mine is not None and mine(handler, body)

    return strike


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_logits_in_the_order_asked_whatever_order_the_server_has(server, kind):
    scored = score(opened(server, kind, request_items=5))
    np.testing.assert_allclose(scored.scores, EXPECTED, rtol=1e-5, atol=1e-5)
    assert (scored.failures, scored.n_truncated) == ({}, 0)
    assert len(server.bodies) == 6  # two requests of at most five items for each of three queries


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_is_served_and_not_where(server, kind):
    fingerprint = opened(server, kind).fingerprint
    with pair_server() as elsewhere:
        assert opened(elsewhere, kind).fingerprint == fingerprint
        elsewhere.info |= {"model_sha": "def", "model": {"name": "x", "hash": "def"}}
        if kind in ("axn", "tei"):
            assert opened(elsewhere, kind).fingerprint != fingerprint
    assert server.url not in str(fingerprint)
    assert fingerprint["scores"] == ("logits" if kind in RAW_KINDS else "logits of probabilities")


@pytest.mark.parametrize("kind", RAW_KINDS)
def test_a_server_that_squashes_scores_unasked_is_refused(server, kind):
    server.ignores_raw = True
    with pytest.raises(ModelError, match="so it squashes them; update the server"):
        opened(server, kind)


def test_probabilities_become_the_logits_they_came_from():
    logits = np.array([-60.0, -3.5, 0.0, 2.25, 16.0])
    np.testing.assert_allclose(to_logits(1 / (1 + np.exp(-logits))), logits, rtol=1e-6)
    assert to_logits(np.array([0.0, 1.0, np.nan])).tolist()[:2] == pytest.approx([-69.08, 16.64], abs=0.01)
    with pytest.raises(ValueError, match=r"0 to 1\.5, which are no probabilities"):
        to_logits(np.array([0.0, 1.5]))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, form):
    scorer = opened(server)
    server.times.clear()

    def refuse(handler, _):
        asked = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
        return handler.answer(429, {"error": "overloaded"}, Retry_After=asked)

    server.faults = [once(refuse)]
    assert scorer.score_texts(QUERIES[:1], ITEMS[:1])[0] == pytest.approx(logit(QUERIES[0], ITEMS[0]))
    assert len(server.times) == 2
    assert server.times[1] - server.times[0] >= 0.9


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["500", "503", "drop", "half"])
def test_what_passes_is_tried_again(server, fault):
    faults = {
        "500": lambda handler, _: handler.answer(500, {"error": "boom"}),
        "503": lambda handler, _: handler.answer(503, {"error": "starting"}),
        "drop": lambda handler, _: handler.drop(),
        "half": lambda handler, _: handler.answer(200, [], Content_Length=9999) and handler.drop(),
    }
    scorer = opened(server, in_flight=1)
    server.faults = [once(faults[fault]), once(faults[fault])]
    np.testing.assert_allclose(score(scorer).scores, EXPECTED, rtol=1e-5)
    assert len(server.bodies) == 5


@pytest.mark.usefixtures("quick")
def test_a_slow_answer_is_given_up_and_asked_for_again(server):
    scorer = opened(server, timeout=0.3)
    server.faults = [once(lambda handler, body: time.sleep(1.5) or False)]
    np.testing.assert_allclose(score(scorer).scores, EXPECTED, rtol=1e-5)
    assert len(server.bodies) == 4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", [413, 422, 424, 500])
def test_a_bad_pair_fails_alone_and_is_named(server, status):
    items = [*ITEMS[:3], "a poison item", *ITEMS[4:]]
    scorer = opened(server)
    server.faults = [
        lambda handler, body: "a poison item" in body["texts"] and handler.answer(status, {"error": "cannot\nread this"})
    ]
    scored = score(scorer, items=items)
    bad = every_pair()[1] == 3
    assert sorted(scored.failures) == np.flatnonzero(bad).tolist()
    assert all(f'HTTP {status}: {{"error": "cannot\\nread this"}}' in reason for reason in scored.failures.values())
    np.testing.assert_allclose(scored.scores[~bad], EXPECTED[~bad], rtol=1e-5)
    assert np.isnan(scored.scores[bad]).all()


def test_null_and_empty_texts_and_answers_that_do_not_add_up_fail_alone(server):
    scorer = opened(server, "vllm", request_items=1)

    def fault(handler, body):
        if "null" in body["text_2"]:
            rows = [{"index": n, "score": None if text == "null" else 1.0} for n, text in enumerate(body["text_2"])]
            return handler.answer(200, {"data": rows})
        if "twice" in body["text_2"]:
            return handler.answer(200, {"data": [{"index": 0, "score": 1.0}] * (len(body["text_2"]) + 1)})
        return "html" in body["text_2"] and handler.answer(200, {"detail": "a proxy's page"})

    server.faults = [fault]
    items = ["null", "one", " ", "twice", "html"]
    rows = np.arange(5, dtype=np.int32)
    scored = scorer.score_pairs(("a",), tuple(items), np.zeros_like(rows), rows)
    assert scored.scores[1] == pytest.approx(logit("a", "one"))
    assert sorted(scored.failures) == [0, 2, 3, 4]
    reasons = " | ".join(scored.failures[row] for row in (0, 2, 3, 4))
    for part in ("the score is nan", "the item has no text", "each is due once", "the server's answer is not vllm's"):
        assert part in reasons


def test_requests_in_flight_are_bounded_and_really_at_once(server):
    scorer = opened(server, in_flight=3, request_items=1)
    server.most_at_once = 0
    server.faults = [lambda handler, body: time.sleep(0.05) or False]
    np.testing.assert_allclose(score(scorer).scores, EXPECTED, rtol=1e-5)
    assert server.most_at_once == 3


@pytest.mark.usefixtures("quick")
def test_a_server_that_is_away_or_always_fails_ends_the_run(server):
    with pytest.raises(ModelError, match="does not say what it serves"):
        open_cross_encoder(CrossEncoderConfig(cross_encoder="http://127.0.0.1:9#tei"))
    scorer = opened(server, in_flight=2, request_items=1)
    server.faults = [lambda handler, _: handler.answer(503, {"error": "full"})]
    with pytest.raises(ModelError, match=r"is away or busy \(HTTP 503: .*full.*\) after 6 attempts"):
        score(scorer)
    server.faults = [lambda handler, _: handler.answer(500, {"error": "boom"})]
    with pytest.raises(ModelError, match=r"failed 16 requests in a row \(last: HTTP 500"):
        score(scorer)
    server.faults = [lambda handler, _: handler.answer(429, {"error": "quota"}, Retry_After=86400)]
    with pytest.raises(ModelError, match=r"asks to wait 86,400 s"):
        score(scorer)


def test_a_wrong_key_or_model_is_not_tried_twice(server):
    scorer = opened(server)
    server.faults = [lambda handler, _: handler.answer(401, {"message": "no such key"})]
    with pytest.raises(ModelError, match="refused .*no such key.*; check the address, the model's name and api_key"):
        scorer.score_texts(QUERIES[:1], ITEMS[:1])
    assert len(server.bodies) == 1


def test_key_and_model_and_truncation_reach_the_server(server):
    scorer = opened(server, "tei", api_key=SecretStr("s3cret"))
    scorer.score_texts(["q"], ["i"])
    assert {name.lower(): value for name, value in server.headers[-1].items()}["authorization"] == "Bearer s3cret"
    assert server.bodies[-1] == {"query": "q", "texts": ["i"], "raw_scores": True, "truncate": True}
    opened(server, "cohere").score_texts(["q"], ["i"])
    assert server.bodies[-1] == {"query": "q", "documents": ["i"], "model": "rerank-v3.5"}
    opened(server, "vllm", overlong="error").score_texts(["q"], ["i"])
    assert server.bodies[-1] == {"text_1": "q", "text_2": ["i"], "use_activation": False}
    assert "s3cret" not in repr(CrossEncoderConfig(api_key=SecretStr("s3cret")))
    with pytest.raises(ValueError, match="only the axn commands look up; give the key itself"):
        CrossEncoderConfig(api_key=SecretStr("env:KEY"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("http://x", {}, "does not say what serves it; add #axn, #tei"),
        ("http://x#grpc", {}, "does not say what serves it"),
        ("http://me:pw@x#tei", {}, "must hold no password"),
        ("http://x#cohere", {}, "does not name its model; name it: http://x#cohere:model"),
        ("http://x#cohere:m", {"max_length": 128}, "max_length=128 is for models that run here"),
        ("http://x#cohere:m", {"overlong": "chunk-max"}, "chunk-max is for models that run here"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is(name, settings, message):
    with pytest.raises(ModelError, match=message):
        open_cross_encoder(CrossEncoderConfig(cross_encoder=name, **settings))
