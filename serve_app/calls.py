"""Calls from one deployment to another: with a deadline, cancelled when the caller goes, repeated when a replica dies."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError

logger = logging.getLogger("ray.serve")
ATTEMPTS = 4
GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
FAILED = (RayError, RayServeException)  # all that a call can fail by


async def call(send: Callable[[float], Any], timeout_s: float) -> Any:
    """Await the response that `send` starts; `send` is given the seconds that are left.

    Scoring is a pure function of its pairs, so a call whose replica died is made again, on another replica.

    Raises:
        TimeoutError: no response within `timeout_s`; the call is cancelled.
        One of `GONE`: several replicas died one after the other.
    """
    deadline = time.monotonic() + timeout_s
    for attempt in range(1, ATTEMPTS + 1):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        response = send(left)
        try:
            async with asyncio.timeout(left):
                return await response
        except GONE as error:
            logger.warning("a replica died under a call (%s); attempt %d of %d", type(error).__name__, attempt, ATTEMPTS)
            if attempt == ATTEMPTS:
                raise
            await asyncio.sleep(0.1 * attempt)
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()
            raise
    raise AssertionError("unreachable")
