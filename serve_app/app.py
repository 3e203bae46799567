"""Binds the three deployments into one Serve application. `import_path: serve_app.app:build_app`."""

from ray import serve
from ray.serve import Application

from serve_app.config import AppArgs
from serve_app.cross_encoder import CrossEncoderDeployment
from serve_app.ingress import IngressDeployment
from serve_app.retriever import RetrieverDeployment

# Serve's own queues must never be the first to refuse: its refusal is a 503, ours a 429 that says when to come back.
UNBOUNDED = 100_000
GRACE_S = 10.0  # beyond the deadline, by which every request has its answer


def build_app(args: AppArgs) -> Application:
    """The app over one index and one cross-encoder; a Serve config may set replicas and resources by deployment name."""
    shared = {
        "max_ongoing_requests": UNBOUNDED,
        "max_surge_percent": 100,  # an update starts the new replica before the old one stops
        "graceful_shutdown_timeout_s": args.deadline_ms / 1000 + GRACE_S,
        "health_check_period_s": 5,
        "logging_config": {"encoding": "JSON", "enable_access_log": False},  # the guard's line has what Serve's would say
    }
    cross_encoder = serve.deployment(CrossEncoderDeployment, name="CrossEncoder", **shared).bind(args)
    retriever = serve.deployment(RetrieverDeployment, name="Retriever", **shared).bind(args, cross_encoder)
    return serve.deployment(IngressDeployment, name="Ingress", **shared).bind(args, retriever, cross_encoder)
