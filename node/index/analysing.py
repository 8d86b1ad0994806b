"""Cases on their way through a worker."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import insert

from node.case import Case, CaseState
from node.index import tables
from node.index.cases import moved_to
from node.index.deliveries import replace_deliveries
from node.index.operating import Operating

_cases, _instances, _results = tables.cases, tables.instances, tables.results
_removals = tables.removals


class Analysing(Operating):
    """Claims, and how they ended."""

    def claim_next(self, rank: Callable[[Case], Any] = attrgetter("queued_at")) -> Case | None:
        """The queued case that ranks lowest, now ANALYSING and one attempt older; None if there is none, or a pause.

        However many claim at once, a case goes to one of them.
        """
        if self.paused_since() is not None:
            return None
        for case in sorted(self._cases(select(_cases).where(_cases.c.state == CaseState.QUEUED)), key=rank):
            if self._move(case, CaseState.ANALYSING, attempts=case.attempts + 1):
                # Not read again: an Instance that came since must make `finish` miss.
                return replace(case, state=CaseState.ANALYSING, reason="", attempts=case.attempts + 1)
        return None

    def instance_files(self, series_instance_uid: str) -> dict[str, Path]:
        """Files of a Series by SOPInstanceUID, in no order. Their names say nothing."""
        columns = select(_instances.c.sop_instance_uid, _instances.c.path)
        here = columns.where(_instances.c.series_instance_uid == series_instance_uid)
        with self._engine.connect() as connection:
            return {uid: self.data_dir / path for uid, path in connection.execute(here)}

    def instance_paths(self, series_instance_uid: str) -> list[Path]:
        """The same files, in no order."""
        return list(self.instance_files(series_instance_uid).values())

    def instance_headers(self, series_instance_uid: str) -> dict[Path, list[dict[str, Any]]]:
        """`SliceHeader.to_dict()` of every frame, by the file of its Instance."""
        here = select(_instances.c.path, _instances.c.headers).where(
            _instances.c.series_instance_uid == series_instance_uid
        )
        with self._engine.connect() as connection:
            return {self.data_dir / path: headers for path, headers in connection.execute(here)}

    def finish(
        self,
        case: Case,
        result_dir: Path,
        *,
        summary: str,
        sop_instance_uids: Sequence[str],
        destinations: Sequence[str],
        refusal: str = "",
    ) -> bool:
        """The results are safely on disk and go to `destinations`; whatever of the case was on its way is replaced.

        refusal: why the Series was not analysed, if the results are only the reports that say so.
        """
        now = self.now()
        relative = str(result_dir.relative_to(self.data_dir))
        with self._writing() as connection:
            state = CaseState.DELIVERING if destinations else CaseState.DONE
            state = CaseState.REFUSED if refusal else state
            moved = connection.execute(
                moved_to(case, state).values(
                    reason=refusal,
                    result_dir=relative,
                    results_purged_at=None,
                    summary=summary,
                    is_outdated=0,
                    changed_at=now,
                )
            ).rowcount
            if not moved:
                return False
            stale = (_removals.c.case_id == case.case_id) & (_removals.c.path == str(Path(relative).parent))
            connection.execute(delete(_removals).where(stale))  # purged before, and now in use again
            for uid in sop_instance_uids:
                made = insert(_results).values(sop_instance_uid=uid, case_id=case.case_id)
                connection.execute(made.on_conflict_do_nothing())
            replace_deliveries(connection, case.case_id, relative, destinations, now)
            return True

    def fail_attempt(self, case: Case, reason: str, max_attempts: int) -> CaseState:
        """An analysis broke: QUEUED again, or FAILED when the attempts are used up; returns which."""
        state = CaseState.QUEUED if case.attempts < max_attempts else CaseState.FAILED
        self._move(case, state, reason, queued_at=self.now())  # behind the others
        return state

    def put_off(self, case: Case, reason: str) -> None:
        """An analysis could not be done now: QUEUED again, as if not begun."""
        self._move(case, CaseState.QUEUED, reason, attempts=case.attempts - 1)

    def end_lost_attempts(self, held: Collection[int], reason: str, max_attempts: int) -> list[Case]:
        """`fail_attempt` for what is ANALYSING but for the cases `held`, which nobody has any more; these cases."""
        begun = select(_cases).where(_cases.c.state == CaseState.ANALYSING, _cases.c.case_id.not_in(held))
        lost = self._cases(begun)
        for case in lost:
            self.fail_attempt(case, reason, max_attempts)
        return lost

    def put_back(self) -> int:
        """Queues again, as if not begun, what is ANALYSING; returns how many."""
        begun = update(_cases).where(_cases.c.state == CaseState.ANALYSING)
        queued = {"state": CaseState.QUEUED, "attempts": _cases.c.attempts - 1, "changed_at": self.now()}
        with self._writing() as connection:
            return connection.execute(begun.values(queued)).rowcount
