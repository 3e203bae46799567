"""Dashboard, alerts and monitors name only series that are exported and pods that exist."""

import json
import re

from serve_app.metrics import Metrics
from tests.cluster.manifests import CLUSTER, ROOT, cluster_specs, document, documents, pod_templates
from tests.cluster.metrics_names import COUNTERS, GAUGES, HISTOGRAMS, SERIES

DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
RULES = [rule for group in document("monitoring.yaml", "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = QUERIES + [rule["expr"] for rule in RULES]


def series_in(expression):
    return set(re.findall(r"\b(?:ray_)?axn_\w+", expression))


def test_the_app_exports_these_metrics():
    kinds = {family.name: family.type for family in Metrics().registry.collect()}
    assert {f"{name}_total" for name, kind in kinds.items() if kind == "counter"} == COUNTERS
    assert {name for name, kind in kinds.items() if kind == "histogram"} == HISTOGRAMS
    assert {name for name, kind in kinds.items() if kind == "gauge"} == {"axn_queue_pairs"}  # the one that an ingress can know
    made = re.findall(r'= Gauge\("(\w+)"', (ROOT / "serve_app/cross_encoder.py").read_text())
    assert set(made) == GAUGES


def test_every_series_is_exported():
    for expression in EXPRESSIONS:
        assert series_in(expression), expression
        assert series_in(expression) <= SERIES, expression


def test_the_dashboard_shows_every_metric():
    shown = set().union(*map(series_in, QUERIES))
    for name in COUNTERS | GAUGES | HISTOGRAMS:
        assert any(series.startswith(f"ray_{name}") for series in shown), name


def test_counters_are_rated_and_gauges_are_not():
    for expression in EXPRESSIONS:
        for series in series_in(expression):
            rated = re.search(rf"rate\({series}\[", expression) is not None
            assert rated == (series.removeprefix("ray_") not in GAUGES), expression


def test_brackets_are_balanced():
    for expression in EXPRESSIONS:
        for left, right in ("()", "[]", "{}"):
            assert expression.count(left) == expression.count(right), expression


def test_panels_can_be_drawn():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & mine, f"{panel['title']} lies over another panel"
        cells |= mine
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    (variable,) = DASHBOARD["templating"]["list"]
    sources = {part["datasource"]["uid"] for panel in panels for part in (panel, *panel["targets"])}
    assert sources == {f"${{{variable['name']}}}"}


def test_alerts_are_named_once_and_say_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert ";" in rule["annotations"]["summary"]


def test_monitors_find_head_and_workers_by_a_port_that_the_pods_have():
    monitors = [manifest for manifest in documents("monitoring.yaml") if manifest["kind"] == "PodMonitor"]
    found = {monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"] for monitor in monitors}
    assert found == {"head", "worker"}
    ports = {endpoint["port"] for monitor in monitors for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for spec in cluster_specs().values():
        for template in pod_templates(spec).values():
            assert ports <= {port["name"] for port in template["spec"]["containers"][0]["ports"]}
