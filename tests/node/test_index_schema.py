"""The version of the database: older ones are brought up to date, newer ones refused."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import inspect, update

from node.case import CaseState, DeliveryState
from node.index import DatabaseError, Index, tables
from node.index.schema import STEPS

VERSION_0 = (Path(__file__).parent / "databases" / "version_0.sql").read_text(encoding="utf-8")


def restore(data_dir: Path, database: SecretStr | None) -> None:
    """A database as 0.1.0 made it; with PostgreSQL, which 0.1.0 did not know, as it would have."""
    if database:
        with psycopg.connect(database.get_secret_value(), autocommit=True) as connection:
            for statement in VERSION_0.replace("BEGIN TRANSACTION;", "").split(";\n"):
                connection.execute(statement)
        return
    data_dir.mkdir()
    with closing(sqlite3.connect(data_dir / "cspine.sqlite")) as connection:
        connection.executescript(VERSION_0)


def shape(index: Index) -> dict[str, Any]:
    """Columns and indexes of every table."""
    looked = inspect(index._engine)
    return {
        table: (
            {(c["name"], str(c["type"]), c["nullable"]) for c in looked.get_columns(table)},
            {(i["name"], *i["column_names"]) for i in looked.get_indexes(table)},
        )
        for table in looked.get_table_names()
    }


def test_a_database_of_0_1_opens_and_works_on(tmp_path: Path, database: SecretStr | None) -> None:
    restore(tmp_path / "data", database)
    index = Index(tmp_path / "data", database)
    (case,) = index.cases()
    assert (case.state, case.series_instance_uid, case.attributes) == (CaseState.DELIVERING, "1.2.3", {})
    delivery = index.next_delivery("pacs")
    assert delivery is not None
    index.settle_delivery(delivery, DeliveryState.DONE)
    assert index.cases()[0].state is CaseState.DONE
    index.close()
    Index(tmp_path / "data", database).close()


def test_an_older_database_gets_the_shape_of_a_new_one(tmp_path: Path, index: Index) -> None:
    restore(tmp_path / "older", None)
    older = Index(tmp_path / "older")
    assert shape(older) == shape(index)
    older.close()


def test_a_newer_database_is_refused_and_left_as_it_is(tmp_path: Path, database: SecretStr | None) -> None:
    index = Index(tmp_path / "data", database)
    with index._writing() as connection:
        connection.execute(update(tables.schema_version).values(version=99))
    before = shape(index)
    with pytest.raises(DatabaseError, match=f"schema version 99 and this node knows up to {len(STEPS)}"):
        Index(tmp_path / "data", database)
    assert shape(index) == before
    index.close()


def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError) as raised:
        Index(tmp_path, SecretStr("postgresql://cspine:secret@127.0.0.1:1/cspine"))
    assert "postgresql+psycopg://cspine:***@127.0.0.1:1/cspine cannot be used: connection" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_only_one_node_takes_a_database(tmp_path: Path, database: SecretStr | None) -> None:
    first, second = Index(tmp_path, database), Index(tmp_path, database)
    assert first.take()
    if database:  # with SQLite it is the data folder that is taken
        assert not second.take()
        first.close()
        assert second.take()
    first.close()
    second.close()
