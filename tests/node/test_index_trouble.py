"""What is told of a database that cannot be used, as SQLite and PostgreSQL say it, and what is a fault of ours."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from node.index import Index, why_unusable
from node.index.engine import database_url, make_engine
from tests.ports import free_port
from tests.postgresql_server import PostgreSQLServer


def told_of(index: Index) -> str | None:
    """What is said of a write that fails."""
    with pytest.raises(DBAPIError) as raised:
        index.open_association("SCANNER")
    return why_unusable(raised.value)


def say(index: Index, *statements: str) -> None:
    """Executed by the one connection that the index has open."""
    with index._engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
        connection.commit()


@contextmanager
def held(index: Index) -> Iterator[None]:
    say(index, "PRAGMA busy_timeout=10")
    with closing(sqlite3.connect(index.data_dir / "cspine.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def read_only(index: Index) -> Iterator[None]:
    say(index, "PRAGMA query_only=1")
    yield


@contextmanager
def full(index: Index) -> Iterator[None]:
    say(index, "PRAGMA max_page_count=1")  # no more than there are
    with suppress(DBAPIError):
        for _ in range(10_000):
            say(index, "INSERT INTO associations (calling_ae_title, opened_at) VALUES ('SCANNER', 0)")
    yield


@contextmanager
def away(index: Index) -> Iterator[None]:
    index._engine.dispose()
    index.data_dir.rename(index.data_dir.with_name("elsewhere"))
    yield


def _overwritten(index: Index, begin: int) -> None:
    say(index, "PRAGMA wal_checkpoint(TRUNCATE)")
    index._engine.dispose()
    file = index.data_dir / "cspine.sqlite"
    content = file.read_bytes()
    file.write_bytes(content[:begin] + b"\xff" * (len(content) - begin))


@contextmanager
def damaged(index: Index) -> Iterator[None]:
    _overwritten(index, 4096)
    yield


@contextmanager
def no_database(index: Index) -> Iterator[None]:
    _overwritten(index, 0)
    yield


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (held, "database is locked. Another program holds it"),
        (read_only, "attempt to write a readonly database. The node's user must be able to write to file and folder"),
        (full, "database or disk is full. Make room on its disk"),
        (away, "unable to open database file. The node's user must be able to write to file and folder"),
        (damaged, "database disk image is malformed. Stop the node, keep a copy of the file, and mend it"),
        (no_database, "file is not a database. Stop the node, keep a copy of the file, and mend it"),
    ],
)
def test_an_sqlite_file_that_cannot_be_used_is_told_with_what_to_do(
    index: Index, broken: Callable[[Index], AbstractContextManager[None]], told: str
) -> None:
    with broken(index):
        assert (told_of(index) or "").startswith(told)


def test_a_postgresql_that_cannot_be_used_is_told_with_what_to_do(postgresql: PostgreSQLServer, tmp_path: Path) -> None:
    with closing(Index(tmp_path / "data", postgresql.make_database())) as index:
        say(index, "SET default_transaction_read_only = on")
        assert told_of(index) == (
            "cannot execute INSERT in a read-only transaction. "
            "It is read-only, as a standby is: `database` must name the one that is written to"
        )
        say(index, "SET default_transaction_read_only = off", "SET ROLE pg_monitor")
        assert told_of(index) == "permission denied for table associations. Grant the node's user its rights"
        say(index, "RESET ROLE")
        with pytest.raises(DBAPIError) as ended, index._writing() as connection:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        assert (why_unusable(ended.value) or "").startswith("terminating connection due to administrator command")


def test_a_postgresql_that_is_not_there_is_told(tmp_path: Path) -> None:
    engine = make_engine(database_url(tmp_path, SecretStr(f"postgresql://cspine@127.0.0.1:{free_port()}/cspine")))
    with pytest.raises(DBAPIError) as refused:
        engine.connect()
    assert "Connection refused" in (why_unusable(refused.value) or "")


def test_what_is_asked_for_and_is_not_there_is_a_fault_of_ours(either_index: Index) -> None:
    say(either_index, "ALTER TABLE associations RENAME COLUMN receiver TO run")
    assert told_of(either_index) is None
    say(either_index, "ALTER TABLE associations RENAME TO others")
    assert told_of(either_index) is None


def test_other_errors_are_none_of_the_database() -> None:
    assert why_unusable(ValueError("no such table")) is None
