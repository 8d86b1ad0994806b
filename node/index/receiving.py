"""What the receiver notes: associations, and Instances that are safely on disk."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from sqlalchemy import Select, bindparam, func, or_, select, update
from sqlalchemy import case as sql_case
from sqlalchemy.dialects.postgresql import Insert, insert

from node.case import CaseState
from node.index import tables
from node.index.cases import Cases
from node.index.database import CHUNK
from node.index.prepared import Prepared

_associations, _cases, _instances, _results = tables.associations, tables.cases, tables.instances, tables.results


@dataclass(frozen=True, kw_only=True)
class NewInstance:
    """An Instance whose file is written; whether it is safely on disk, who adds it sees to before it is acknowledged.

    checksum: CRC-32 of the file. headers: `SliceHeader.to_dict()` of every frame. attributes: what of it counts for the
    whole Series, by keyword.
    """

    association_id: int
    calling_ae_title: str
    path: Path
    num_bytes: int | None = None
    checksum: int | None = None
    headers: Sequence[dict[str, Any]]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def sop_instance_uid(self) -> str:
        return str(self.headers[0]["sop_instance_uid"])

    @property
    def series_instance_uid(self) -> str:
        return str(self.headers[0]["series_instance_uid"])

    @property
    def study_instance_uid(self) -> str:
        return str(self.headers[0]["study_instance_uid"])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """The file of an Instance that has a row. num_bytes: as it was received, None if that was not noted."""

    sop_instance_uid: str
    series_instance_uid: str
    path: Path
    num_bytes: int | None

    def is_whole(self) -> bool:
        """`is_whole` for it."""
        return is_whole(self.path, self.num_bytes)


def is_whole(path: str | Path, num_bytes: int | None) -> bool:
    """Whether a file is there, with its length, if that is known.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        found = os.stat(path).st_size  # noqa: PTH116 - the start of a node asks 100,000 times
    except (FileNotFoundError, NotADirectoryError):
        return False
    return num_bytes in (None, found)


