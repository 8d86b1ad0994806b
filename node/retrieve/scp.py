"""C-FIND, C-GET and C-MOVE for what the node holds, in the receiver processes; `receive/lane.py` hands them on.

The catalog is opened with the first request. Off until `retrieve.enabled`: answers name patients.

Reference: PS3.4 C.4.
"""

import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from io import BytesIO
from typing import Any

import pynetdicom._config
from pydicom import Dataset, dcmread
from pydicom import uid as uids
from pydicom.uid import UID, ExplicitVRBigEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelGet,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)
from sqlalchemy.exc import SQLAlchemyError

from model import PARSE_ERRORS
from node.config import Config
from node.index import Index
from node.peers import DicomPeer
from node.process import describe_error
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.retrieve.identifier import TooManyError, answers, identified, parse_query, parse_retrieval
from node.send import proposed_contexts
from node.tls import TlsError, client_context
from node.transcode import UNCOMPRESSED, TranscodeError, transcoded_bytes
from node.web.attributes import completed
from node.web.catalog import Catalog, StoredInstance
from node.web.matching import QueryError

log = logging.getLogger(__name__)

_STUDY_ROOT, _PATIENT_ROOT = ("STUDY", "SERIES", "IMAGE"), ("PATIENT", "STUDY", "SERIES", "IMAGE")
LEVELS = {
    StudyRootQueryRetrieveInformationModelFind: _STUDY_ROOT,
    StudyRootQueryRetrieveInformationModelGet: _STUDY_ROOT,
    StudyRootQueryRetrieveInformationModelMove: _STUDY_ROOT,
    PatientRootQueryRetrieveInformationModelFind: _PATIENT_ROOT,
    PatientRootQueryRetrieveInformationModelGet: _PATIENT_ROOT,
    PatientRootQueryRetrieveInformationModelMove: _PATIENT_ROOT,
}
"""The information models that are answered, and the levels of each."""

LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")
"""Label Map Segmentation Storage, since 2024; pydicom's dictionary does not have it."""

RESULT_SOP_CLASSES = (
    uids.SegmentationStorage,
    LABEL_MAP_STORAGE,
    uids.ParametricMapStorage,
    uids.KeyObjectSelectionDocumentStorage,
    uids.SecondaryCaptureImageStorage,
    uids.EncapsulatedPDFStorage,
    uids.Comprehensive3DSRStorage,
    uids.ComprehensiveSRStorage,
)
"""What the node makes of CT: given out, never taken."""

_PENDING, _PENDING_PARTLY, _CANCELLED = 0xFF00, 0xFF01, 0xFE00
_OUT_OF_RESOURCES, _MISMATCH, _UNABLE = 0xA700, 0xA900, 0xC001

RETRIEVE_STATUSES = {
    0x0000: "done; of C-GET and C-MOVE: every Instance was taken, or none matches",
    _PENDING: "an answer follows; of C-GET and C-MOVE: how many are done",
    _PENDING_PARTLY: "C-FIND: an answer follows; a key that the node does not match was ignored",
    _CANCELLED: "C-CANCEL came",
    _OUT_OF_RESOURCES: "C-FIND: more than 10,000 match",
    0xA702: "no Instance was taken",
    0xA801: "C-MOVE: the destination is not one of `retrieve.peers`, or does not take the association",
    _MISMATCH: "the level is none of the model's, a unique key is missing or a pattern, or a range is none",
    0xB000: "some Instances were not taken; Failed SOP Instance UID List names them",
    _UNABLE: "the request cannot be parsed, or the database cannot be read now",
}


def offer(ae: AE) -> None:
    """Adds what is answered to what the receiver supports. CT is given out too, where the peer wants to be the SCP."""
    for model in LEVELS:
        ae.add_supported_context(model)
    syntaxes = decodable_transfer_syntaxes()
    for sop_class in (*CT_SOP_CLASSES, *RESULT_SOP_CLASSES):
        ae.add_supported_context(sop_class, syntaxes, scu_role=sop_class in CT_SOP_CLASSES, scp_role=True)


