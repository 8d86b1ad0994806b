"""How far each watched archive has been followed, and how the last looks went."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from node.index import tables
from node.index.database import Database

_watched = tables.watched


@dataclass(frozen=True, kw_only=True)
class WatchedSource:
    """What is known of one; times in s since 1970. position: None before the first look."""

    source: str
    position: int | None = None
    num_series: int = 0
    succeeded_at: float | None = None
    failed_at: float | None = None
    error: str = ""
    is_failing: bool = False


class Watching(Database):
    """One row for each archive that was ever looked at."""

    def watched_source(self, source: str) -> WatchedSource:
        """What is known of the archive of that name."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_watched).where(_watched.c.source == source)).mappings().first()
        if row is None:
            return WatchedSource(source=source)
        return WatchedSource(**{**row, "is_failing": bool(row["is_failing"])})

    def note_position(self, source: str, position: int, *, num_fetched: int = 0) -> None:
        """Everything up to `position` is done with; num_fetched: Series of it that were fetched."""
        num_series = _watched.c.num_series + num_fetched
        self._note(source, {"position": position, "num_series": num_fetched}, {"num_series": num_series})

    def note_success(self, source: str) -> None:
        """A look found all well."""
        self._note(source, {"succeeded_at": self.now(), "is_failing": 0})

    def note_failure(self, source: str, error: str) -> None:
        """A look did not."""
        self._note(source, {"failed_at": self.now(), "error": error, "is_failing": 1})

    def _note(self, source: str, values: dict[str, Any], or_else: dict[str, Any] | None = None) -> None:
        """Notes values; where there is a row, `or_else` in place of those it names."""
        row = insert(_watched).values({"num_series": 0, "error": "", "is_failing": 0, "source": source} | values)
        with self._writing() as connection:
            connection.execute(row.on_conflict_do_update(index_elements=["source"], set_=values | (or_else or {})))
