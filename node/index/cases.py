"""Cases as every stage sees them: read as snapshots, moved on only from the snapshot the decision was made on."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import RowMapping, Select, Update, func, select, update

from node.case import TRANSITIONS, Case, CaseState
from node.index import tables
from node.index.database import Database

_cases = tables.cases


class Cases(Database):
    """A change of a case names the snapshot it was decided on and is dropped (False) when the case has moved on."""

    def case(self, series_instance_uid: str) -> Case | None:
        """The case of a Series, None if there is none."""
        found = self._cases(select(_cases).where(_cases.c.series_instance_uid == series_instance_uid))
        return found[0] if found else None

    def cases(self, limit: int | None = None, states: Collection[CaseState] = (), offset: int = 0) -> list[Case]:
        """Cases, the latest first. states: only those in one of them. offset: how many to leave out."""
        query = select(_cases).order_by(_cases.c.first_received_at.desc(), _cases.c.case_id.desc())
        query = query.limit(limit).offset(offset)
        return self._cases(query.where(_cases.c.state.in_(states)) if states else query)

    def fingerprint(self) -> tuple[Any, ...]:
        """Something else whenever a case has come, changed, or gone, or something of it was purged."""
        counted: list[Any] = [func.sum(_cases.c.num_instances), func.sum(_cases.c.changed_at)]
        counted += [func.count(_cases.c[it]) for it in ("case_id", "originals_purged_at", "results_purged_at")]
        with self._engine.connect() as connection:
            return tuple(connection.execute(select(*counted)).one())

    def _cases(self, query: Select[Any]) -> list[Case]:
        with self._engine.connect() as connection:
            return [self._to_case(row) for row in connection.execute(query).mappings()]

    def _to_case(self, row: RowMapping) -> Case:
        values = {name: row[name] for name in Case.__dataclass_fields__}
        values["state"] = CaseState(row["state"])
        values |= {name: bool(row[name]) for name in ("is_asked_for", "is_outdated")}
        values["result_dir"] = self.data_dir / row["result_dir"] if row["result_dir"] else None
        return Case(**values)

    def _move(self, case: Case, state: CaseState, reason: str = "", **values: Any) -> bool:
        moved = moved_to(case, state).values(reason=reason, changed_at=self.now(), **values)
        with self._writing() as connection:
            return bool(connection.execute(moved).rowcount)


def moved_to(case: Case, state: CaseState) -> Update:
    """`unmoved` into another state.

    Raises:
        ValueError: it does not follow the state of the snapshot.
    """
    if state not in TRANSITIONS[case.state]:
        raise ValueError(f"case {case.case_id} is {case.state}, which {state} does not follow")
    return unmoved(case).values(state=state)


def unmoved(case: Case) -> Update:
    """An update of the case that misses if it changed since the snapshot.

    SQLite gives the number of a deleted case to the next one, which is told by when it began.
    """
    return update(_cases).where(
        _cases.c.case_id == case.case_id,
        _cases.c.series_instance_uid == case.series_instance_uid,
        _cases.c.first_received_at == case.first_received_at,
        _cases.c.state == case.state,
        _cases.c.num_instances == case.num_instances,
        _cases.c.attempts == case.attempts,
    )
