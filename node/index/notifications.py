"""What is to be told to whom. It is derived from what the cases say, so that no stage has to think of it."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import RowMapping, Select, select, update

from node.case import About, Case, CaseState, Notification, NotificationState
from node.index import tables
from node.index.cases import Cases

_cases, _targets, _notifications = tables.cases, tables.notify_targets, tables.notifications

_OVERLAP_S = 60.0
"""A case whose change was written late carries an earlier time, so these are looked at each time; what was noted
before is not noted again."""


class Notifications(Cases):
    """One row for each case, target, and thing that became of the case. Each target has one job that calls these."""

    def note_events(self, target: str) -> None:
        """Notes what has become of cases since the last call; at the first one for a target, nothing has."""
        now = self.now()
        with self._engine.connect() as connection:
            stored = connection.scalar(select(_targets.c.seen_until).where(_targets.c.target == target))
        # min: or what changes after the clock was set back would not count as new
        seen_until = now if stored is None else min(stored, now)
        recent = self._cases(
            select(_cases).where(_cases.c.changed_at > seen_until - _OVERLAP_S).order_by(_cases.c.changed_at)
        )
        rows = [row for case in recent for row in self._events(case, target)]
        seen_until = min(max([seen_until, *(case.changed_at for case in recent)]), now)
        noted = select(_notifications.c.case_id, _notifications.c.about, _notifications.c.subject).where(
            _notifications.c.target == target, _notifications.c.case_id.in_({row["case_id"] for row in rows})
        )
        with self._engine.connect() as connection:
            known = {tuple(found) for found in connection.execute(noted)}
        new = [row for row in rows if (row["case_id"], row["about"], row["subject"]) not in known]
        if not new and seen_until == stored:
            return
        if stored is None:
            older = {"state": NotificationState.UNWANTED, "reason": "it is older than this target"}
            new = [row | older for row in new]
        with self._writing() as connection:
            if new:
                connection.execute(_notifications.insert(), new)
            if stored is None:
                connection.execute(_targets.insert().values(target=target, seen_until=seen_until))
            else:
                connection.execute(update(_targets).where(_targets.c.target == target).values(seen_until=seen_until))

    def _events(self, case: Case, target: str) -> list[dict[str, Any]]:
        """What the case says has become of it; results stay told of when their delivery fails."""
        told = []
        results = case.valid_result_dir
        if case.state in (CaseState.DELIVERING, CaseState.DONE, CaseState.FAILED) and results is not None:
            told.append((About.ANALYSED, str(results.relative_to(self.data_dir)), case.summary))
        if case.state is CaseState.REFUSED:
            told.append((About.NOT_ANALYSED, case.reason, case.reason))
        if case.state is CaseState.FAILED:
            told.append((About.FAILED, case.reason, case.reason))
        return [
            {
                "case_id": case.case_id,
                "target": target,
                "about": about,
                "subject": subject,
                "text": text,
                "at": case.changed_at,
                "state": NotificationState.PENDING,
                "next_attempt_at": case.changed_at,
            }
            for about, subject, text in told
        ]

    def next_notification(self, target: str) -> Notification | None:
        """The notification of `target` that is due longest, None if none is."""
        due = _query().where(
            _notifications.c.state == NotificationState.PENDING,
            _notifications.c.target == target,
            _notifications.c.next_attempt_at <= self.now(),
        )
        found = self._notifications(due.order_by(_notifications.c.next_attempt_at).limit(1))
        return found[0] if found else None

    def notifications(self, limit: int | None = None) -> list[Notification]:
        """Notifications, the latest first."""
        return self._notifications(_query().order_by(_notifications.c.at.desc()).limit(limit))

    def is_overtaken(self, notification: Notification) -> bool:
        """Whether a later outcome of the case, results or a refusal, is noted for its target."""
        later = select(_notifications.c.notification_id).where(
            _notifications.c.case_id == notification.case_id,
            _notifications.c.target == notification.target,
            _notifications.c.about.in_((About.ANALYSED, About.NOT_ANALYSED)),
            _notifications.c.notification_id > notification.notification_id,
        )
        with self._engine.connect() as connection:
            return connection.scalar(later.limit(1)) is not None

    def settle_notification(
        self, notification: Notification, state: NotificationState, reason: str = "", next_attempt_at: float = 0.0
    ) -> None:
        """Notes how an attempt went.

        SQLite gives the number of a deleted notification to the next one, which is told by its target and time.
        """
        mine = update(_notifications).where(
            _notifications.c.notification_id == notification.notification_id,
            _notifications.c.target == notification.target,
            _notifications.c.at == notification.at,
        )
        attempts = notification.attempts + (state is not NotificationState.UNWANTED)
        with self._writing() as connection:
            connection.execute(
                mine.values(state=state, reason=reason, attempts=attempts, next_attempt_at=next_attempt_at)
            )

    def drop_targets_except(self, names: Sequence[str]) -> None:
        """Gives up what is to be told to targets that are no longer configured: retention waits for all of it."""
        gone = update(_notifications).where(
            _notifications.c.state == NotificationState.PENDING, _notifications.c.target.not_in(names)
        )
        reason = "this target is no longer in the configuration"
        with self._writing() as connection:
            connection.execute(gone.values(state=NotificationState.FAILED, reason=reason))

    def retry_notifications(self, notification_ids: Sequence[int]) -> int:
        """Has failed notifications sent again, from their first attempt on; returns how many."""
        failed = update(_notifications).where(
            _notifications.c.notification_id.in_(notification_ids), _notifications.c.state == NotificationState.FAILED
        )
        again = {"state": NotificationState.PENDING, "attempts": 0, "next_attempt_at": self.now(), "reason": ""}
        with self._writing() as connection:
            return connection.execute(failed.values(again)).rowcount

    def _notifications(self, query: Select[Any]) -> list[Notification]:
        with self._engine.connect() as connection:
            return [self._to_notification(row) for row in connection.execute(query).mappings()]

    def _to_notification(self, row: RowMapping) -> Notification:
        about = About(row["about"])
        values = {name: row[name] for name in Notification.__dataclass_fields__ if name != "result_dir"}
        values |= {"about": about, "state": NotificationState(row["state"])}
        return Notification(**values, result_dir=self.data_dir / row["subject"] if about is About.ANALYSED else None)


def _query() -> Select[Any]:
    of_case = (_cases.c.study_instance_uid, _cases.c.series_instance_uid, _cases.c.calling_ae_title)
    return select(_notifications, *of_case).join(_cases)
