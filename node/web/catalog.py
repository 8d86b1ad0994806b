"""What the node holds, as DICOMweb and C-FIND ask for it: studies, series and instances with the attributes of each.

A cache in an SQLite file of its own beside the Instances, made from their headers, rebuilt when it is not there. The
node's database says which Instances and results there are and names no patient; this file does, as the Instances do.
The process of `server.py` and those of the receiver keep it, one at a time.

Reference: PS3.18 10.6.1.2 (matching), tables 10.6.3-3 to 10.6.3-5 (what is returned).
"""

import fcntl
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.valuerep import PersonName
from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.exc import OperationalError

from model import PARSE_ERRORS
from node.case import Case
from node.index import Index
from node.person_name import shortest_name
from node.web.attributes import attribute_json, completed
from node.web.levels import IN_REQUEST, Level
from node.web.matching import TIMES, Condition, QueryError

_VERSION = 8  # of the tables below; a file of another version is made anew


_metadata = MetaData()


def _table(name: str, level: Level, *columns: Column[Any]) -> Table:
    """A row for each of a level: its attributes as text to match, and as DICOM JSON to return."""
    matched = (
        Column(keyword, String, primary_key=keyword == level.uid_keyword, index=True) for keyword in level.keywords
    )
    return Table(name, _metadata, *matched, Column("attributes", JSON, nullable=False), *columns)


_studies = _table("studies", Level.STUDY)
_series = _table("series", Level.SERIES, Column("StudyInstanceUID", String, nullable=False, index=True))
_instances = _table(
    "instances",
    Level.INSTANCE,
    Column("SeriesInstanceUID", String, nullable=False, index=True),
    Column("case_series", String, nullable=False, index=True),  # the Series of the case it belongs to
    Column("path", String, nullable=False),
    Column("transfer_syntax", String, nullable=False),
    Column("order", Integer, nullable=False),
)
_cases = Table(
    "cases",
    _metadata,
    Column("case_series", String, primary_key=True),
    Column("changed_at", Float, nullable=False),  # the case as it was taken in
    Column("num_instances", Integer, nullable=False),
    Column("originals_purged_at", Float),  # a purge changes nothing else
    Column("results_purged_at", Float),
)
_STATE = ("changed_at", "num_instances", "originals_purged_at", "results_purged_at")
_TABLES = {Level.STUDY: _studies, Level.SERIES: _series, Level.INSTANCE: _instances}
_READ_TAGS = [Tag(keyword) for level in Level for keyword in (*level.keywords, *level.only_returned)]
_READ_TAGS.append(Tag("SpecificCharacterSet"))
_SEPARATORS = {"DA": (".", ""), "TM": (":", "")}
_PATHS = {keyword: f'$."{Tag(keyword.rpartition(".")[2]):08X}".Value[0]' for keyword in IN_REQUEST}

# What an Instance of a Series has for itself: keyword, tag, VR, and what the index calls it.
_OWN = tuple(
    (keyword, f"{Tag(keyword):08X}", vr, of_index)
    for keyword, vr, of_index in (
        ("SOPClassUID", "UI", "sop_class_uid"),
        ("SOPInstanceUID", "UI", "sop_instance_uid"),
        ("InstanceNumber", "IS", "instance_number"),
        ("Rows", "US", "rows"),
        ("Columns", "US", "columns"),
    )
)


@dataclass(frozen=True, kw_only=True)
class StoredInstance:
    """An Instance and its file. case_series: the received Series that it is of, or was made from."""

    case_series: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    num_frames: int
    path: Path


