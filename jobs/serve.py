"""Serve search over HTTP on this machine or cluster. `python -m jobs.serve --index runs/demo`, or without: the sample."""

import logging
import os
import signal
import time
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.distributed.cluster import join_cluster
from serve_app.config import AppArgs
from serve_app.starting import check_start, with_whole_paths

logger = logging.getLogger("axn_ray")


def run(
    config: AppArgs,
    host: Annotated[str, typer.Option(help="address to listen at; another than loopback needs an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at", min=1, max=65535)] = 8000,
) -> None:
    """Answer searches and rerank requests over HTTP until interrupted, with a page to try it at /."""
    config = with_whole_paths(config)
    check_start(config, host, port)
    from ray import serve

    from serve_app.app import build_app

    # Serve kills a proxy that is not ready after 5 s, and with it the start: too soon where the cores are busy.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    join_cluster()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own, set while it starts, aborts the process
    logging.getLogger("ray.serve").setLevel("WARNING")  # here; the replicas' own logs keep every request
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config={"encoding": "JSON"})
        serve.run(build_app(config), name="axn")
        logger.info("listening at http://%s:%d", host, port)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


command = stage_command(AppArgs, run)

if __name__ == "__main__":
    typer.run(command)
