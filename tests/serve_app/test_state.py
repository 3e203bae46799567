"""Health, what the app says of itself, and its metrics."""

import json
import time
from pathlib import Path

import prometheus_client.parser

from serve_app.index_folder import open_index


def samples(client):
    """Values of `/metrics` by name and labels."""
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in prometheus_client.parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_health_readiness_and_description(client, app_args):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    said = client.get("/info").json()
    assert said["model"] == {"name": app_args.cross_encoder, "scorer": "known-v1"}
    assert said["index"]["version"] == open_index(app_args).version
    assert said["index"]["items"] == 60
    assert said["limits"]["max_documents"] == 100
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [app_args.cross_encoder]


def test_each_request_is_a_line_of_json_under_its_id(client):
    from ray._private.worker import _global_node

    client.post("/v1/search", json={"query": " "}, headers={"x-request-id": "log-me"})
    logs = Path(_global_node.get_logs_dir_path()) / "serve"
    for _ in range(100):
        lines = [line for log in logs.glob("replica_axn_Ingress_*") for line in log.read_text().splitlines() if "log-me" in line]
        if lines:
            break
        time.sleep(0.1)
    (said,) = [json.loads(line) for line in lines]
    assert (said["axn_request_id"], said["axn_route"], said["status"]) == ("log-me", "/v1/search", 400)
    assert said["milliseconds"] > 0


def test_the_page_is_whole_and_safe(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.text.rstrip().endswith("</html>") and 'id="query"' in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_metrics_count_what_was_done(client):
    before = samples(client)
    client.post("/v1/search", json={"query": "a fire", "budget": {"ce_calls": 20, "rounds": 4}})
    client.post("/v1/rerank", json={"query": "a fire", "documents": ["a", "b", "c"]})
    client.post("/v1/rerank", json={"query": "", "documents": ["a"]})
    after = samples(client)

    def grown(name, **labels):
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0) - before.get(key, 0)

    assert grown("axn_ce_calls_total", route="/v1/search") == 20
    assert grown("axn_ce_calls_total", route="/v1/rerank") == 3
    assert grown("axn_rounds_total") == 4
    assert grown("axn_requests_total", route="/v1/search", status="200") == 1
    assert grown("axn_requests_total", route="/v1/rerank", status="400") == 1
    assert grown("axn_search_seconds_count", method="axn") == 1
    assert grown("axn_recall_proxy_count") == 1
    assert grown("axn_tokens_total") > 23
