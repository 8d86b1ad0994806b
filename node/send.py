"""Associations as an SCU, and DICOM files sent over them by C-STORE: for deliveries, `cspine send` and the demo.

Files go out as they are, in their own transfer syntax, without being decoded; only to a peer that does not take that
one they go out uncompressed.
"""

import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pynetdicom._config
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ExplicitVRBigEndian, generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, Verification
from pynetdicom.status import code_to_category

from model import PARSE_ERRORS
from node.implementation import make_ae
from node.peers import DicomPeer
from node.reactor import use_checkpoint
from node.status import Outcome, meaning_of
from node.tls import TlsError, client_context, last_error
from node.transcode import UNCOMPRESSED, TranscodeError, transcoded

_MAX_CONTEXTS = 128  # PS3.8 9.3.2.2: odd numbers of one byte


class SendError(Exception):
    """The peer cannot be spoken to; the message says why. permanent: trying again would not help."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class _UnreadableError(Exception):
    """A file cannot be read, or does not say what it is; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the peer said to a file. reason: why it did not take it, or what it remarked when it did."""

    path: Path
    taken: bool
    reason: str = ""
    permanent: bool = False


def send_files(
    paths: Sequence[Path],
    peer: DicomPeer,
    *,
    calling_ae_title: str,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Sends files over one association; returns the answers for those that were refused.

    on_answer is called for each as soon as it is answered, so it also knows of those before a broken association.

    A file that cannot be read, or does not say what it is, counts as refused.

    Raises:
        SendError: there is no association, or it breaks.
    """
    kinds, refused = {}, []
    for path in paths:
        try:
            kinds[path] = _kind(path)
        except _UnreadableError as error:
            refused.append(Answer(path=path, taken=False, reason=str(error)))
            on_answer(refused[-1])
    if not kinds:
        return refused
    # The file's bytes go out in pieces as they are; pynetdicom has only this module-wide switch for it.
    pynetdicom._config.STORE_SEND_CHUNKED_DATASET = True
    with associated(peer, proposed_contexts(kinds.values()), calling_ae_title=calling_ae_title) as association:
        accepted = {(str(c.abstract_syntax), str(c.transfer_syntax[0])) for c in association.accepted_contexts}
        for path, (sop_class, syntax) in kinds.items():
            answer = _send_as_accepted(association, path, sop_class, syntax, accepted, peer)
            if not answer.taken:
                refused.append(answer)
            on_answer(answer)
    return refused