class Receiving(Cases):
    """Rows of what came."""

    def open_association(self, calling_ae_title: str, receiver: str = "") -> int:
        """Notes a new association that a run of a receiver process has; returns its id."""
        row = _associations.insert().values(calling_ae_title=calling_ae_title, opened_at=self.now(), receiver=receiver)
        with self._writing() as connection:
            return int(connection.execute(row.returning(_associations.c.association_id)).scalar_one())

    def end_association(self, association_id: int, *, released: bool) -> None:
        """Notes that an association ended, and has the Series it carried judged at once."""
        now = self.now()
        association = _associations.c.association_id == association_id
        carried = select(_instances.c.series_instance_uid).where(_instances.c.association_id == association_id)
        touched = _cases.c.series_instance_uid.in_(carried) & (_cases.c.state == CaseState.RECEIVING)
        with self._writing() as connection:
            connection.execute(update(_associations).where(association).values(ended_at=now, released=int(released)))
            connection.execute(
                select(_cases.c.case_id).where(touched).order_by(_cases.c.series_instance_uid).with_for_update()
            )
            connection.execute(update(_cases).where(touched).values(next_check_at=now))

    def end_lost_associations(self, receiver: str | None = None) -> int:
        """Closes what a run of a receiver left open when it died, or all of them (None); returns how many."""
        lost = update(_associations).where(_associations.c.ended_at.is_(None))
        if receiver is not None:
            lost = lost.where(_associations.c.receiver == receiver)
        with self._writing() as connection:
            return connection.execute(lost.values(ended_at=self.now(), released=0)).rowcount

    def is_result(self, sop_instance_uid: str) -> bool:
        """Whether this node made that Instance."""
        with self._engine.connect() as connection:
            return connection.scalar(_MADE, {"uid": sop_instance_uid}) is not None

    def add_instances(self, batch: Sequence[NewInstance], *, quiet_time_s: float) -> list[bool]:
        """Notes Instances in one transaction; says of each whether it is new. A UID that is here already is not,
        nor is one of a result that this node made.

        The first Instance of a Series opens its case; one that comes when the case has moved on reopens it.
        """
        now = self.now()
        first_with: dict[str, NewInstance] = {}  # by UID: the batch, too, may hold one twice
        for instance in batch:
            first_with.setdefault(instance.sop_instance_uid, instance)
        rows = [
            {
                "sop_instance_uid": uid,
                "series_instance_uid": instance.series_instance_uid,
                "association_id": instance.association_id,
                "path": str(instance.path.relative_to(self.data_dir)),
                "num_bytes": instance.num_bytes,
                "checksum": instance.checksum,
                "headers": list(instance.headers),
            }
            for uid, instance in first_with.items()
        ]
        rows.sort(key=itemgetter("sop_instance_uid"))

        def arrivals(new: set[str]) -> list[dict[str, Any]]:
            made = [
                {
                    "series_instance_uid": instance.series_instance_uid,
                    "study_instance_uid": instance.headers[0]["study_instance_uid"],
                    "calling_ae_title": instance.calling_ae_title,
                    "attributes": instance.attributes,
                    "now": now,
                    "next_check_at": now + quiet_time_s,
                }
                for uid, instance in first_with.items()
                if uid in new
            ]
            return sorted(made, key=itemgetter("series_instance_uid"))

        new: set[str] = set()
        if self._turn is not None:
            with self._writing_to_sqlite(self._turn) as sqlite:
                for row in rows:
                    if not _MADE_SQLITE.execute(sqlite, {"uid": row["sop_instance_uid"]}):
                        new.update(uid for (uid,) in ADD_INSTANCE_SQLITE.execute(sqlite, row))
                for arrival in arrivals(new):
                    ADD_TO_CASE_SQLITE.execute(sqlite, arrival)
        elif rows:
            with self._writing() as connection:
                uid_of_result = _results.c.sop_instance_uid
                made = set(connection.scalars(select(uid_of_result).where(uid_of_result.in_(first_with))))
                if rows := [row for row in rows if row["sop_instance_uid"] not in made]:
                    new.update(connection.scalars(_ADD_INSTANCE, rows))
                if new:
                    connection.execute(_ADD_TO_CASE, arrivals(new))
        return [
            instance.sop_instance_uid in new and first_with[instance.sop_instance_uid] is instance for instance in batch
        ]

    def note_conflict(self, series_instance_uid: str, calling_ae_title: str) -> None:
        """Counts, for the Series of the one that is here, an Instance that was refused since it has the UID of that.

        Three columns of the case: who repeats it for ever leaves no more. The case has not changed by it.
        """
        case = update(_cases).where(_cases.c.series_instance_uid == series_instance_uid)
        values = {
            "num_conflicts": _cases.c.num_conflicts + 1,
            "last_conflict_at": self.now(),
            "last_conflict_from": calling_ae_title,
        }
        with self._writing() as connection:
            connection.execute(case.values(values))

    def paths_under(self, folder: Path) -> set[str]:
        """Files of stored Instances in a folder and all below it, relative to the data folder. Reads all rows."""
        below = _instances.c.path.startswith(f"{folder.relative_to(self.data_dir)}/", autoescape=True)
        with self._engine.connect() as connection:
            return set(connection.scalars(select(_instances.c.path).where(below)))

    def needed_files(self) -> list[StoredFile]:
        """Files of every Instance whose Series is still to be analysed."""
        return self._files(_stored().join(_cases).where(_cases.c.state.in_(_NEEDED)))

    def settled_paths(self) -> list[tuple[str, str, int | None]]:
        """Of all the others SeriesInstanceUID, path relative to the data folder, and size: there are many."""
        columns = select(_instances.c.series_instance_uid, _instances.c.path, _instances.c.num_bytes)
        with self._engine.connect() as connection:
            rows = connection.execute(columns.join_from(_instances, _cases).where(_cases.c.state.not_in(_NEEDED)))
            return [(series, path, num_bytes) for series, path, num_bytes in rows]

    def stored_files(self, series_instance_uid: str) -> list[StoredFile]:
        """Files of a Series."""
        return self._files(_stored().where(_instances.c.series_instance_uid == series_instance_uid))

    def stored_file(self, sop_instance_uid: str) -> StoredFile | None:
        """The file of an Instance, None if it is not here."""
        found = self._files(_stored().where(_instances.c.sop_instance_uid == sop_instance_uid))
        return found[0] if found else None

    def replace_instance(self, instance: NewInstance) -> bool:
        """Notes what is to take the place of a file that was lost, at the path that its row has.

        False if there is no row any more, or one of another Series.
        """
        same = _instances.c.series_instance_uid == instance.series_instance_uid
        row = update(_instances).where(_instances.c.sop_instance_uid == instance.sop_instance_uid, same)
        values = {
            "num_bytes": instance.num_bytes,
            "checksum": instance.checksum,
            "headers": list(instance.headers),
        }
        with self._writing() as connection:
            return bool(connection.execute(row.values(values)).rowcount)

    def _files(self, query: Select[Any]) -> list[StoredFile]:
        with self._engine.connect() as connection:
            return [
                StoredFile(
                    sop_instance_uid=uid, series_instance_uid=series, path=self.data_dir / path, num_bytes=num_bytes
                )
                for uid, series, path, num_bytes in connection.execute(query)
            ]

    def files_in_doubt(self, receiver: str | None = None) -> list[tuple[str, Path, int | None]]:
        """SOPInstanceUID, file and checksum of `needed_files` whose association is open: not all were acknowledged.

        receiver: only those of a run of a receiver.
        """
        columns = select(_instances.c.sop_instance_uid, _instances.c.path, _instances.c.checksum)
        rows = columns.join_from(_instances, _cases).where(_cases.c.state.in_(_NEEDED))
        rows = rows.join(_associations).where(_associations.c.ended_at.is_(None))
        if receiver is not None:
            rows = rows.where(_associations.c.receiver == receiver)
        with self._engine.connect() as connection:
            return [(uid, self.data_dir / path, checksum) for uid, path, checksum in connection.execute(rows)]

    def forget_instances(self, sop_instance_uids: Sequence[str]) -> dict[str, str]:
        """Removes Instances whose files are gone; their cases wait for them to be sent again. Reasons, by Series."""
        now, reasons = self.now(), dict[str, str]()
        lost: Counter[str] = Counter()  # by Series
        with self._writing() as connection:
            for begin in range(0, len(sop_instance_uids), CHUNK):
                gone = _instances.c.sop_instance_uid.in_(sop_instance_uids[begin : begin + CHUNK])
                deleted = _instances.delete().where(gone).returning(_instances.c.series_instance_uid)
                lost.update(connection.scalars(deleted))
            for uid, num_lost in sorted(lost.items()):
                were = "Instance was" if num_lost == 1 else "Instances were"
                reasons[uid] = reason = f"{num_lost} {were} lost from the disk; send the Series again"
                here = _instances.c.series_instance_uid == uid
                num = connection.scalar(select(func.count()).select_from(_instances).where(here))
                state = CaseState.RECEIVING if num else CaseState.REFUSED
                values = {"state": state, "reason": reason, "num_instances": num, "next_check_at": now}
                case = update(_cases).where(_cases.c.series_instance_uid == uid)
                connection.execute(case.values(**values, changed_at=now))
        return reasons


