"""What completeness asks of the database, and what it decides there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update

from node.case import Carrier, Case, CaseState
from node.index import tables
from node.index.cases import Cases, moved_to, unmoved
from node.index.deliveries import supersede_deliveries

_associations, _cases, _instances = tables.associations, tables.cases, tables.instances


@dataclass(frozen=True, kw_only=True)
class StoredSeries:
    """What completeness is judged on: `SliceHeader.to_dict()` of every slice, and the associations that carried it."""

    headers: list[dict[str, Any]]
    carriers: list[Carrier]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What was won against the quiet time over all cases, and how often a late Instance came after all."""

    num_cases: int
    won_s: float
    num_reopened: int


class Completing(Cases):
    """Which Series are due to be judged, what is here of them, and what was decided."""

    def cases_to_check(self) -> list[Case]:
        """Cases whose completeness is to be judged now, the longest waiting first."""
        due = (_cases.c.state == CaseState.RECEIVING) & (_cases.c.next_check_at <= self.now())
        return self._cases(select(_cases).where(due).order_by(_cases.c.next_check_at))

    def cases_of_study(self, study_instance_uid: str) -> list[Case]:
        """The cases of a Study, in the order in which they began to arrive."""
        of_study = select(_cases).where(_cases.c.study_instance_uid == study_instance_uid)
        return self._cases(of_study.order_by(_cases.c.first_received_at, _cases.c.case_id))

    def stored_series(self, series_instance_uid: str) -> StoredSeries:
        """What is here of a Series."""
        here = select(_instances.c.headers).where(_instances.c.series_instance_uid == series_instance_uid)
        with self._engine.connect() as connection:
            headers = connection.scalars(here).all()
        return StoredSeries(
            headers=[frame for frames in headers for frame in frames],
            carriers=self.carriers(series_instance_uid),
        )

    def carriers(self, series_instance_uid: str) -> list[Carrier]:
        """The associations that carried a Series."""
        return self._carriers([series_instance_uid])[series_instance_uid]

    def earlier_carriers(self, case: Case, limit: int, min_instances: int) -> list[list[Carrier]]:
        """The associations that carried each of the sender's latest other Series that are settled and not too small."""
        latest = (
            select(_cases.c.series_instance_uid)
            .where(
                _cases.c.calling_ae_title == case.calling_ae_title,
                _cases.c.case_id != case.case_id,
                _cases.c.num_instances >= min_instances,
                _cases.c.state != CaseState.RECEIVING,
            )
            .order_by(_cases.c.last_received_at.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            series = connection.scalars(latest).all()
        return list(self._carriers(series).values())

    def _carriers(self, series: Sequence[str]) -> dict[str, list[Carrier]]:
        pairs = (
            select(_instances.c.series_instance_uid, _instances.c.association_id)
            .where(_instances.c.series_instance_uid.in_(series))
            .distinct()
            .subquery()
        )
        query = select(
            pairs.c.series_instance_uid, _associations.c.opened_at, _associations.c.ended_at, _associations.c.released
        ).join(_associations, _associations.c.association_id == pairs.c.association_id)
        carriers: dict[str, list[Carrier]] = {uid: [] for uid in series}
        with self._engine.connect() as connection:
            for uid, opened_at, ended_at, released in connection.execute(query):
                carriers[uid].append(Carrier(opened_at=opened_at, ended_at=ended_at, released=bool(released)))
        return carriers

    def check_again(self, case: Case, at: float) -> None:
        """Has completeness judged again at `at`, or when an association ends; as one may have since the snapshot."""
        with self._writing() as connection:
            as_planned = _cases.c.next_check_at == case.next_check_at
            connection.execute(unmoved(case).where(as_planned).values(next_check_at=at))

    def check_now(self, case: Case) -> None:
        """Has completeness judged again at once, whatever is planned."""
        with self._writing() as connection:
            connection.execute(unmoved(case).values(next_check_at=self.now()))

    def queue(self, case: Case, *, won_s: float = 0.0, num_at_source: int | None = None) -> bool:
        """The Series is whole, or is taken as it is. won_s: how much earlier than after the quiet time.

        num_at_source: Instances that its source holds; None if it does not say.
        """
        return self._move(case, CaseState.QUEUED, queued_at=self.now(), won_s=won_s, num_at_source=num_at_source)

    def refuse(self, case: Case, reason: str) -> bool:
        """The Series cannot be analysed; results of fewer Instances go out no more, and are shown no more."""
        return self._end(case, CaseState.REFUSED, reason)

    def skip(self, case: Case, reason: str, *, skipped_for: str | None = None) -> bool:
        """The Series is not to be analysed; earlier results as with `refuse`. skipped_for: SeriesInstanceUID of the one
        that was preferred."""
        return self._end(case, CaseState.SKIPPED, reason, skipped_for=skipped_for)

    def _end(self, case: Case, state: CaseState, reason: str, **values: Any) -> bool:
        now = self.now()
        with self._writing() as connection:
            moved = moved_to(case, state).values(reason=reason, changed_at=now, is_outdated=1, **values)
            if not connection.execute(moved).rowcount:
                return False
            supersede_deliveries(connection, case.case_id, now)
            return True

    def reconsider_skipped(self) -> None:
        """Has a Series that was passed over judged again when the one that was preferred came to nothing."""
        preferred = _cases.alias()
        refused = preferred.c.state == CaseState.REFUSED  # its results, if any, are reports that say so
        failed = (preferred.c.state == CaseState.FAILED) & preferred.c.result_dir.is_(None)
        came_to_nothing = select(preferred.c.series_instance_uid).where(refused | failed)
        is_here = _cases.c.originals_purged_at.is_(None)
        passed_over = (_cases.c.state == CaseState.SKIPPED) & _cases.c.skipped_for.in_(came_to_nothing) & is_here
        with self._engine.connect() as connection:
            case_ids = connection.scalars(select(_cases.c.case_id).where(passed_over)).all()
        if case_ids:
            again = {"state": CaseState.RECEIVING, "reason": "", "next_check_at": self.now(), "skipped_for": None}
            with self._writing() as connection:
                connection.execute(update(_cases).where(_cases.c.case_id.in_(case_ids), passed_over).values(again))

    def totals(self) -> Totals:
        """What was won, over all cases."""
        sums = select(func.count(_cases.c.won_s), func.sum(_cases.c.won_s), func.sum(_cases.c.num_reopened))
        with self._engine.connect() as connection:
            num_cases, won_s, num_reopened = connection.execute(sums).one()
        return Totals(num_cases=num_cases, won_s=won_s or 0.0, num_reopened=num_reopened or 0)
