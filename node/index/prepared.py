"""A statement made into text once, for the driver of SQLite itself.

SQLAlchemy looks a statement up, binds and wraps anew each time that it is executed, which costs three times what SQLite
needs for an Instance. Only for what runs for every Instance; everything else goes through SQLAlchemy, and so does
PostgreSQL, by the same statements.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.sql.dml import UpdateBase


class Prepared:
    """A statement of `names`, its parameters."""

    def __init__(self, statement: UpdateBase | Select[Any], names: Sequence[str]) -> None:
        compiled = statement.compile(dialect=dialect(), column_keys=list(names))
        self._text = str(compiled)
        self._order = tuple(compiled.positiontup or ())
        self._fixed = {name: value for name, value in compiled.params.items() if name not in names}

    def execute(self, connection: sqlite3.Connection, values: Mapping[str, Any]) -> list[Any]:
        """The rows that it returns. Lists and dictionaries are for columns of JSON.

        Raises:
            sqlite3.Error: it failed.
        """
        all_values = self._fixed | {
            name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in values.items()
        }
        return connection.execute(self._text, [all_values[name] for name in self._order]).fetchall()
