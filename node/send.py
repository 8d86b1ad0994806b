"""Sending DICOM files as a C-STORE and C-ECHO SCU: for deliveries, `cspine send`, `cspine check` and the demo.

Files go out as they are, in their own transfer syntax, without being decoded.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pynetdicom._config
from pydicom import dcmread
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification
from pynetdicom.status import code_to_category

from node.config import DicomDestination


class SendError(Exception):
    """The peer cannot be spoken to; the message says why. permanent: trying again would not help."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A file that the peer did not take, and why."""

    path: Path
    reason: str
    permanent: bool


def send_files(
    paths: Sequence[Path],
    peer: DicomDestination,
    *,
    calling_ae_title: str,
    on_file: Callable[[Path, Refused | None], None] = lambda path, refused: None,
) -> list[Refused]:
    """Sends files over one association; returns those that were refused.

    on_file is called after each, with its refusal if there was one.

    Raises:
        SendError: there is no association, or it breaks, or a file does not say what it is.
    """
    kinds = {path: _kind(path) for path in paths}
    ae = _client(calling_ae_title, peer)
    for sop_class, transfer_syntax in sorted(set(kinds.values())):
        ae.add_requested_context(sop_class, transfer_syntax)
    association = _associate(ae, peer)
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts}
    refused = []
    # The file's bytes go out in pieces as they are; pynetdicom has only this module-wide switch for it.
    pynetdicom._config.STORE_SEND_CHUNKED_DATASET = True
    try:
        for path, kind in kinds.items():
            refusal = None if kind in accepted else _not_negotiated(path, kind, peer)
            if refusal is None:
                refusal = _send(association, path, peer)
            if refusal is not None:
                refused.append(refusal)
            on_file(path, refusal)
    finally:
        association.release()
    return refused


def _not_negotiated(path: Path, kind: tuple[str, str], peer: DicomDestination) -> Refused:
    what = f"{UID(kind[0]).name} as {UID(kind[1]).name}"
    return Refused(path=path, reason=f"{_name(peer)} does not take {what}; allow it there", permanent=True)


def _send(association: Association, path: Path, peer: DicomDestination) -> Refused | None:
    """Sends one file; its refusal if the peer answers with a failure.

    Raises:
        SendError: the association broke.
    """
    try:
        status = association.send_c_store(path)
    except RuntimeError as error:  # the association ended since the last file
        raise SendError(f"{_name(peer)} ended the association before {path.name} was sent") from error
    if "Status" not in status:
        raise SendError(f"{_name(peer)} broke the connection while {path.name} was sent")
    if code_to_category(status.Status) in ("Success", "Warning"):
        return None
    comment = status.get("ErrorComment", "no comment")
    reason = f"{_name(peer)} refused {path.name} with status 0x{status.Status:04X} ({comment})"
    return Refused(path=path, reason=reason, permanent=False)


def echo(peer: DicomDestination, *, calling_ae_title: str) -> None:
    """Asks the peer for an answer by C-ECHO.

    Raises:
        SendError: there is none, or a refusal.
    """
    ae = _client(calling_ae_title, peer)
    ae.add_requested_context(Verification)
    association = _associate(ae, peer)
    try:
        if association.send_c_echo().get("Status") != 0:
            raise SendError(f"{_name(peer)} does not answer C-ECHO")
    finally:
        association.release()


def find_dicom_files(folder: Path) -> tuple[list[Path], int]:
    """The DICOM files under a folder, sorted, and the number of other files there. A DICOMDIR is neither."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "DICOMDIR")
    found = [path for path in files if _is_dicom(path)]
    return found, len(files) - len(found)


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _kind(path: Path) -> tuple[str, str]:
    """SOP Class UID and Transfer Syntax UID of a file, from its File Meta Information."""
    meta = dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta
    kind = str(meta.get("MediaStorageSOPClassUID", "")), str(meta.get("TransferSyntaxUID", ""))
    if not all(kind):
        raise SendError(f"{path} lacks SOP Class or transfer syntax in its File Meta Information (PS3.10 7.1)")
    return kind


def _name(peer: DicomDestination) -> str:
    return f"{peer.ae_title} at {peer.host}:{peer.port}"


def _client(calling_ae_title: str, peer: DicomDestination) -> AE:
    ae = AE(ae_title=calling_ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = peer.timeout_s
    ae.maximum_pdu_size = 0
    return ae


def _associate(ae: AE, peer: DicomDestination) -> Association:
    """An association with the peer.

    Raises:
        SendError: there is none; permanent when the peer rejects it for good (PS3.8 9.3.4).
    """
    try:
        association = ae.associate(
            peer.host, peer.port, ae_title=peer.ae_title, evt_handlers=[(evt.EVT_CONN_OPEN, _set_no_delay)]
        )
    except OSError as error:  # the name cannot be resolved
        raise SendError(f"{_name(peer)} cannot be reached: {error.strerror}; check the host") from error
    if association.is_established:
        return association
    if association.is_rejected:
        answer = association.acceptor.primitive
        raise SendError(
            f"{_name(peer)} rejected the association from {ae.ae_title}: {answer.reason_str}; check AE titles there",
            permanent=answer.result == 1,
        )
    if association.acceptor.primitive is not None:
        raise SendError(
            f"{_name(peer)} takes nothing of what was offered; check what it is set to store", permanent=True
        )
    raise SendError(f"{_name(peer)} cannot be reached; check host and port, and that it runs")


def _set_no_delay(event: evt.Event) -> None:
    """Without TCP_NODELAY every message waits about 45 ms for a delayed acknowledgement."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