class Catalog:
    """Answers queries. Safe to use from several threads and processes."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._seen: tuple[Any, ...] = ()
        with self._alone():
            self._engine = _open(index.data_dir / "catalog.sqlite")

    def close(self) -> None:
        self._engine.dispose()

    def refresh(self) -> None:
        """Takes in what has come, been made, or gone since the last call."""
        with self._lock:
            if self._index.fingerprint() == self._seen:
                return
            with self._alone():
                seen = self._index.fingerprint()
                cases = {case.series_instance_uid: case for case in self._index.cases()}
                with self._engine.connect() as connection:
                    known = {row.case_series: row for row in connection.execute(select(_cases))}
                num_gone = 0
                for uid in known.keys() - cases.keys():
                    num_gone += self._replace(uid, {}, None)
                for uid, case in cases.items():
                    row = known.get(uid)
                    if row is None or any(getattr(row, name) != getattr(case, name) for name in _STATE):
                        num_gone += self._replace(uid, self._files_of(case), case)
                if num_gone:  # names of patients are not to stay in the write-ahead log
                    with self._engine.connect() as connection:
                        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                self._seen = seen

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process writes: what one lists before another has written would undo that."""
        with (self._index.data_dir / "catalog.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _files_of(self, case: Case) -> dict[str, list[dict[str, Any]]]:
        """Files of a case with the headers that the index keeps of received ones."""
        files = {str(path): headers for path, headers in self._index.instance_headers(case.series_instance_uid).items()}
        results = case.valid_result_dir
        if results is not None and case.results_purged_at is None:
            files |= {str(path): [] for path in results.glob("*.dcm")}
        return files

    def _replace(self, case_series: str, here: dict[str, list[dict[str, Any]]], case: Case | None) -> int:
        """Makes the rows of a case those of its files; how many went. case: as it is now; None when it has gone."""
        with self._engine.connect() as connection:
            of_case = select(_instances.c.path).where(_instances.c.case_series == case_series)
            known = set(connection.scalars(of_case))
        first: _Read | None = None  # of the received ones: it stands for the others
        read = []
        for path in sorted(here.keys() - known):
            header = here[path][0] if len(here[path]) == 1 else None
            if header is not None and first is not None:
                found = first.like(header, path)
            else:
                found = _read(path)
                first = first or (found if header is not None else None)
            if found is not None:
                read.append(found)
        gone = sorted(known - here.keys())
        with self._engine.begin() as connection:
            connection.execute(delete(_cases).where(_cases.c.case_series == case_series))
            if case is not None:
                state = {name: getattr(case, name) for name in _STATE}
                connection.execute(insert(_cases).values(case_series=case_series, **state))
            for start in range(0, len(gone), 500):
                connection.execute(delete(_instances).where(_instances.c.path.in_(gone[start : start + 500])))
            _note(connection, read, case_series)
            if gone:
                _drop_empty(connection)
        return len(gone)

    def find(self, level: Level, conditions: Sequence[Condition], *, limit: int, offset: int) -> list[dict[str, Any]]:
        """DICOM JSON of what matches, in a stable order, without URLs."""
        with _asking(self._engine) as connection:
            rows = connection.execute(self._matching(level, conditions).limit(limit).offset(offset)).mappings().all()
            answers = [_merged(row) for row in rows]
            _count(connection, level, answers)
        return answers

    def num_matches(self, level: Level, conditions: Sequence[Condition]) -> int:
        """How many there are of what `find` finds."""
        matching = self._matching(level, conditions).order_by(None).subquery()
        with _asking(self._engine) as connection:
            return connection.execute(select(func.count()).select_from(matching)).scalar_one()

    def _matching(self, level: Level, conditions: Sequence[Condition]) -> Select[Any]:
        table = _TABLES[level]
        joined = _instances.join(_series, _instances.c.SeriesInstanceUID == _series.c.SeriesInstanceUID).join(
            _studies, _series.c.StudyInstanceUID == _studies.c.StudyInstanceUID
        )
        wanted = _where(conditions)
        columns = [_studies.c.attributes.label("study")]
        if level is not Level.STUDY:
            columns.append(_series.c.attributes.label("series"))
        if level is Level.INSTANCE:
            columns.append(_instances.c.attributes.label("instance"))
            source: Any = joined
            order: list[Any] = [_series.c.SeriesInstanceUID, _instances.c.order, _instances.c.SOPInstanceUID]
        else:
            source = _series.join(_studies, _series.c.StudyInstanceUID == _studies.c.StudyInstanceUID)
            order = [_studies.c.StudyDate.desc(), _studies.c.StudyInstanceUID]
            if level is Level.SERIES:
                order += [func.length(_series.c.SeriesNumber), _series.c.SeriesNumber, _series.c.SeriesInstanceUID]
            if any(condition.keyword in Level.INSTANCE.keywords for condition in conditions):
                source = joined
        query = select(*columns).select_from(source).where(*wanted).order_by(*order)
        if level is not Level.INSTANCE:
            query = query.group_by(table.c[level.uid_keyword])
        return query

    def files(
        self,
        study_instance_uid: str,
        series_instance_uid: str | None = None,
        sop_instance_uid: str | None = None,
        *,
        limit: int | None = None,
    ) -> list[StoredInstance]:
        """Instances in the order of their numbers, none if there is no such thing."""
        uids = (study_instance_uid, series_instance_uid, sop_instance_uid)
        return self.matching_files(
            [Condition(level.uid_keyword, uid) for level, uid in zip(Level, uids, strict=True) if uid is not None],
            limit=limit,
        )

    def matching_files(self, conditions: Sequence[Condition], *, limit: int | None = None) -> list[StoredInstance]:
        """Instances that match, by Series and in the order of their numbers."""
        columns = [column for column in _instances.c if column is not _instances.c.attributes]
        query = (
            select(*columns, _series.c.StudyInstanceUID)
            .join(_series, _instances.c.SeriesInstanceUID == _series.c.SeriesInstanceUID)
            .join(_studies, _series.c.StudyInstanceUID == _studies.c.StudyInstanceUID)
            .where(*_where(conditions))
            .order_by(_series.c.SeriesInstanceUID, _instances.c.order, _instances.c.SOPInstanceUID)
            .limit(limit)
        )
        with _asking(self._engine) as connection:
            return [
                StoredInstance(
                    case_series=row["case_series"],
                    study_instance_uid=row["StudyInstanceUID"],
                    series_instance_uid=row["SeriesInstanceUID"],
                    sop_instance_uid=row["SOPInstanceUID"],
                    sop_class_uid=row["SOPClassUID"],
                    transfer_syntax_uid=row["transfer_syntax"],
                    num_frames=max(1, _whole(row["NumberOfFrames"])),
                    path=Path(row["path"]),
                )
                for row in connection.execute(query).mappings()
            ]


@contextmanager
def _asking(engine: Engine) -> Iterator[Connection]:
    """A connection for a query from outside.

    Raises:
        QueryError: SQLite cannot take what it asks for: a thousand patterns at a time, or one of 50,000 characters.
    """
    try:
        with engine.connect() as connection:
            yield connection
    except OperationalError as error:
        if any(limit in str(error.orig) for limit in ("too large", "too complex", "too many")):
            raise QueryError("more values, or a longer one, than can be matched at a time; ask for less") from error
        raise


def _open(path: Path) -> Engine:
    """The file, made anew if it is of another version; losing it costs only the time to make it again."""
    path.touch(mode=0o640)  # before SQLite does: its files beside this one get the same mode
    path.chmod(0o640)
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA secure_delete=ON")

    with engine.begin() as connection:
        if connection.exec_driver_sql("PRAGMA user_version").scalar_one() != _VERSION:
            _metadata.drop_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={_VERSION}")
        _metadata.create_all(connection)
    return engine


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The rows of one Instance: attributes as text and as DICOM JSON, by level."""

    texts: dict[Level, dict[str, str]]
    attributes: dict[Level, dict[str, Any]]
    path: str
    transfer_syntax: str

    def like(self, header: dict[str, Any], path: str) -> "_Read | None":
        """The rows of another single-frame Instance of the Series, from what the index keeps of it.

        What it does not keep, such as the bits of a pixel, is the same in all slices of a CT.
        """
        own = {keyword: header[of_index] for keyword, _, _, of_index in _OWN}
        texts = {keyword: "" if value is None else str(value) for keyword, value in own.items()}
        attributes = {
            tag: {"vr": vr} if own[keyword] is None else {"vr": vr, "Value": [own[keyword]]}
            for keyword, tag, vr, _ in _OWN
        }
        try:
            with FileIO(path) as file:
                syntax = _transfer_syntax_of(file.read(1024))
        except OSError:  # it has just gone
            return None
        return _Read(
            texts=self.texts | {Level.INSTANCE: self.texts[Level.INSTANCE] | texts},
            attributes=self.attributes | {Level.INSTANCE: self.attributes[Level.INSTANCE] | attributes},
            path=path,
            transfer_syntax=syntax,
        )


def _transfer_syntax_of(meta: bytes) -> str:
    """The transfer syntax that File Meta Information names (PS3.10 7.1)."""
    at = meta.find(b"\x02\x00\x10\x00UI")
    length = int.from_bytes(meta[at + 6 : at + 8], "little")
    return meta[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("ascii", "replace") if at > 0 else ""


def _read(path: str) -> _Read | None:
    """The rows of a file; None when it has just gone or is no DICOM."""
    try:
        ds = completed(dcmread(path, stop_before_pixels=True, specific_tags=_READ_TAGS))
        return _Read(
            texts={level: {keyword: _text(ds, keyword) for keyword in level.keywords} for level in Level},
            attributes={level: _json(ds, level.keywords + level.only_returned) for level in Level},
            path=path,
            transfer_syntax=str(ds.file_meta.get("TransferSyntaxUID", "")),
        )
    except (OSError, *PARSE_ERRORS):
        return None


def _note(connection: Connection, read: Sequence[_Read], case_series: str) -> None:
    """Writes the rows of Instances; their Series and Study are those of the first that names them."""
    if not read:
        return
    for level in Level:
        rows: dict[str, dict[str, Any]] = {}
        for one in read:
            row: dict[str, Any] = one.texts[level] | {"attributes": one.attributes[level]}
            if level is Level.SERIES:
                row["StudyInstanceUID"] = one.texts[Level.STUDY]["StudyInstanceUID"]
            elif level is Level.INSTANCE:
                row["SeriesInstanceUID"] = one.texts[Level.SERIES]["SeriesInstanceUID"]
                row["case_series"], row["path"], row["transfer_syntax"] = case_series, one.path, one.transfer_syntax
                row["order"] = _whole(one.texts[level]["InstanceNumber"])
            rows.setdefault(row[level.uid_keyword], row)
        connection.execute(insert(_TABLES[level]).prefix_with("OR IGNORE"), list(rows.values()))


def _drop_empty(connection: Connection) -> None:
    connection.execute(
        delete(_series).where(_series.c.SeriesInstanceUID.not_in(select(_instances.c.SeriesInstanceUID)))
    )
    connection.execute(delete(_studies).where(_studies.c.StudyInstanceUID.not_in(select(_series.c.StudyInstanceUID))))


def _where(conditions: Sequence[Condition]) -> list[ColumnElement[bool]]:
    """SQL of conditions, all of which must hold."""
    of_requests = [condition for condition in conditions if condition.keyword in IN_REQUEST]
    wanted = [_holds(condition) for condition in conditions if condition not in of_requests]
    if of_requests:  # of one and the same item (PS3.4 C.2.2.2.6)
        item = func.json_each(_series.c.attributes, '$."00400275".Value').table_valued("value")
        values = {keyword: func.json_extract(item.c.value, path) for keyword, path in _PATHS.items()}
        held = (condition.of(func.coalesce(values[condition.keyword], "")) for condition in of_requests)
        wanted.append(select(literal(1)).select_from(item).where(*held).correlate(_series).exists())
    return wanted


def _holds(condition: Condition) -> ColumnElement[bool]:
    if condition.keyword == "ModalitiesInStudy":
        modality = condition.of(_series.c.Modality)
        return _studies.c.StudyInstanceUID.in_(select(_series.c.StudyInstanceUID).where(modality))
    for level, table in _TABLES.items():
        if condition.keyword in level.keywords:
            column = table.c[condition.keyword]
            return condition.of(column.concat(table.c[TIMES[column.name]]) if condition.is_moment else column)
    raise KeyError(condition.keyword)


def _merged(row: Any) -> dict[str, Any]:
    """DICOM JSON of one match: the attributes of its level and of those above. All that is here is on a disk here."""
    answer: dict[str, Any] = {"00080056": {"vr": "CS", "Value": ["ONLINE"]}}
    for attributes in row.values():
        answer |= attributes
    return answer


def _count(connection: Connection, level: Level, answers: list[dict[str, Any]]) -> None:
    """Adds to Studies and Series what is counted."""
    if level is Level.INSTANCE or not answers:
        return
    tag, uid = (
        ("0020000D", _series.c.StudyInstanceUID) if level is Level.STUDY else ("0020000E", _series.c.SeriesInstanceUID)
    )
    wanted = [answer[tag]["Value"][0] for answer in answers]
    counted = (
        select(uid, _series.c.Modality, func.count(_series.c.SeriesInstanceUID.distinct()), func.count())
        .join(_instances, _instances.c.SeriesInstanceUID == _series.c.SeriesInstanceUID)
        .where(uid.in_(wanted))
        .group_by(uid, _series.c.Modality)
    )
    found: dict[str, list[tuple[str, int, int]]] = {}
    for key, modality, num_series, num_instances in connection.execute(counted):
        found.setdefault(key, []).append((modality, num_series, num_instances))
    for answer in answers:
        rows = found.get(answer[tag]["Value"][0], [])
        num_instances = {"vr": "IS", "Value": [sum(row[2] for row in rows)]}
        if level is Level.SERIES:
            answer["00201209"] = num_instances
            continue
        answer["00080061"] = {"vr": "CS", "Value": sorted(row[0] for row in rows if row[0])}
        answer["00201206"] = {"vr": "IS", "Value": [sum(row[1] for row in rows)]}
        answer["00201208"] = num_instances


def _json(ds: Dataset, keywords: Iterable[str]) -> dict[str, Any]:
    """DICOM JSON (PS3.18 F) of those of these attributes that it has."""
    return {f"{Tag(keyword):08X}": attribute_json(ds, Tag(keyword)) for keyword in keywords if keyword in ds}


def _text(ds: Dataset, keyword: str) -> str:
    """A value as it is matched: several are joined as in DICOM, names and numbers are as short as they can be.

    Dates and times lose the separators that were written into them before 1993 (PS3.5 table 6.2-1).
    """
    try:
        value = ds.get(keyword)
    except PARSE_ERRORS:
        return ""
    if value is None:
        return ""
    if isinstance(value, PersonName):
        return shortest_name(str(value).strip())
    if isinstance(value, MultiValue):
        return "\\".join(map(str, value))
    text = str(int(value) if isinstance(value, int) else value).strip()  # an IS is written as it came
    return text.replace(*_SEPARATORS[vr]) if (vr := dictionary_VR(keyword)) in _SEPARATORS else text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return 0
