"""Ports for servers that tests start."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Below the ports that the system hands to clients, so that no connection of ours can be given one in between.
_FIRST, _NUM = 10_000, 22_000
_BLOCK = 100


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, another one at each call, and to no other process of tests.

    Often nobody is to listen there for the whole of a test, or only later; by then another process of tests must not.
    """
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return port


def _numbers() -> Iterator[int]:
    """Every port of one block after the other; each block is this process's as long as it lives."""
    folder = Path(tempfile.gettempdir()) / f"cspine-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    held: list[int] = []
    begin = os.getpid()  # each run begins somewhere else: what an earlier one left may linger
    while True:
        for number in range(_NUM // _BLOCK):
            block = (begin + number) % (_NUM // _BLOCK)
            descriptor = os.open(folder / str(block), os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process has it
                os.close(descriptor)
                continue
            held.append(descriptor)
            yield from range(_FIRST + block * _BLOCK, _FIRST + (block + 1) * _BLOCK)
        while held:  # all were given once: from the beginning
            os.close(held.pop())


_ports = _numbers()
