"""The version of the database: older ones are brought up to date, newer ones refused."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from node.case import CaseState, DeliveryState
from node.index import Index, SchemaError
from node.index.schema import STEPS

DATABASES = Path(__file__).parent / "databases"


def restore(data_dir: Path, name: str) -> None:
    data_dir.mkdir()
    with closing(sqlite3.connect(data_dir / "cspine.sqlite")) as connection:
        connection.executescript((DATABASES / name).read_text(encoding="utf-8"))


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


def test_a_database_of_0_1_opens_and_works_on(tmp_path: Path) -> None:
    restore(tmp_path / "data", "version_0.sql")
    index = Index(tmp_path / "data")
    (case,) = index.cases()
    assert (case.state, case.series_instance_uid, case.attributes) == (CaseState.DELIVERING, "1.2.3", {})
    delivery = index.next_delivery("pacs")
    assert delivery is not None
    index.settle_delivery(delivery, DeliveryState.DONE)
    assert index.cases()[0].state is CaseState.DONE
    index.close()
    Index(tmp_path / "data").close()


def test_an_older_database_gets_the_shape_of_a_new_one(index: Index, tmp_path: Path) -> None:
    restore(tmp_path / "older", "version_0.sql")
    older = Index(tmp_path / "older")
    assert shape(older) == shape(index)
    older.close()


def test_a_newer_database_is_refused_and_left_as_it_is(index: Index, tmp_path: Path) -> None:
    index.close()
    with closing(sqlite3.connect(tmp_path / "data" / "cspine.sqlite")) as connection, connection:
        connection.execute("UPDATE schema_version SET version = 99")
        before = list(connection.iterdump())
    with pytest.raises(SchemaError, match=f"schema version 99 and this node knows up to {len(STEPS)}"):
        Index(tmp_path / "data")
    with closing(sqlite3.connect(tmp_path / "data" / "cspine.sqlite")) as connection:
        assert list(connection.iterdump()) == before
