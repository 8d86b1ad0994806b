"""What completeness asks of the database."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from node.case import Case, CaseState
from node.index import tables
from node.index.cases import Cases, unmoved

_associations, _cases, _instances = tables.associations, tables.cases, tables.instances


@dataclass(frozen=True, kw_only=True)
class StoredSeries:
    """What completeness is judged on.

    headers: `SliceHeader.to_dict()`, one per slice. num_open: associations that carried it and are still open.
    num_released, num_broken: those that ended well, and those that did not.
    """

    headers: list[dict[str, Any]]
    num_open: int
    num_released: int
    num_broken: int


class Completing(Cases):
    """Which Series are due to be judged, what is here of them, and what was decided."""

    def cases_to_check(self) -> list[Case]:
        """Cases whose completeness is to be judged now, the longest waiting first."""
        due = (_cases.c.state == CaseState.RECEIVING) & (_cases.c.next_check_at <= self.now())
        return self._cases(select(_cases).where(due).order_by(_cases.c.next_check_at))

    def stored_series(self, series_instance_uid: str) -> StoredSeries:
        """What is here of a Series."""
        here = _instances.c.series_instance_uid == series_instance_uid
        carriers = _associations.c.association_id.in_(select(_instances.c.association_id).where(here))
        with self._engine.connect() as connection:
            headers = connection.scalars(select(_instances.c.headers).where(here)).all()
            released = connection.scalars(select(_associations.c.released).where(carriers)).all()
        return StoredSeries(
            headers=[frame for frames in headers for frame in frames],
            num_open=released.count(None),
            num_released=released.count(1),
            num_broken=released.count(0),
        )

    def check_again(self, case: Case, at: float) -> None:
        """Has completeness judged again at `at`, or when an association ends."""
        with self._writing() as connection:
            connection.execute(unmoved(case).values(next_check_at=at))

    def queue(self, case: Case) -> bool:
        """The Series is whole."""
        return self._move(case, CaseState.QUEUED, queued_at=self.now())

    def refuse(self, case: Case, reason: str) -> bool:
        """The Series cannot be analysed."""
        return self._move(case, CaseState.REFUSED, reason)
