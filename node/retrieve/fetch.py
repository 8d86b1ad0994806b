"""Brings CT of a Study, or all of a patient's, from a peer into the node: C-FIND, then C-GET or C-MOVE to ourselves.

For `cspine fetch`, in its own process. C-GET writes by the same way as the receiver (`receive/store.py`), whether the
node runs or not; with C-MOVE the peer sends to the node, which must run and be known there.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
from sqlalchemy.exc import SQLAlchemyError

from model import PARSE_ERRORS
from node.peers import DicomPeer
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.receive.headers import Announced
from node.receive.sender import Sender
from node.receive.status import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, SUCCESS, RefusedError
from node.receive.store import Store
from node.send import SendError, associated, num_instances_told

_SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
_PENDING = (0xFF00, 0xFF01)
_MAX_ANSWERS = 1000


@dataclass(frozen=True, kw_only=True)
class FoundSeries:
    """A CT Series at the peer. num_instances: None when it does not tell."""

    study_instance_uid: str
    series_instance_uid: str
    study_date: str
    num_instances: int | None


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What became of one Series. problem: why not all of it came, "" when it did."""

    num_instances: int
    problem: str = ""


def find_series(peer: DicomPeer, keys: Mapping[str, str], *, calling_ae_title: str) -> list[FoundSeries]:
    """The CT Series of all Studies that match, the Studies as the peer lists them. keys: attributes of a Study.

    Raises:
        SendError: the peer cannot be reached, refuses, breaks off, or comes to no end.
    """
    model = StudyRootQueryRetrieveInformationModelFind
    with associated(peer, [(model, _SYNTAXES)], calling_ae_title=calling_ae_title) as association:
        wanted = {"StudyInstanceUID": "", "StudyDate": ""} | dict(keys)
        answers = _ask(association, peer, _identifier("STUDY", wanted))
        studies = [study for study in answers if _is_meant(study, keys)]  # who does not match a key lists all
        return [
            FoundSeries(
                study_instance_uid=str(study.StudyInstanceUID),
                series_instance_uid=str(series.SeriesInstanceUID),
                study_date=str(study.get("StudyDate") or ""),
                num_instances=num_instances_told(series),
            )
            for study in studies
            for series in _series_of(association, peer, str(study.StudyInstanceUID))
        ]


def _is_meant(study: Dataset, keys: Mapping[str, str]) -> bool:
    """Whether an answer names nothing else than what was asked for."""
    told = ((str(study.get(keyword) or value), value) for keyword, value in keys.items())
    return all(found.strip().casefold() == value.strip().casefold() for found, value in told)


def _series_of(association: Association, peer: DicomPeer, study_instance_uid: str) -> list[Dataset]:
    wanted = {
        "StudyInstanceUID": study_instance_uid,
        "SeriesInstanceUID": "",
        "Modality": "CT",
        "NumberOfSeriesRelatedInstances": "",
    }
    found = _ask(association, peer, _identifier("SERIES", wanted))
    return [series for series in found if series.get("Modality") == "CT"]  # who does not match it lists all


def _identifier(level: str, keys: Mapping[str, str]) -> Dataset:
    ds = Dataset()
    ds.SpecificCharacterSet, ds.QueryRetrieveLevel = "ISO_IR 192", level
    for keyword, value in keys.items():
        setattr(ds, keyword, value)
    return ds


def _ask(association: Association, peer: DicomPeer, query: Dataset) -> list[Dataset]:
    """The answers to a C-FIND that name what was asked about."""
    key = "StudyInstanceUID" if query.QueryRetrieveLevel == "STUDY" else "SeriesInstanceUID"
    found: list[Dataset] = []
    for status, answer in association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
        code = _code(status, peer, "query")
        if code not in (SUCCESS, *_PENDING):
            raise SendError(f"{peer.where} refused the query with {_said(status)}")
        if answer is not None and answer.get(key):
            found.append(answer)
        if len(found) > _MAX_ANSWERS:
            association.abort()
            raise SendError(f"{peer.where} finds more than {_MAX_ANSWERS}; ask for less")
    return found


def get_series(series: FoundSeries, peer: DicomPeer, store: Store, *, calling_ae_title: str) -> Fetched:
    """Brings a Series by C-GET into the store.

    Raises:
        SendError: the peer cannot be reached or does not do C-GET.
    """
    model = StudyRootQueryRetrieveInformationModelGet
    contexts = [(str(model), [str(syntax) for syntax in _SYNTAXES])]
    contexts += [(sop_class, [syntax]) for sop_class in CT_SOP_CLASSES for syntax in decodable_transfer_syntaxes()]
    receiving = _Receiving(store, peer)
    released = False
    try:
        with associated(
            peer,
            contexts,
            calling_ae_title=calling_ae_title,
            handlers=[(evt.EVT_C_STORE, receiving.on_c_store)],
            as_scp_of=CT_SOP_CLASSES,
        ) as association:
            if not any(context.abstract_syntax == model for context in association.accepted_contexts):
                raise SendError(f"{peer.where} does not answer C-GET; use --by move", permanent=True)
            problem = _outcome(_said_to(lambda: association.send_c_get(_names(series), model), peer, "C-GET"), peer)
            released = not problem
    finally:
        receiving.sender.end(released=released)
    refused = "; ".join(f"{num} refused here: {why}" for why, num in receiving.refused.items())
    return _judged(series, receiving.num_taken, "; ".join(filter(None, (problem, refused))))


