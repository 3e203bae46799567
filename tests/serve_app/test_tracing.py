"""Spans: one a round, below the caller's trace, received by a collector over HTTP; the exporter only where one is named."""

import http.server
import subprocess
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

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


@pytest.fixture
def collector():
    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, body, self.headers.get("content-encoding")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.received = received
    yield server
    server.shutdown()
    server.server_close()


def run_program(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_collector_receives_search_and_rounds_below_the_callers_trace(collector, monkeypatch):
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    assert (
        run_program(monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_EXPORTER_OTLP_COMPRESSION="none") == "TracerProvider"
    )
    spans = {}
    for path, body, _ in collector.received:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {fact.key: fact.value.string_value for fact in resource.resource.attributes}
            assert (named["service.name"], named["axn.deployment"]) == ("axn-ray", "Retriever")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    facts = {fact.key: fact.value.int_value for fact in span.attributes}
                    spans[span.name, facts.get("axn.round")] = span
    assert set(spans) == {("search", None), ("round", 1), ("round", 2)}
    search = spans["search", None]
    assert search.parent_span_id.hex() == "0123456789abcdef"
    for span in spans.values():
        assert span.trace_id.hex() == "0123456789abcdef0123456789abcdef"
    assert {spans["round", number].parent_span_id for number in (1, 2)} == {search.span_id}


def test_without_a_collector_nothing_is_set_up(monkeypatch):
    assert run_program(monkeypatch) == "ProxyTracerProvider"
