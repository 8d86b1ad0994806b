"""How far each watched archive has been followed, how the last looks went, and what is known of its Series."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, delete, select, update
from sqlalchemy.dialects.postgresql import insert

from node.index import tables
from node.index.database import Database

_watched, _series, _troubled = tables.watched, tables.watched_series, tables.troubled_series
_pending = tables.pending_series

_FORGET_S = 30 * 86400.0  # after the last attempt at a Series


@dataclass(frozen=True, kw_only=True)
class WatchedSource:
    """What is known of one; times in s since 1970. position: None before the first look.

    paused_until: None unless the archive asked for a pause at the last look.
    """

    source: str
    position: int | None = None
    num_series: int = 0
    succeeded_at: float | None = None
    failed_at: float | None = None
    error: str = ""
    is_failing: bool = False
    paused_until: float | None = None


@dataclass(frozen=True, kw_only=True)
class WatchedSeries:
    """A Series of a watched archive. num_instances: that the archive has, since `counted_at` (s since 1970).

    num_done: how many it had when it was fetched, or passed over; None before. listed_at: the last time, within a day.
    """

    series_instance_uid: str
    num_instances: int
    counted_at: float
    num_done: int | None
    listed_at: float


@dataclass(frozen=True, kw_only=True)
class TroubledSeries:
    """A Series that a watched archive did not give out. series_id: its UID, or how Orthanc calls it.

    attempts: that failed, the last at `failed_at` for `reason`. next_attempt_at: None once it is set aside. Times in s
    since 1970.
    """

    series_id: str
    attempts: int
    failed_at: float
    reason: str
    next_attempt_at: float | None

    @property
    def is_set_aside(self) -> bool:
        return self.next_attempt_at is None

    def rests_at(self, now: float) -> bool:
        """Whether its next attempt is still to come; not once the clock was set back behind the last one."""
        return self.next_attempt_at is not None and self.failed_at <= now < self.next_attempt_at


class Watching(Database):
    """One row for each archive that was ever looked at, and for each Series of those that do not tell what is new."""

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
        self._note(source, {"succeeded_at": self.now(), "is_failing": 0, "paused_until": None})

    def note_failure(self, source: str, error: str, *, pause_s: float = 0.0) -> None:
        """A look did not. pause_s: that the archive asked for, 0 for none."""
        now = self.now()
        until = now + pause_s if pause_s else None
        self._note(source, {"failed_at": now, "error": error, "is_failing": 1, "paused_until": until})

    def watched_series(self, source: str) -> dict[str, WatchedSeries]:
        """What is known of the Series of an archive, by UID."""
        columns = [column for column in _series.c if column is not _series.c.source]
        with self._engine.connect() as connection:
            rows = connection.execute(select(*columns).where(_series.c.source == source)).mappings()
            return {row["series_instance_uid"]: WatchedSeries(**row) for row in rows}

    def note_listed(self, source: str, counts: Mapping[str, int], *, are_done: bool = False) -> None:
        """The archive has these Series, with that many Instances; are_done: none of them is to be fetched."""
        now = self.now()
        if not counts:
            return
        rows = [
            {
                "source": source,
                "series_instance_uid": uid,
                "num_instances": count,
                "counted_at": now,
                "num_done": count if are_done else None,
                "listed_at": now,
            }
            for uid, count in counts.items()
        ]
        row = insert(_series)
        same = _series.c.num_instances == row.excluded.num_instances
        has_fewer = _series.c.num_done > row.excluded.num_instances  # what was deleted there must hide nothing new
        known = row.on_conflict_do_update(
            index_elements=["source", "series_instance_uid"],
            set_={
                "num_instances": row.excluded.num_instances,
                "counted_at": case((same, _series.c.counted_at), else_=now),
                "num_done": case((has_fewer, row.excluded.num_instances), else_=_series.c.num_done),
                "listed_at": now,
            },
        )
        with self._writing() as connection:
            connection.execute(known, rows)

    def note_series_done(self, source: str, series_instance_uid: str, num_instances: int, *, is_fetched: bool) -> None:
        """A Series that had that many Instances was fetched, or is not to be."""
        row = (_series.c.source == source) & (_series.c.series_instance_uid == series_instance_uid)
        with self._writing() as connection:
            connection.execute(update(_series).where(row).values(num_done=num_instances))
            if is_fetched:
                counted = _watched.c.num_series + 1
                connection.execute(update(_watched).where(_watched.c.source == source).values(num_series=counted))

    def forget_series(self, source: str, listed_before: float) -> None:
        """Forgets Series that the archive has not listed since then (s since 1970)."""
        old = (_series.c.source == source) & (_series.c.listed_at < listed_before)
        with self._writing() as connection:
            connection.execute(delete(_series).where(old))

    def note_pending(self, source: str, series_ids: Collection[str]) -> None:
        """An Orthanc has got Instances of these Series, or was asked for them, and has yet to call them stable."""
        if not series_ids:
            return
        now = self.now()
        row = insert(_pending)
        again = row.on_conflict_do_update(index_elements=["source", "series_id"], set_={"noted_at": now})
        with self._writing() as connection:
            rows = [{"source": source, "series_id": series_id, "noted_at": now} for series_id in sorted(series_ids)]
            connection.execute(again, rows)

    def pending_series(self, source: str) -> dict[str, float]:
        """The Series that an Orthanc has yet to call stable, and when that was noted last; the oldest first."""
        rows = select(_pending.c.series_id, _pending.c.noted_at).where(_pending.c.source == source)
        with self._engine.connect() as connection:
            return {row.series_id: row.noted_at for row in connection.execute(rows.order_by(_pending.c.noted_at))}

    def forget_pending(self, source: str, series_id: str) -> None:
        """An Orthanc was asked for a Series as one that is stable, or it is none for us."""
        row = (_pending.c.source == source) & (_pending.c.series_id == series_id)
        with self._writing() as connection:
            connection.execute(delete(_pending).where(row))

    def troubled_series(self, source: str) -> dict[str, TroubledSeries]:
        """The Series that an archive did not give out, by what it calls them; the latest failure first."""
        columns = [column for column in _troubled.c if column is not _troubled.c.source]
        rows = select(*columns).where(_troubled.c.source == source).order_by(_troubled.c.failed_at.desc())
        with self._engine.connect() as connection:
            return {row["series_id"]: TroubledSeries(**row) for row in connection.execute(rows).mappings()}

    def note_trouble(
        self, source: str, series_id: str, reason: str, *, attempts: int, next_attempt_at: float | None
    ) -> None:
        """An archive did not give out a Series; next_attempt_at: None sets it aside. Forgets what is long past."""
        now = self.now()
        values = {"attempts": attempts, "failed_at": now, "reason": reason, "next_attempt_at": next_attempt_at}
        row = insert(_troubled).values({"source": source, "series_id": series_id} | values)
        with self._writing() as connection:
            connection.execute(row.on_conflict_do_update(index_elements=["source", "series_id"], set_=values))
            connection.execute(delete(_troubled).where(_troubled.c.failed_at < now - _FORGET_S))

    def retry_series(self, source: str, series_ids: Collection[str]) -> int:
        """Has Series that an archive did not give out tried at its next look, with all attempts; says how many."""
        trouble = (_troubled.c.source == source) & _troubled.c.series_id.in_(series_ids)
        done = (_series.c.source == source) & _series.c.series_instance_uid.in_(series_ids)
        with self._writing() as connection:
            again = update(_troubled).where(trouble).values(attempts=0, next_attempt_at=self.now())
            num: int = connection.execute(again).rowcount
            connection.execute(update(_series).where(done).values(num_done=None))
        return num

    def forget_trouble(self, source: str, series_id: str) -> None:
        """An archive gave out a Series after all, or it is none for us."""
        row = (_troubled.c.source == source) & (_troubled.c.series_id == series_id)
        with self._writing() as connection:
            connection.execute(delete(_troubled).where(row))

    def _note(self, source: str, values: dict[str, Any], or_else: dict[str, Any] | None = None) -> None:
        """Notes values; where there is a row, `or_else` in place of those it names."""
        row = insert(_watched).values({"num_series": 0, "error": "", "is_failing": 0, "source": source} | values)
        with self._writing() as connection:
            connection.execute(row.on_conflict_do_update(index_elements=["source"], set_=values | (or_else or {})))
