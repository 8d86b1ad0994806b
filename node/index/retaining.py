"""What may go from disk, and what went. The files themselves are removed by `node/retention.py`.

A purge is one transaction: rows of Instances go, the case is marked, and the paths are noted as removals, so that a
crash at any point leaves either everything or a list of what is still to be removed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Update, bindparam, delete, select

from node.case import FINISHED, UNSETTLED, Case, DeliveryState, NotificationState
from node.index import tables
from node.index.cases import Cases, unmoved

_cases, _deliveries, _instances = tables.cases, tables.deliveries, tables.instances
_notifications, _removals = tables.notifications, tables.removals


class _MovedOnError(Exception):
    """The case is not what it was when the purge was decided; takes the transaction back."""


class Retaining(Cases):
    """Finished cases, their marks, and the files that are still to be removed."""

    def finished_cases(self) -> list[Case]:
        """Cases that nothing more happens to and of which something is kept, the one finished longest ago first."""
        has_results = _cases.c.result_dir.is_not(None) & _cases.c.results_purged_at.is_(None)
        kept = _cases.c.originals_purged_at.is_(None) | has_results
        done = _cases.c.state.in_(sorted(FINISHED)) & _nothing_pending()
        return self._cases(select(_cases).where(done, kept).order_by(_cases.c.changed_at))

    def undelivered_cases(self) -> set[int]:
        """Ids of cases of which a delivery failed or was given up."""
        failed = select(_deliveries.c.case_id).where(_deliveries.c.state == DeliveryState.FAILED)
        with self._engine.connect() as connection:
            return set(connection.scalars(failed))

    def purge_originals(self, case: Case) -> bool:
        """Forgets the Instances of a finished case: if they are sent again, they are new."""
        mine = _instances.c.series_instance_uid == case.series_instance_uid
        gone = delete(_instances).where(mine).returning(_instances.c.path)
        # None is here any more of whose UIDs others were refused.
        no_conflicts = {"num_conflicts": 0, "last_conflict_at": None, "last_conflict_from": None}
        here = unmoved(case).where(_cases.c.originals_purged_at.is_(None))
        marked = here.values(originals_purged_at=self.now(), **no_conflicts)
        try:
            with self._writing() as connection:
                paths = connection.scalars(gone).all()
                _mark(connection, case, marked, paths)
        except _MovedOnError:
            return False
        return True

    def purge_results(self, case: Case) -> bool:
        """Marks the results of a finished case as gone; that this node made them, and where they were, stays known."""
        if case.result_dir is None:
            return False
        latest = case.result_dir.relative_to(self.data_dir)
        still_there = (_cases.c.result_dir == str(latest)) & _cases.c.results_purged_at.is_(None)
        marked = unmoved(case).where(still_there).values(results_purged_at=self.now())
        try:
            with self._writing() as connection:
                _mark(connection, case, marked, [str(latest.parent)])  # those that were superseded go too
        except _MovedOnError:
            return False
        return True

    def removals(self) -> list[Path]:
        """Files and folders that are purged and may still be on disk, but for those of cases that are at work again."""
        listed = select(_removals.c.path).join(_cases).where(_cases.c.state.in_(sorted(FINISHED)))
        with self._engine.connect() as connection:
            return [self.data_dir / path for path in connection.scalars(listed)]

    def note_removed(self, paths: Sequence[Path]) -> None:
        """These are gone from disk."""
        gone = delete(_removals).where(_removals.c.path == bindparam("gone"))
        with self._writing() as connection:
            connection.execute(gone, [{"gone": str(path.relative_to(self.data_dir))} for path in paths])


def _nothing_pending() -> Any:
    """No destination is still to get the results of the case, nobody still to be told of them."""
    to_deliver = select(_deliveries.c.case_id).where(_deliveries.c.state.in_(UNSETTLED))
    to_tell = select(_notifications.c.case_id).where(_notifications.c.state == NotificationState.PENDING)
    return _cases.c.case_id.not_in(to_deliver) & _cases.c.case_id.not_in(to_tell)


def _mark(connection: Connection, case: Case, marked: Update, paths: Sequence[str]) -> None:
    """Marks the case and notes what is to be removed.

    Raises:
        _MovedOnError: it has changed, or is being delivered again.
    """
    # Since when: it may have been analysed again, and be as it was.
    same = _cases.c.changed_at == case.changed_at
    finished = marked.where(_cases.c.state.in_(sorted(FINISHED)), same, _nothing_pending())
    if not connection.execute(finished).rowcount:
        raise _MovedOnError
    if paths:
        connection.execute(_removals.insert(), [{"path": path, "case_id": case.case_id} for path in paths])
