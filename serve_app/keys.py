"""API keys: several, from a file that is read again when it changes, or from the environment. Knows no HTTP framework."""

import hashlib
import hmac
import ipaddress
import logging
import os
import time
from pathlib import Path

from axn_ray.errors import InputError

logger = logging.getLogger("ray.serve")

VARIABLE = "AXN_API_KEYS"
CHECK_S = 1.0  # how often the file's time is looked at


class ApiKeys:
    """The keys that open the app; without any, it is open.

    Raises:
        InputError: a file that is missing, is not UTF-8 or holds no key.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._read_at, self._looked_at = 0.0, time.monotonic()
        self._digests: list[bytes] = []
        if file is None:
            self._digests = _digest_keys(os.environ.get(VARIABLE, "").replace(",", "\n"))
        else:
            self._reload(file)
        self.are_required = file is not None or bool(self._digests)

    def is_valid(self, authorization: str | None, api_key: str | None) -> bool:
        """Whether `Authorization: Bearer KEY` or `X-API-Key: KEY` holds a key; every key is compared, in constant time."""
        if not self.are_required:
            return True
        if self._file is not None and time.monotonic() - self._looked_at > CHECK_S:
            self._looked_at = time.monotonic()
            self._reload_if_changed(self._file)
        scheme, _, token = (authorization or "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else api_key or ""
        digest = hashlib.sha256(given.encode(errors="surrogateescape")).digest()
        return bool(given) and bool(sum(hmac.compare_digest(digest, known) for known in self._digests))

    def _reload_if_changed(self, file: Path) -> None:
        try:
            if file.stat().st_mtime != self._read_at:
                self._reload(file)
        except (OSError, InputError) as error:  # a half-written file must not lock everybody out, nor let anybody in
            logger.error("the API keys in %s could not be read again (%s); the old ones stay", file, error)

    def _reload(self, file: Path) -> None:
        try:
            read_at, text = file.stat().st_mtime, file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"API keys file {file} cannot be read ({error.strerror}); check the path") from error
        except UnicodeDecodeError as error:
            raise InputError(f"API keys file {file} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        digests = _digest_keys(text)
        if not digests:
            raise InputError(f"API keys file {file} holds no key; write one a line")
        self._digests, self._read_at = digests, read_at
        logger.info("read %d API keys from %s", len(digests), file)


def _digest_keys(text: str) -> list[bytes]:
    lines = (line.strip() for line in text.splitlines())
    return [hashlib.sha256(line.encode()).digest() for line in lines if line and not line.startswith("#")]


def check_bind(host: str, keys: ApiKeys) -> None:
    """Refuse to open an app without keys to other machines.

    Raises:
        InputError: `host` is not a loopback address and there is no key.
    """
    if not keys.are_required and not is_loopback(host):
        raise InputError(f"host={host} lets other machines in and there is no API key; set api_keys_file or {VARIABLE}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
