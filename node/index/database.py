"""The connection to the database, and the one way to write to it. What is written stands beside this, by stage."""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event

from node.index.schema import bring_up_to_date


class Database:
    """An SQLite file in WAL mode with `synchronous=FULL`: a committed row survives a power cut.

    Raises:
        OSError: the data folder cannot be used.
        SchemaError: the database is of a newer version.
    """

    def __init__(self, data_dir: Path, now: Callable[[], float] = time.time) -> None:
        self.data_dir = data_dir
        self.now = now
        data_dir.mkdir(parents=True, exist_ok=True)
        self._turn = _Turn(data_dir / "cspine.sqlite.lock")
        self._engine = _open(data_dir / "cspine.sqlite")
        try:
            with self._turn, self._engine.connect() as connection:
                # Not in a transaction; and two at once would find the file locked, whatever the timeout.
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            with self._writing() as connection:
                bring_up_to_date(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()
        self._turn.close()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end, rolled back by an exception."""
        with self._turn, self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection


class _Turn:
    """Whose turn it is to write: one thread of one process at a time.

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


def _open(path: Path) -> Engine:
    # isolation_level None: the driver starts no transaction of its own, `_writing` says BEGIN IMMEDIATE.
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    return engine