# Still to be analysed.
_NEEDED = (CaseState.RECEIVING, CaseState.QUEUED, CaseState.ANALYSING)


def _stored() -> Select[Any]:
    """The values of a `StoredFile`."""
    columns = _instances.c
    return select(columns.sop_instance_uid, columns.series_instance_uid, columns.path, columns.num_bytes)


_MADE = select(_results.c.case_id).where(_results.c.sop_instance_uid == bindparam("uid"))
_MADE_SQLITE = Prepared(_MADE, ["uid"])

_ADD_INSTANCE = insert(_instances).on_conflict_do_nothing().returning(_instances.c.sop_instance_uid)
ADD_INSTANCE_SQLITE = Prepared(_ADD_INSTANCE, [column.name for column in _instances.c])


# Its Series was taken as whole. Not `in_`, which executemany cannot do.
_was_begun = or_(
    *(
        _cases.c.state == state
        for state in (CaseState.QUEUED, CaseState.ANALYSING, CaseState.DELIVERING, CaseState.DONE)
    )
)


def _add_to_case() -> Insert:
    case = insert(_cases).values(
        series_instance_uid=bindparam("series_instance_uid"),
        study_instance_uid=bindparam("study_instance_uid"),
        calling_ae_title=bindparam("calling_ae_title"),
        attributes=bindparam("attributes"),
        num_instances=1,
        first_received_at=bindparam("now"),
        last_received_at=bindparam("now"),
        next_check_at=bindparam("next_check_at"),
        changed_at=bindparam("now"),
        state=CaseState.RECEIVING,
        reason="",
        attempts=0,
        summary="",
    )
    arrival = ("state", "reason", "attempts", "summary", "last_received_at", "next_check_at", "changed_at")
    return case.on_conflict_do_update(
        index_elements=["series_instance_uid"],
        set_={name: case.excluded[name] for name in arrival}
        | {
            "num_instances": sql_case((_cases.c.originals_purged_at.is_(None), _cases.c.num_instances + 1), else_=1),
            "originals_purged_at": None,
            "num_reopened": _cases.c.num_reopened + sql_case((_was_begun, 1), else_=0),
        },
    )


_ADD_TO_CASE = _add_to_case()
ADD_TO_CASE_SQLITE = Prepared(
    _ADD_TO_CASE,
    ("series_instance_uid", "study_instance_uid", "calling_ae_title", "attributes", "now", "next_check_at"),
)
