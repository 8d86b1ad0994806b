"""The connection to the database, and the one way to write to it. What is written stands beside this, by stage.

Statements are the same for SQLite and PostgreSQL: SQLAlchemy renders `postgresql.insert`, with its ON CONFLICT, for
both, and leaves FOR UPDATE out where there is one writer. Transactions lock rows in one order: an association, its
Instances, cases by Series, then what belongs to a case.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import DBAPIError

from node.index.engine import database_url, make_engine
from node.index.schema import SchemaError, bring_up_to_date
from node.index.turn import Turn

CHUNK = 500
"""Values in one `IN`: PostgreSQL takes 65,535 parameters of a statement, SQLite 999 where it is old."""

# PostgreSQL's advisory locks are numbers; these are "cspine" and what they are for.
_SCHEMA_LOCK, _NODE_LOCK = 0x637370696E6501, 0x637370696E6502

# The number of a process may be another's after a restart; together with its time it is not.
_THIS_CONNECTION = text("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
_END_CONNECTION = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND backend_start = :backend_start"
)


class DatabaseError(Exception):
    """The database cannot be used; the message says which and why."""


class Database:
    """An SQLite file in the data folder, or a PostgreSQL database. What is committed survives a power cut.

    url: of a PostgreSQL database, None for SQLite. now: the clock.

    Raises:
        DatabaseError: it cannot be used.
    """

    def __init__(self, data_dir: Path, url: SecretStr | None = None, now: Callable[[], float] = time.time) -> None:
        self.data_dir = data_dir
        self.now = now
        where = database_url(data_dir, url)
        self.where = str(where)  # SQLAlchemy hides the password
        self._turn: Turn | None = None  # None with PostgreSQL, where writers need none
        self._holder: Connection | None = None  # has the database for this node as long as it is connected
        self._held_as: dict[str, Any] = {}  # that connection, as the server knows it
        try:
            self._engine = make_engine(where)
        except ModuleNotFoundError as error:
            raise DatabaseError(
                f"PostgreSQL needs {error.name}, which is not installed: pip install 'cspine-node[postgresql]'"
            ) from error
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            if url is None:
                self._turn = Turn(data_dir / "cspine.sqlite.lock")
            self._set_up()
        except (OSError, DBAPIError, SchemaError) as error:
            self.close()
            raise DatabaseError(f"the database {where} cannot be used: {_reason(error)}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections."""
        if self._holder:
            with suppress(DBAPIError):  # the server may be gone; it would let go a moment after the connection ends
                self._holder.execute(select(func.pg_advisory_unlock(_NODE_LOCK)))
            self._holder.close()
            self._holder = None
        self._engine.dispose()
        if self._turn:
            self._turn.close()

    def take(self, patience_s: float = 0.0) -> bool:
        """Takes the database for one node, until it is closed; False if another node has it.

        patience_s: how long to ask; the server finds out only after a moment that a node was killed.

        Only PostgreSQL is asked: an SQLite file is in the data folder, which the node has taken.
        """
        if self._turn:
            return True
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            if self._held_as:  # where only the network was away, the server may still hold it for that connection
                connection.execute(_END_CONNECTION, self._held_as)
            until = time.monotonic() + patience_s
            while not connection.scalar(select(func.pg_try_advisory_lock(_NODE_LOCK))):
                if time.monotonic() >= until:
                    return False
                time.sleep(0.1)
            self._held_as = dict(connection.execute(_THIS_CONNECTION).mappings().one())
            self._holder = connection
        finally:
            if self._holder is not connection:  # or `hold` would take it for the one that has the database
                connection.close()
        return True

    def hold(self, patience_s: float = 0.0) -> bool:
        """Takes the database anew if the server has let go of it, as when it was restarted; False if another node has
        it by now. For the node that took it, again and again.

        Raises:
            DBAPIError: the server cannot be reached.
        """
        if self._holder is not None:
            try:
                self._holder.execute(select(1))
                return True
            except DBAPIError:
                self._holder.close()
                self._holder = None
        return self.take(patience_s)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end, rolled back by an exception."""
        with self._turn or nullcontext(), self._engine.begin() as connection:
            if self._turn:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _writing_to_sqlite(self, turn: Turn) -> Iterator[sqlite3.Connection]:
        """As `_writing`, by the driver itself; for `Prepared` statements.

        Raises:
            DBAPIError: what the driver raised, as SQLAlchemy gives it.
        """
        with turn:
            lent = self._engine.raw_connection()
            try:
                connection = lent.driver_connection
                assert isinstance(connection, sqlite3.Connection)
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.commit()
            except sqlite3.Error as error:
                raise DBAPIError.instance(None, None, error, sqlite3.Error) from error
            finally:
                lent.close()  # rolls back what was not committed

    def _set_up(self) -> None:
        """Tables as they are today; processes that open the database at the same time wait for each other."""
        if self._turn:
            with self._turn, self._engine.connect() as connection:
                # Not in a transaction; and two at once would find the file locked, whatever the timeout.
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        with self._writing() as connection:
            if not self._turn:
                connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            bring_up_to_date(connection)


def _reason(error: Exception) -> str:
    """What is wrong, on one line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    cause = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(cause).split())
