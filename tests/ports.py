"""Ports for servers that tests start."""

import os
import socket

# Below the ports that the system hands to clients, so that no connection of ours can be given one in between. Each
# process of a test run, and each run, begins somewhere else.
_FIRST, _NUM = 10_000, 22_000
_next = os.getpid() * 97


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, another one at each call."""
    global _next
    while True:
        _next += 1
        port = _FIRST + _next % _NUM
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return port
