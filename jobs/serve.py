"""Serve search over HTTP on this machine or cluster. `python -m jobs.serve --index runs/demo`, or without: the sample."""

import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.core.causal_cross_encoder import is_causal
from axn_ray.core.cross_encoder import with_whole_path
from axn_ray.core.open_cross_encoder import is_model
from axn_ray.distributed.cluster import join_cluster
from axn_ray.errors import InputError
from serve_app.config import SAMPLE, AppArgs
from serve_app.index_folder import open_index
from serve_app.keys import VARIABLE, ApiKeys, check_bind

logger = logging.getLogger("axn_ray")


def run(
    config: AppArgs,
    host: Annotated[str, typer.Option(help="address to listen at; another than loopback needs an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at", min=1, max=65535)] = 8000,
) -> None:
    """Answer searches and rerank requests over HTTP until interrupted, with a page to try it at /."""
    config = with_whole_paths(config)
    keys = ApiKeys(config.api_keys_file)
    check_bind(host, keys)
    if not os.environ.get("RAY_ADDRESS"):
        check_port(host, port)
    elif keys.are_required and config.api_keys_file is None:
        logger.warning("replicas read %s where they run: set it on the cluster's nodes, or give --api-keys-file", VARIABLE)
    open_index(config)  # what is wrong is said here, and the sample's is made where its progress can be seen
    if is_model(config):
        is_causal(config.cross_encoder)  # reads its configuration, or says that there is none
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


def with_whole_paths(config: AppArgs) -> AppArgs:
    """The same with whole paths: replicas run in other working directories."""
    paths = {"cache": config.cache.expanduser().resolve()}
    if config.api_keys_file is not None:
        paths["api_keys_file"] = config.api_keys_file.expanduser().resolve()
    index = config.index if config.index == SAMPLE else str(Path(config.index).resolve())
    return with_whole_path(config.model_copy(update={**paths, "index": index}))


def check_port(host: str, port: int) -> None:
    """Refuse a port at which something listens already: Serve's proxy would share it, and requests would go to either.

    Raises:
        InputError: it is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}, port {port} ({error.strerror}); choose others with --host or --port"
        ) from error


command = stage_command(AppArgs, run)

if __name__ == "__main__":
    typer.run(command)
