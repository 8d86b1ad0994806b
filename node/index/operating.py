"""What an administrator does to cases: hold the queue, start a case again, remove one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select

from node.case import About, Case, CaseState, NotificationState
from node.index import tables
from node.index.cases import Cases, moved_to

_cases, _instances, _pause = tables.cases, tables.instances, tables.pause
_deliveries, _notifications = tables.deliveries, tables.notifications


class Operating(Cases):
    """The commands over cases. They work while the node runs, and while it does not."""

    def pause(self) -> None:
        """No case is given to a worker until `resume`, whatever is restarted meanwhile."""
        if self.paused_since() is None:
            with self._writing() as connection:
                connection.execute(_pause.insert().values(since=self.now()))

    def resume(self) -> None:
        """Workers get cases again."""
        with self._writing() as connection:
            connection.execute(delete(_pause))

    def paused_since(self) -> float | None:
        """When the queue was paused, None if it is not."""
        with self._engine.connect() as connection:
            return connection.scalar(select(_pause.c.since).order_by(_pause.c.since))

    def named_case(self, name: str) -> Case | None:
        """The case with that number or SeriesInstanceUID, None if there is none."""
        if name.isdecimal() and len(name) < 19:
            found = self._cases(select(_cases).where(_cases.c.case_id == int(name)))
            return found[0] if found else None
        return self.case(name)

    def retry(self, case: Case) -> bool:
        """Starts an ended case again: it is judged, analysed and delivered as if its last Instance had just come.

        Somebody asked for this one: no rule and no preference holds it back any more. False, too, if its Instances are
        gone: there is nothing to judge.
        """
        again = moved_to(case, CaseState.RECEIVING).where(
            _cases.c.originals_purged_at.is_(None), _cases.c.num_instances > 0
        )
        now = self.now()
        values = {"reason": "", "attempts": 0, "next_check_at": now, "is_asked_for": 1, "changed_at": now}
        with self._writing() as connection:
            return bool(connection.execute(again.values(values)).rowcount)

    def delete_case(self, case: Case) -> list[Path] | None:
        """Forgets a case and everything about it; the files of its Instances. None if it changed since the snapshot.

        The files are the caller's to remove. Should that not come to pass, they are strays, removed at the next start.
        """
        with self._writing() as connection:
            here = select(_cases).where(_cases.c.case_id == case.case_id).with_for_update()
            row = connection.execute(here).mappings().first()
            # As `unmoved` tells: SQLite gives the number of a deleted case to the next one.
            same = ("series_instance_uid", "first_received_at", "state", "num_instances")
            if row is None or any(row[name] != getattr(case, name) for name in same):
                return None
            of_series = _instances.c.series_instance_uid == case.series_instance_uid
            paths = connection.scalars(select(_instances.c.path).where(of_series)).all()
            connection.execute(delete(_instances).where(of_series))
            for table in reversed(tables.metadata.sorted_tables):
                if "case_id" in table.c:
                    connection.execute(delete(table).where(table.c.case_id == case.case_id))
        return [self.data_dir / path for path in paths]

    def referenced_results(self, case: Case) -> set[Path]:
        """Result folders of a case that something still points at."""
        queries: Sequence[Any] = (
            select(_cases.c.result_dir).where(_cases.c.case_id == case.case_id),
            select(_deliveries.c.result_dir).where(_deliveries.c.case_id == case.case_id),
            select(_notifications.c.subject).where(
                _notifications.c.case_id == case.case_id,
                _notifications.c.about == About.ANALYSED,
                _notifications.c.state == NotificationState.PENDING,
            ),
        )
        with self._engine.connect() as connection:
            found = {path for query in queries for path in connection.scalars(query) if path}
        return {self.data_dir / path for path in found}