def proposed_contexts(kinds: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """What is proposed: each SOP Class in the transfer syntax its files are in, and uncompressed instead of that."""
    wanted = sorted(set(kinds))
    proposed = [(sop_class, [syntax]) for sop_class, syntax in wanted]
    for sop_class in dict.fromkeys(sop_class for sop_class, _ in wanted):
        own = {syntax for other, syntax in wanted if other == sop_class}
        if own - {str(ExplicitVRBigEndian)}:
            proposed.append((sop_class, [syntax for syntax in UNCOMPRESSED if own != {syntax}]))
    return proposed[:_MAX_CONTEXTS]


def _send_as_accepted(
    association: Association,
    path: Path,
    sop_class: str,
    syntax: str,
    accepted: set[tuple[str, str]],
    peer: DicomPeer,
) -> Answer:
    """Sends one file as it is, or in a transfer syntax that the peer takes instead."""
    if (sop_class, syntax) in accepted:
        return _send(association, path, path.name, peer)
    instead = next((other for other in UNCOMPRESSED if (sop_class, other) in accepted), None)
    if instead is None or syntax == ExplicitVRBigEndian:
        what = f"{UID(sop_class).name} as {UID(syntax).name}"
        return Answer(
            path=path, taken=False, reason=f"{peer.where} does not take {what}; allow it there", permanent=True
        )
    try:
        with transcoded(path, instead) as rewritten:
            return replace(_send(association, rewritten, path.name, peer), path=path)
    except TranscodeError as error:
        reason = f"{peer.where} does not take {path.name} as it is, and {error}"
        return Answer(path=path, taken=False, reason=reason, permanent=True)


def _send(association: Association, path: Path, name: str, peer: DicomPeer) -> Answer:
    """Sends one file.

    Raises:
        SendError: the association broke.
    """
    try:
        status = association.send_c_store(path)
    except RuntimeError as error:  # the association ended since the last file
        raise SendError(f"{peer.where} ended the association before {name} was sent") from error
    if "Status" not in status:
        raise SendError(f"{peer.where} broke the connection while {name} was sent")
    comment = f"; it says: {status.ErrorComment}" if status.get("ErrorComment") else ""
    return answer_of(path, name, peer.where, status.Status, comment)


def answer_of(path: Path, name: str, where: str, status: int, comment: str = "") -> Answer:
    """What a status of C-STORE or STOW-RS says of a file. name, where: of file and peer, as messages call them."""
    found = meaning_of(status)
    if found.outcome is Outcome.TAKEN:
        return Answer(path=path, taken=True)
    said = f"status 0x{status:04X} ({found.meaning}{comment})"
    if found.outcome is Outcome.REMARKED:
        return Answer(path=path, taken=True, reason=f"{where} took {name} with {said}")
    permanent = found.outcome is Outcome.NEVER
    return Answer(path=path, taken=False, reason=f"{where} refused {name} with {said}", permanent=permanent)


@contextmanager
def associated(
    peer: DicomPeer,
    contexts: Sequence[tuple[str, Sequence[str]]],
    *,
    calling_ae_title: str,
    handlers: Sequence[tuple[Any, Callable[[evt.Event], Any]]] = (),
    as_scp_of: Collection[str] = (),
) -> Iterator[Association]:
    """An association with the peer, released at the end. contexts: SOP Class and transfer syntaxes of each.

    as_scp_of: SOP Classes of which it is proposed that we are the SCP, and the peer the SCU (PS3.7 D.3.3.4).

    Raises:
        SendError: there is none; permanent when the peer rejects it for good (PS3.8 9.3.4). Or it ended too early.
    """
    ae = make_ae(calling_ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = peer.timeout_s
    ae.maximum_pdu_size = 0
    for sop_class, transfer_syntaxes in contexts:
        ae.add_requested_context(sop_class, list(transfer_syntaxes))
    roles = [build_role(sop_class, scp_role=True) for sop_class in as_scp_of]
    association = _associate(ae, peer, handlers, roles)
    try:
        yield association
    except RuntimeError as error:
        if association.is_established:
            raise
        # pynetdicom's, of a question after the end.
        raise SendError(f"{peer.where} ended the association before it was asked everything") from error
    finally:
        association.release()


def num_instances_told(series: Dataset) -> int | None:
    """NumberOfSeriesRelatedInstances of an answer to C-FIND; None when it does not tell."""
    try:
        return int(series.NumberOfSeriesRelatedInstances)
    except (AttributeError, TypeError, ValueError):
        return None


def find_dicom_files(folder: Path) -> tuple[list[Path], int]:
    """The DICOM files under a folder, sorted, and the number of other files there. A DICOMDIR is neither.

    A file that cannot be opened is among the former: it may be one, and whoever reads it says why it cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "DICOMDIR")
    found = [path for path in files if _is_dicom(path)]
    return found, len(files) - len(found)


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return True


def _kind(path: Path) -> tuple[str, str]:
    """SOP Class UID and Transfer Syntax UID of a file, from its File Meta Information.

    Raises:
        _UnreadableError: there is none, or it cannot be read.
    """
    try:
        meta = dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    except (InvalidDicomError, *PARSE_ERRORS) as error:
        raise _UnreadableError(f"{path} is no DICOM file, or a damaged one") from error
    kind = str(meta.get("MediaStorageSOPClassUID", "")), str(meta.get("TransferSyntaxUID", ""))
    if not all((*kind, meta.get("MediaStorageSOPInstanceUID"))):
        raise _UnreadableError(
            f"{path} lacks SOP Class, SOP Instance or transfer syntax in its File Meta Information (PS3.10 7.1)"
        )
    return kind


def answers_echo(peer: DicomPeer, sop_class: UID, *, calling_ae_title: str) -> bool:
    """Asks a peer by C-ECHO whether it answers; whether it takes part in the SOP Class, and lets us ask by C-FIND, too.

    Raises:
        SendError: it does not answer.
    """
    contexts = [(uid, UNCOMPRESSED) for uid in dict.fromkeys((Verification, sop_class))]
    with associated(peer, contexts, calling_ae_title=calling_ae_title) as association:
        if association.send_c_echo().get("Status") != 0:
            raise SendError(f"{peer.where} does not answer C-ECHO")
        if not any(context.abstract_syntax == sop_class for context in association.accepted_contexts):
            return False
        return sop_class != StudyRootQueryRetrieveInformationModelFind or _may_ask(association)


def _may_ask(association: Association) -> bool:
    """Whether a question is answered: Orthanc accepts that of those it does not let query, and then breaks off."""
    nothing = Dataset()
    nothing.QueryRetrieveLevel = "SERIES"
    nothing.StudyInstanceUID, nothing.SeriesInstanceUID = generate_uid(), generate_uid()
    answers = association.send_c_find(nothing, StudyRootQueryRetrieveInformationModelFind)
    return all(code_to_category(status.get("Status", 0xC000)) in ("Pending", "Success") for status, _ in answers)


def _associate(
    ae: AE, peer: DicomPeer, handlers: Sequence[tuple[Any, Callable[[evt.Event], Any]]], roles: list[Any]
) -> Association:
    """An association with the peer.

    Raises:
        SendError: there is none; permanent when the peer rejects it for good (PS3.8 9.3.4).
    """
    try:
        context = None if peer.tls is None else client_context(peer.tls)
    except TlsError as error:
        raise SendError(f"{peer.where} cannot be spoken to under TLS: {error}") from error
    server_name = (peer.tls and peer.tls.server_name) or peer.host
    opened: list[evt.Event] = []
    began_s = time.monotonic()
    try:
        association = ae.associate(
            peer.host,
            peer.port,
            ae_title=peer.ae_title,
            tls_args=None if context is None else (context, server_name),
            ext_neg=roles,
            evt_handlers=[(evt.EVT_CONN_OPEN, _on_open), (evt.EVT_CONN_OPEN, opened.append), *handlers],
        )
    except OSError as error:  # the name cannot be resolved
        raise SendError(f"{peer.where} cannot be reached: {error.strerror}; check the host") from error
    if association.is_established:
        return association
    if context is not None and (reason := last_error(context)):
        raise SendError(f"{peer.where} cannot be spoken to under TLS: {reason}")
    if association.is_rejected:
        answer = association.acceptor.primitive
        raise SendError(
            f"{peer.where} rejected the association from {ae.ae_title}: {answer.reason_str}; check AE titles there",
            permanent=answer.result == 1,
        )
    if association.acceptor.primitive is not None:
        raise SendError(
            f"{peer.where} takes nothing of what was offered; check what it is set to store", permanent=True
        )
    if opened and time.monotonic() - began_s >= peer.timeout_s:
        raise SendError(f"{peer.where} did not answer within {peer.timeout_s:g} s; see whether it hangs, or wants TLS")
    if opened:
        raise SendError(f"{peer.where} does not answer in DICOM; check the port, and whether it wants TLS")
    raise SendError(f"{peer.where} cannot be reached; check host and port, and that it runs")


def _on_open(event: evt.Event) -> None:
    """Without TCP_NODELAY every message waits about 45 ms for a delayed acknowledgement."""
    use_checkpoint(event.assoc)
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
