"""Spans: one a round, below the caller's trace, received by a collector over HTTP; the exporter only where one is named."""

import subprocess
import sys

from tests.serve_app.collector import facts_of, open_collector

PROGRAM = """
from opentelemetry import trace
from serve_app.tracing import set_up_tracing, span
set_up_tracing("Retriever")
caller = {"traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"}
with span("search", caller, method="axn") as carrier:
    for number in (1, 2):
        with span("round", carrier, round=number, pairs=20):
            pass
provider = trace.get_tracer_provider()
print(type(provider).__name__)
if hasattr(provider, "shutdown"):
    provider.shutdown()
"""


def run_program(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_collector_receives_search_and_rounds_below_the_callers_trace(monkeypatch):
    with open_collector() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
        assert run_program(monkeypatch, **settings) == "TracerProvider"
    assert {deployment for deployment, _ in collector.spans} == {"Retriever"}
    spans = {(span.name, facts_of(span).get("round")): span for _, span in collector.spans}
    assert set(spans) == {("search", None), ("round", 1), ("round", 2)}
    search = spans["search", None]
    assert search.parent_span_id.hex() == "0123456789abcdef"
    for span in spans.values():
        assert span.trace_id.hex() == "0123456789abcdef0123456789abcdef"
    assert {spans["round", number].parent_span_id for number in (1, 2)} == {search.span_id}
    assert {span.status.code for span in spans.values()} == {0}


def test_a_span_says_what_failed_below_it(monkeypatch):
    with open_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        program = PROGRAM.replace("            pass", "            1 / 0")
        failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr
    assert {(span.name, span.status.code, span.status.message) for _, span in collector.spans} == {
        ("search", 2, "division by zero"),
        ("round", 2, "division by zero"),
    }


def test_without_a_collector_nothing_is_set_up(monkeypatch):
    assert run_program(monkeypatch) == "ProxyTracerProvider"
