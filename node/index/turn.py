"""Whose turn it is to write to an SQLite file: one thread of one process at a time."""

import fcntl
import threading
from pathlib import Path


class Turn:
    """`with turn:` waits for the turn and gives it on.

    SQLite has one writer anyway, and lets the others find out by polling with growing sleeps, in no order, until
    a timeout says "database is locked". Here they wait in the kernel, which wakes the next one at once and lets go when
    a process dies.
    """

    def __init__(self, path: Path) -> None:
        self._threads = threading.Lock()  # flock is per open file: threads that share it would all have it
        self._file = path.open("wb")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._threads.release()