def withhold_results(event: evt.Event) -> None:
    """Before negotiation: result classes only for a peer that asks to be their SCP, or it would send us its own."""
    assoc = event.assoc
    wanted = {uid for uid, role in assoc.requestor.role_selection.items() if role.scp_role}
    assoc.acceptor.supported_contexts = [
        context
        for context in assoc.acceptor.supported_contexts
        if context.abstract_syntax not in RESULT_SOP_CLASSES or context.abstract_syntax in wanted
    ]


class RetrieveScp:
    """Answers the requests of one receiver process."""

    def __init__(self, config: Config, index: Index) -> None:
        self._ae_title, self._index = config.receive.ae_title, index
        self._peers = {peer.ae_title: peer for peer in config.retrieve.peers}
        self._catalog: Catalog | None = None
        self._lock = threading.Lock()
        # It would log identifiers, which name patients.
        pynetdicom._config.LOG_REQUEST_IDENTIFIERS = pynetdicom._config.LOG_RESPONSE_IDENTIFIERS = False

    @property
    def handlers(self) -> list[tuple[Any, Callable[[evt.Event], Any]]]:
        """What is bound to the events of the server."""
        return [
            (evt.EVT_REQUESTED, withhold_results),
            (evt.EVT_C_FIND, self.on_c_find),
            (evt.EVT_C_GET, self.on_c_get),
            (evt.EVT_C_MOVE, self.on_c_move),
        ]

    def close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()

    def on_c_find(self, event: evt.Event) -> Iterator[tuple[int | Dataset, Dataset | None]]:
        """Yields a status and an answer each; the statuses are `RETRIEVE_STATUSES`."""
        num_found = 0
        try:
            query = parse_query(event.identifier, LEVELS[event.request.AffectedSOPClassUID])
            for answer in answers(self._fresh_catalog(), query, self._ae_title):
                if event.is_cancelled:
                    yield _CANCELLED, None
                    return
                num_found += 1
                yield (_PENDING if query.is_whole else _PENDING_PARTLY), answer
        except _FAILURES as error:
            yield _failed(event, error), None
            return
        log.info("action=queried calling=%r level=%s answers=%d", _calling(event), query.name, num_found)

    def on_c_get(self, event: evt.Event) -> Iterator[Any]:
        """Yields how many Instances go, then a status and an Instance each."""
        try:
            found = self._find(event)
        except _FAILURES as error:
            yield 1
            yield _failed(event, error), None
            return
        yield len(found)
        accepted = {_kind(context) for context in event.assoc.accepted_contexts if context.as_scu}
        # dcmtk writes an answer in two pieces, the second of which waits 40 ms for a delayed acknowledgement.
        event.assoc.dul.acknowledges_at_once = True
        yield from _instances(event, found, lambda: accepted)
        log.info("action=retrieved calling=%r by=C-GET instances=%d", _calling(event), len(found))

    def on_c_move(self, event: evt.Event) -> Iterator[Any]:
        """Yields the destination, how many Instances go, then a status and an Instance each."""
        peer = self._peers.get(str(event.move_destination).strip())
        if peer is None:
            log.warning(
                "action=move-refused calling=%r destination=%r: it is not among retrieve.peers",
                _calling(event),
                event.move_destination,
            )
            yield None, None
            return
        found: list[StoredInstance] = []
        failure: Dataset | None = None
        try:
            found = self._find(event)
        except _FAILURES as error:
            failure = _failed(event, error)
        opened: list[Association] = []
        try:
            address = _address(peer, found, opened)
        except (TlsError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            log.error("action=move-failed destination=%r: %s: %s", peer.ae_title, peer.where, why)
            yield None, None
            return
        yield address
        if failure is not None:  # pynetdicom takes a status only now
            yield 1
            yield failure, None
            return
        try:
            yield len(found)
        except GeneratorExit:  # pynetdicom goes no further without an association, and says so to nobody else
            if found and not any(association.is_established for association in opened):
                log.error(
                    "action=move-failed destination=%r: %s takes no association; check its host, port and AE title in "
                    "retrieve.peers, that it runs, and that %s may store there",
                    peer.ae_title,
                    peer.where,
                    self._ae_title,
                )
            raise
        yield from _instances(event, found, lambda: {_kind(context) for context in opened[0].accepted_contexts})
        log.info(
            "action=retrieved calling=%r by=C-MOVE destination=%r instances=%d",
            _calling(event),
            peer.ae_title,
            len(found),
        )

    def _find(self, event: evt.Event) -> list[StoredInstance]:
        conditions = parse_retrieval(event.identifier, LEVELS[event.request.AffectedSOPClassUID])
        return self._fresh_catalog().matching_files(conditions)

    def _fresh_catalog(self) -> Catalog:
        with self._lock:
            if self._catalog is None:
                self._catalog = Catalog(self._index)
        self._catalog.refresh()
        return self._catalog


_FAILURES = (QueryError, TooManyError, SQLAlchemyError, OSError, *PARSE_ERRORS)
"""What can go wrong before there is an answer: with the request, or with the database."""


def _failed(event: evt.Event, error: Exception) -> Dataset:
    """The status of a request that is not answered, with a comment for the peer."""
    if isinstance(error, TooManyError):
        code, comment = _OUT_OF_RESOURCES, str(error)
    elif isinstance(error, QueryError):
        code, comment = _MISMATCH, str(error)
    else:
        code, comment = _UNABLE, "the request or the database cannot be read"
    said = describe_error(error) if code == _UNABLE else RETRIEVE_STATUSES[code]  # the comment may quote a birth date
    log.warning("action=query-failed calling=%r status=0x%04X: %s", _calling(event), code, said)
    status = Dataset()
    status.Status = code
    status.ErrorComment = comment.encode("ascii", "replace").decode()[:64]
    return status


def _calling(event: evt.Event) -> str:
    return str(event.assoc.requestor.ae_title)


def _kind(context: Any) -> tuple[str, str]:
    return str(context.abstract_syntax), str(context.transfer_syntax[0])


def _address(peer: DicomPeer, found: list[StoredInstance], opened: list[Association]) -> tuple[Any, ...]:
    """Host, port and the rest of what pynetdicom needs to call a peer. The association is put into `opened`.

    Raises:
        TlsError: the files of the peer's `tls` cannot be used.
        OSError: there is no such host, for which pynetdicom has a status that says something else.
    """
    socket.getaddrinfo(peer.host, peer.port)

    def on_open(event: evt.Event) -> None:
        opened.append(event.assoc)
        # Else they would be those of the receiver.
        event.assoc.acse_timeout = event.assoc.dimse_timeout = event.assoc.network_timeout = peer.timeout_s
        # Without it every Instance waits about 45 ms for a delayed acknowledgement.
        event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    kinds = [(instance.sop_class_uid, instance.transfer_syntax_uid) for instance in found]
    contexts = [build_context(*context) for context in proposed_contexts(kinds)] or [build_context(Verification)]
    tls = None if peer.tls is None else (client_context(peer.tls), peer.tls.server_name or peer.host)
    values = {
        "ae_title": peer.ae_title,
        "contexts": contexts,
        "tls_args": tls,
        "evt_handlers": [(evt.EVT_CONN_OPEN, on_open)],
    }
    return peer.host, peer.port, values


def _instances(
    event: evt.Event, found: list[StoredInstance], accepted: Callable[[], Collection[tuple[str, str]]]
) -> Iterator[tuple[int, Dataset | None]]:
    """A status and an Instance each, in a form that was accepted."""
    for instance in found:
        if event.is_cancelled:
            yield _CANCELLED, None
            return
        yield _PENDING, _read(instance, accepted())


def _read(instance: StoredInstance, accepted: Collection[tuple[str, str]]) -> Dataset:
    """The Instance; one that cannot be given only names itself, which pynetdicom counts as failed."""
    sop_class, syntax = instance.sop_class_uid, instance.transfer_syntax_uid
    instead = next((other for other in UNCOMPRESSED if (sop_class, other) in accepted), None)
    problem = "the peer takes it in no transfer syntax that it can be written in"
    try:
        if (sop_class, syntax) in accepted:
            return completed(dcmread(instance.path))
        if instead is not None and syntax != ExplicitVRBigEndian:
            return completed(dcmread(BytesIO(transcoded_bytes(instance.path, instead))))
    except TranscodeError as error:
        problem = str(error)
    except (OSError, *PARSE_ERRORS) as error:  # it has just gone
        problem = describe_error(error)
    log.warning("action=instance-not-given instance=%s: %s", instance.sop_instance_uid, problem)
    return identified(instance.sop_instance_uid)
