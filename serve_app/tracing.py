"""OpenTelemetry: a span for each search and round, sent where OTEL_EXPORTER_OTLP_ENDPOINT says; without it, nothing happens."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from axn_ray.errors import InputError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TRACER = trace.get_tracer("axn_ray")


def set_up_tracing(deployment: str) -> None:
    """Once in a replica: send its spans to the collector that the environment names.

    Raises:
        InputError: a collector is named and the exporter is not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InputError(f"{ENDPOINTS[0]} is set and the exporter is missing; pip install 'axn-ray[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "axn-ray", "axn.deployment": deployment}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


@contextmanager
def span(name: str, carrier: Mapping[str, str], **attributes: str | int) -> Iterator[dict[str, str]]:
    """A span below the one that `carrier` (W3C `traceparent`) names; yields the carrier for what lies below it."""
    facts = {f"axn.{key}": value for key, value in attributes.items()}
    below: dict[str, str] = {}
    # Not the current span: what yields from inside, as a stream does, may go on in another context.
    opened = TRACER.start_span(name, propagate.extract(carrier), attributes=facts)
    propagate.inject(below, trace.set_span_in_context(opened))
    try:
        yield below
    except Exception as error:
        opened.record_exception(error)
        opened.set_status(trace.StatusCode.ERROR, str(error))
        raise
    finally:
        opened.end()
