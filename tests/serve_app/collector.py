"""A collector of OpenTelemetry spans: OTLP over HTTP, on a free port of this machine."""

import http.server
import threading
from contextlib import contextmanager

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """`url`, and every span received so far: (deployment, span)."""

    def __init__(self, url):
        self.url, self.spans = url, []

    def receive(self, path, body):
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {fact.key: fact.value.string_value for fact in resource.resource.attributes}
            assert named["service.name"] == "axn-ray"
            self.spans += [(named["axn.deployment"], span) for scope in resource.scope_spans for span in scope.spans]


@contextmanager
def open_collector():
    """A `Collector` that listens."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            collector.receive(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()


def facts_of(span):
    """What a span says of itself, without the prefix."""
    return {fact.key.removeprefix("axn."): fact.value.int_value or fact.value.string_value for fact in span.attributes}
