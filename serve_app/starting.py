"""What is looked at before the app starts, so that what is wrong is one sentence and not a replica's log."""

import logging
import os
import socket
from pathlib import Path

from axn_ray.core.causal_cross_encoder import is_causal
from axn_ray.core.cross_encoder_config import with_whole_path
from axn_ray.core.open_cross_encoder import is_model
from axn_ray.errors import InputError
from serve_app.config import SAMPLE, AppArgs
from serve_app.index_folder import open_index
from serve_app.keys import VARIABLE, ApiKeys, check_bind

logger = logging.getLogger("axn_ray")


def check_start(config: AppArgs, host: str, port: int) -> None:
    """Refuse what cannot start, or would be open; makes the sample's index where it is asked for and not there.

    Raises:
        InputError: see `check_bind` and `check_port`.
        ArtifactError: see `open_index`.
        ModelError: there is no such cross-encoder.
    """
    keys = ApiKeys(config.api_keys_file)
    check_bind(host, keys)
    if not os.environ.get("RAY_ADDRESS"):
        check_port(host, port)
    elif keys.are_required and config.api_keys_file is None:
        logger.warning("replicas read %s where they run: set it on the cluster's nodes, or give --api-keys-file", VARIABLE)
    open_index(config)
    if is_model(config):
        is_causal(config.cross_encoder)  # reads its configuration, or says that there is none


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
