"""The database: which Instances are here, how far each case is, what was made of it and where it went.

SQLite in WAL mode with `synchronous=FULL`: a committed row survives a power cut, which is what an acknowledged C-STORE
stands on. Every write is one short `BEGIN IMMEDIATE` transaction, so several processes can share the file. Nothing here
names a patient. Called by every stage of the node; calls none of them.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    RowMapping,
    Select,
    String,
    Table,
    UniqueConstraint,
    Update,
    create_engine,
    event,
    select,
    update,
)
from sqlalchemy import Index as TableIndex
from sqlalchemy.dialects.sqlite import insert

from node.case import Case, CaseState, Delivery, DeliveryState

_metadata = MetaData()

_associations = Table(
    "associations",
    _metadata,
    Column("association_id", Integer, primary_key=True),
    Column("calling_ae_title", String(16), nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("ended_at", Float),  # None while it is open
    Column("released", Integer),  # 1 released by the peer, 0 aborted, broken or lost with the receiver
)
_cases = Table(
    "cases",
    _metadata,
    Column("case_id", Integer, primary_key=True),
    Column("series_instance_uid", String(64), nullable=False, unique=True),
    Column("study_instance_uid", String(64), nullable=False),
    Column("calling_ae_title", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String, nullable=False, default=""),
    Column("num_instances", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("first_received_at", Float, nullable=False),
    Column("last_received_at", Float, nullable=False),
    Column("next_check_at", Float, nullable=False),  # when completeness is next judged
    Column("changed_at", Float, nullable=False),
    Column("result_dir", String),  # relative to the data folder
    Column("summary", String, nullable=False, default=""),
    TableIndex("cases_by_state", "state", "next_check_at"),
)
_instances = Table(
    "instances",
    _metadata,
    Column("sop_instance_uid", String(64), primary_key=True),
    Column(
        "series_instance_uid",
        String(64),
        ForeignKey("cases.series_instance_uid", deferrable=True, initially="DEFERRED"),  # its case is written after it
        nullable=False,
        index=True,
    ),
    Column("association_id", Integer, ForeignKey("associations.association_id"), nullable=False, index=True),
    Column("path", String, nullable=False),  # relative to the data folder
    Column("headers", JSON, nullable=False),  # SliceHeader.to_dict() of every frame
)
_results = Table(
    "results",
    _metadata,
    Column("sop_instance_uid", String(64), primary_key=True),
    Column("case_id", Integer, ForeignKey("cases.case_id"), nullable=False),
)
_deliveries = Table(
    "deliveries",
    _metadata,
    Column("delivery_id", Integer, primary_key=True),
    Column("case_id", Integer, ForeignKey("cases.case_id"), nullable=False),
    Column("destination", String, nullable=False),
    Column("result_dir", String, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", Float, nullable=False),
    Column("reason", String, nullable=False, default=""),
    UniqueConstraint("case_id", "destination"),
    TableIndex("deliveries_due", "state", "destination", "next_attempt_at"),
)


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


class Index:
    """The database of one data folder. Safe to use from several threads and processes at once.

    A change of a case names the snapshot it was decided on and is dropped (False) when the case has moved on since.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        self._engine = _open(data_dir / "cspine.sqlite")

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    # ---- receive ----

    def open_association(self, calling_ae_title: str) -> int:
        """Notes a new association; returns its id."""
        row = _associations.insert().values(calling_ae_title=calling_ae_title, opened_at=time.time())
        with self._writing() as connection:
            return int(connection.execute(row.returning(_associations.c.association_id)).scalar_one())

    def end_association(self, association_id: int, *, released: bool) -> None:
        """Notes that an association ended, and has the Series it carried judged at once."""
        now = time.time()
        association = _associations.c.association_id == association_id
        carried = select(_instances.c.series_instance_uid).where(_instances.c.association_id == association_id)
        touched = _cases.c.series_instance_uid.in_(carried) & (_cases.c.state == CaseState.RECEIVING)
        with self._writing() as connection:
            connection.execute(update(_associations).where(association).values(ended_at=now, released=int(released)))
            connection.execute(update(_cases).where(touched).values(next_check_at=now))

    def end_lost_associations(self) -> None:
        """Closes what a receiver that died left open; nothing is open when one starts."""
        lost = update(_associations).where(_associations.c.ended_at.is_(None))
        with self._writing() as connection:
            connection.execute(lost.values(ended_at=time.time(), released=0))

    def find_instance(self, sop_instance_uid: str) -> Path | None:
        """Path of a stored Instance, None if it is not here."""
        found = select(_instances.c.path).where(_instances.c.sop_instance_uid == sop_instance_uid)
        with self._engine.connect() as connection:
            path = connection.scalar(found)
        return None if path is None else self.data_dir / path

    def is_result(self, sop_instance_uid: str) -> bool:
        """Whether this node made that Instance."""
        made = select(_results.c.case_id).where(_results.c.sop_instance_uid == sop_instance_uid)
        with self._engine.connect() as connection:
            return connection.scalar(made) is not None

    def add_instance(
        self,
        *,
        association_id: int,
        calling_ae_title: str,
        path: Path,
        headers: Sequence[dict[str, Any]],
        quiet_time_s: float,
    ) -> bool:
        """Notes an Instance whose file is safely on disk; no change, and False, if its UID is here already.

        The first Instance of a Series opens its case; one that comes when the case has moved on reopens it.
        """
        now = time.time()
        first = headers[0]
        instance = insert(_instances).values(
            sop_instance_uid=first["sop_instance_uid"],
            series_instance_uid=first["series_instance_uid"],
            association_id=association_id,
            path=str(path.relative_to(self.data_dir)),
            headers=list(headers),
        )
        arrival = {
            "state": CaseState.RECEIVING,
            "reason": "",
            "attempts": 0,
            "summary": "",
            "last_received_at": now,
            "next_check_at": now + quiet_time_s,
            "changed_at": now,
        }
        case = insert(_cases).values(
            series_instance_uid=first["series_instance_uid"],
            study_instance_uid=first["study_instance_uid"],
            calling_ae_title=calling_ae_title,
            num_instances=1,
            first_received_at=now,
            **arrival,
        )
        case = case.on_conflict_do_update(
            index_elements=["series_instance_uid"], set_=arrival | {"num_instances": _cases.c.num_instances + 1}
        )
        with self._writing() as connection:
            is_new = bool(connection.execute(instance.on_conflict_do_nothing()).rowcount)
            if is_new:
                connection.execute(case)
            return is_new

    # ---- complete ----

    def cases_to_check(self) -> list[Case]:
        """Cases whose completeness is to be judged now, the longest waiting first."""
        due = (_cases.c.state == CaseState.RECEIVING) & (_cases.c.next_check_at <= time.time())
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
            connection.execute(_unmoved(case).values(next_check_at=at))

    def queue(self, case: Case) -> bool:
        """The Series is whole."""
        return self._move(case, CaseState.QUEUED)

    def refuse(self, case: Case, reason: str) -> bool:
        """The Series cannot be analysed."""
        return self._move(case, CaseState.REFUSED, reason)

    # ---- analyse ----

    def claim_next(self) -> Case | None:
        """The case that has been queued longest, now ANALYSING and one attempt older; None if none is queued."""
        queued = select(_cases).where(_cases.c.state == CaseState.QUEUED).order_by(_cases.c.changed_at).limit(1)
        for case in self._cases(queued):
            if self._move(case, CaseState.ANALYSING, attempts=case.attempts + 1):
                # Not read again: an Instance that came since must make `finish` miss.
                return replace(case, state=CaseState.ANALYSING, reason="", attempts=case.attempts + 1)
        return None

    def instance_paths(self, series_instance_uid: str) -> list[Path]:
        """Files of a Series, in no order."""
        here = select(_instances.c.path).where(_instances.c.series_instance_uid == series_instance_uid)
        with self._engine.connect() as connection:
            return [self.data_dir / path for path in connection.scalars(here)]

    def finish(
        self,
        case: Case,
        result_dir: Path,
        *,
        summary: str,
        sop_instance_uids: Sequence[str],
        destinations: Sequence[str],
    ) -> bool:
        """The results are safely on disk and go to `destinations`; whatever of the case was on its way is replaced."""
        now = time.time()
        relative = str(result_dir.relative_to(self.data_dir))
        with self._writing() as connection:
            state = CaseState.DELIVERING if destinations else CaseState.DONE
            moved = connection.execute(
                _unmoved(case).values(state=state, reason="", result_dir=relative, summary=summary, changed_at=now)
            ).rowcount
            if not moved:
                return False
            for uid in sop_instance_uids:
                made = insert(_results).values(sop_instance_uid=uid, case_id=case.case_id)
                connection.execute(made.on_conflict_do_nothing())
            for destination in destinations:
                due = {
                    "result_dir": relative,
                    "state": DeliveryState.PENDING,
                    "attempts": 0,
                    "next_attempt_at": now,
                    "reason": "",
                }
                row = insert(_deliveries).values(case_id=case.case_id, destination=destination, **due)
                connection.execute(row.on_conflict_do_update(index_elements=["case_id", "destination"], set_=due))
            return True

    def fail_attempt(self, case: Case, reason: str, max_attempts: int) -> CaseState:
        """An analysis broke: QUEUED again, or FAILED when the attempts are used up; returns which."""
        state = CaseState.QUEUED if case.attempts < max_attempts else CaseState.FAILED
        self._move(case, state, reason)
        return state

    def put_back(self, held: Collection[int]) -> int:
        """Queues again, as if not begun, what is ANALYSING but for the cases `held`; returns how many."""
        begun = update(_cases).where(_cases.c.state == CaseState.ANALYSING, _cases.c.case_id.not_in(held))
        queued = {"state": CaseState.QUEUED, "attempts": _cases.c.attempts - 1, "changed_at": time.time()}
        with self._writing() as connection:
            return connection.execute(begun.values(queued)).rowcount

    # ---- deliver ----

    def next_delivery(self, destination: str) -> Delivery | None:
        """The delivery to `destination` that is due longest, None if none is."""
        due = (
            select(_deliveries, _cases.c.series_instance_uid, _cases.c.study_instance_uid)
            .join(_cases)
            .where(
                _deliveries.c.state == DeliveryState.PENDING,
                _deliveries.c.destination == destination,
                _deliveries.c.next_attempt_at <= time.time(),
            )
            .order_by(_deliveries.c.next_attempt_at)
            .limit(1)
        )
        with self._engine.connect() as connection:
            row = connection.execute(due).mappings().first()
        if row is None:
            return None
        return Delivery(
            delivery_id=row["delivery_id"],
            case_id=row["case_id"],
            series_instance_uid=row["series_instance_uid"],
            study_instance_uid=row["study_instance_uid"],
            result_dir=self.data_dir / row["result_dir"],
            destination=row["destination"],
            attempts=row["attempts"] + 1,
        )

    def settle_delivery(
        self, delivery: Delivery, state: DeliveryState, reason: str = "", next_attempt_at: float = 0.0
    ) -> None:
        """Notes how an attempt went; the last one of a case to end makes the case DONE or FAILED."""
        mine = update(_deliveries).where(
            _deliveries.c.delivery_id == delivery.delivery_id,
            _deliveries.c.result_dir == str(delivery.result_dir.relative_to(self.data_dir)),
        )
        with self._writing() as connection:
            outcome = mine.values(
                state=state, reason=reason, attempts=delivery.attempts, next_attempt_at=next_attempt_at
            )
            if connection.execute(outcome).rowcount:
                _settle_case(connection, delivery.case_id)

    def drop_destinations_except(self, names: Sequence[str]) -> None:
        """Gives up deliveries to destinations that are no longer configured."""
        gone = (_deliveries.c.state == DeliveryState.PENDING) & _deliveries.c.destination.not_in(names)
        with self._writing() as connection:
            case_ids = connection.scalars(select(_deliveries.c.case_id).where(gone)).all()
            reason = "this destination is no longer in the configuration"
            connection.execute(update(_deliveries).where(gone).values(state=DeliveryState.FAILED, reason=reason))
            for case_id in set(case_ids):
                _settle_case(connection, case_id)

    # ---- look ----

    def case(self, series_instance_uid: str) -> Case | None:
        """The case of a Series, None if there is none."""
        found = self._cases(select(_cases).where(_cases.c.series_instance_uid == series_instance_uid))
        return found[0] if found else None

    def cases(self, limit: int | None = None) -> list[Case]:
        """Cases, the latest first."""
        return self._cases(select(_cases).order_by(_cases.c.first_received_at.desc()).limit(limit))

    def _cases(self, query: Select[Any]) -> list[Case]:
        with self._engine.connect() as connection:
            return [self._to_case(row) for row in connection.execute(query).mappings()]

    def _to_case(self, row: RowMapping) -> Case:
        values = {name: row[name] for name in Case.__dataclass_fields__}
        values["state"] = CaseState(row["state"])
        values["result_dir"] = self.data_dir / row["result_dir"] if row["result_dir"] else None
        return Case(**values)

    def _move(self, case: Case, state: CaseState, reason: str = "", **values: Any) -> bool:
        with self._writing() as connection:
            moved = _unmoved(case).values(state=state, reason=reason, changed_at=time.time(), **values)
            return bool(connection.execute(moved).rowcount)


