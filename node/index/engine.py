"""What differs between SQLite and PostgreSQL when a connection is made."""

from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import URL, Engine, create_engine, event, make_url

_CONNECT_TIMEOUT_S = 10


def database_url(data_dir: Path, database: SecretStr | None) -> URL:
    """Where the database is: the configured one, or a file in the data folder."""
    if database is None:
        return URL.create("sqlite", database=str(data_dir / "cspine.sqlite"))
    return make_url(database.get_secret_value()).set(drivername="postgresql+psycopg")


def make_engine(url: URL) -> Engine:
    """An engine whose commits survive a power cut.

    Raises:
        ModuleNotFoundError: the driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    # pre_ping: a connection that the server closed meanwhile is replaced before it is used.
    return create_engine(
        url, pool_pre_ping=True, hide_parameters=True, connect_args={"connect_timeout": _CONNECT_TIMEOUT_S}
    )


def _sqlite(url: URL) -> Engine:
    # isolation_level None: the driver starts no transaction of its own, `Database` says BEGIN IMMEDIATE. The timeout is
    # for strangers, such as an sqlite3 shell; our own writers take turns.
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": 30, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    return engine