def move_series(series: FoundSeries, peer: DicomPeer, *, calling_ae_title: str) -> Fetched:
    """Has the peer send a Series to the node by C-MOVE, which has to run and be known there as `calling_ae_title`.

    Raises:
        SendError: the peer cannot be reached or does not do C-MOVE.
    """
    model = StudyRootQueryRetrieveInformationModelMove
    with associated(peer, [(model, _SYNTAXES)], calling_ae_title=calling_ae_title) as association:
        last = _said_to(lambda: association.send_c_move(_names(series), calling_ae_title, model), peer, "C-MOVE")
    problem = _outcome(last, peer)
    counts = [last.get(f"NumberOf{what}Suboperations") for what in ("Completed", "Warning")]
    if not problem and None in counts:  # it does not count, though it has to (PS3.7 C.4.2)
        num_moved = series.num_instances or 1
    else:
        num_moved = sum(int(num or 0) for num in counts)
    if last.Status == 0xA801:
        problem += f"; enter {calling_ae_title}, its host and receive.port there, and have the node run"
    return _judged(series, num_moved, problem)


def _names(series: FoundSeries) -> Dataset:
    uids = {"StudyInstanceUID": series.study_instance_uid, "SeriesInstanceUID": series.series_instance_uid}
    return _identifier("SERIES", uids)


def _said_to(request: Callable[[], Iterator[tuple[Dataset, Dataset | None]]], peer: DicomPeer, what: str) -> Dataset:
    """The last status that answers a request.

    Raises:
        SendError: the association broke.
    """
    last = Dataset()
    try:
        for last, _ in request():
            _code(last, peer, what)
    except RuntimeError as error:  # it ended before it was asked
        raise SendError(f"{peer.where} ended the association before the {what}") from error
    return last


def _outcome(last: Dataset, peer: DicomPeer) -> str:
    """Why not everything was sent, by the last status; "" when it was."""
    num_failed = last.get("NumberOfFailedSuboperations") or 0
    if last.Status == SUCCESS and not num_failed:
        return ""
    return f"{peer.where} answered with {_said(last)}" + (f", {num_failed} not sent" if num_failed else "")


def _code(status: Dataset, peer: DicomPeer, what: str) -> int:
    if "Status" not in status:
        raise SendError(f"{peer.where} broke off the {what}, or was silent for {peer.timeout_s:g} s")
    return int(status.Status)


def _said(status: Dataset) -> str:
    comment = f" ({status.ErrorComment})" if status.get("ErrorComment") else ""
    return f"status 0x{status.Status:04X}{comment}"


def _judged(series: FoundSeries, num_taken: int, problem: str) -> Fetched:
    if not problem and series.num_instances is not None and num_taken < series.num_instances:
        problem = f"the peer said that it has {series.num_instances} Instances"
    if not problem and not num_taken:
        problem = "nothing came"
    return Fetched(num_instances=num_taken, problem=problem)


class _Receiving:
    """Takes the Instances of one C-GET; for the index they are an association of the peer."""

    def __init__(self, store: Store, peer: DicomPeer) -> None:
        self.sender = Sender(lambda: peer.ae_title, store.index, store.run)
        self.num_taken, self.refused = 0, Counter[str]()
        self._store = store

    def on_c_store(self, event: evt.Event) -> int:
        """Stores an Instance as the receiver does; the statuses are those of `receive/status.py`."""
        announced = Announced(
            sop_class_uid=str(event.request.AffectedSOPClassUID),
            sop_instance_uid=str(event.request.AffectedSOPInstanceUID),
            transfer_syntax_uid=str(event.context.transfer_syntax),
        )
        try:
            arriving = self._store.begin(announced, self.sender)
            arriving.write(event.request.DataSet.getbuffer())
            arriving.finish()
        except RefusedError as refusal:
            self.refused[str(refusal)] += 1
            return refusal.status
        except (OSError, SQLAlchemyError) as error:
            self.refused[f"cannot be stored now ({type(error).__name__})"] += 1
            return OUT_OF_RESOURCES
        except PARSE_ERRORS:
            self.refused["the dataset cannot be parsed"] += 1
            return CANNOT_UNDERSTAND
        self.num_taken += 1
        return SUCCESS