def _unmoved(case: Case) -> Update:
    """An update of the case that misses if it changed since the snapshot."""
    return update(_cases).where(
        _cases.c.case_id == case.case_id,
        _cases.c.state == case.state,
        _cases.c.num_instances == case.num_instances,
        _cases.c.attempts == case.attempts,
    )


def _settle_case(connection: Connection, case_id: int) -> None:
    """Takes the case of a delivery on, and lets its reason say what is wrong with any of its deliveries."""
    rows = connection.execute(select(_deliveries).where(_deliveries.c.case_id == case_id)).mappings().all()
    states = {row["state"] for row in rows}
    if DeliveryState.PENDING in states:
        state = CaseState.DELIVERING
    elif DeliveryState.FAILED in states:
        state = CaseState.FAILED
    else:
        state = CaseState.DONE
    reason = "; ".join(f"delivery to {row['destination']}: {row['reason']}" for row in rows if row["reason"])
    delivering = (_cases.c.case_id == case_id) & (_cases.c.state == CaseState.DELIVERING)
    connection.execute(update(_cases).where(delivering).values(state=state, reason=reason, changed_at=time.time()))


def _open(path: Path) -> Engine:
    """An engine on the SQLite file, with its tables made."""
    # isolation_level None: the driver starts no transaction of its own, `_writing` says BEGIN IMMEDIATE.
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    _metadata.create_all(engine)
    return engine
