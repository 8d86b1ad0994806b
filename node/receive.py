"""The receiver: a C-ECHO and C-STORE SCP for CT, in a process of its own.

An Instance is written as it came, fsynced and indexed before the success status goes out. The receiver decides nothing
about Series: that is `complete.py`, which reads what is noted here. Started and watched by `service.py`.
"""

import logging
import os
import re
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    AllTransferSyntaxes,
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.pdu_primitives import A_RELEASE
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer
from sqlalchemy.exc import SQLAlchemyError

from model import HEADER_TAGS, slice_headers
from node.config import Config
from node.index import Index
from node.process import be_child, describe_error, sync

log = logging.getLogger(__name__)

CT_SOP_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

_SUCCESS = 0x0000
_OUT_OF_RESOURCES = 0xA700
_MISMATCH = 0xA900
_CANNOT_UNDERSTAND = 0xC000
_CONFLICT = 0xC111


class RefusedError(Exception):
    """An Instance is not taken: the C-STORE status (PS3.4 B.2.3) and a sentence for the sender."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status = status


def decodable_transfer_syntaxes() -> list[str]:
    """Transfer syntaxes whose pixel data can be decoded by what is installed, uncompressed first."""

    def can_decode(uid: str) -> bool:
        try:
            return bool(get_decoder(uid).is_available)
        except NotImplementedError:
            return False

    return [str(uid) for uid in AllTransferSyntaxes if can_decode(uid)]


@dataclass
class Receiver:
    """The handlers of the SCP and what they share. One per process."""

    config: Config
    index: Index

    def __post_init__(self) -> None:
        self._association_ids: dict[int, int] = {}  # of open associations, by the identity of pynetdicom's object

    def on_connect(self, event: evt.Event) -> None:
        """Without TCP_NODELAY every image waits about 45 ms for a delayed acknowledgement."""
        event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def on_established(self, event: evt.Event) -> None:
        calling = event.assoc.requestor.ae_title
        if not event.assoc.accepted_contexts:
            offered = sorted({context.abstract_syntax.name for context in event.assoc.rejected_contexts})
            log.warning("action=nothing-accepted calling=%r offered=%s: only CT is taken", calling, offered[:5])

    def on_acse(self, event: evt.Event) -> None:
        """Notes a release when it is asked for; once granted, the close of the connection may be told of first."""
        if isinstance(event.primitive, A_RELEASE):
            self._end(event, released=True)

    def on_lost(self, event: evt.Event) -> None:
        """The association was aborted, or its connection closed; after a release this finds nothing to do."""
        self._end(event, released=False)

    def _association_id(self, event: evt.Event) -> int:
        """The row of this association, made with its first Instance: one that only sends C-ECHO leaves none."""
        key = id(event.assoc)
        if key not in self._association_ids:
            self._association_ids[key] = self.index.open_association(event.assoc.requestor.ae_title)
        return self._association_ids[key]

    def _end(self, event: evt.Event, *, released: bool) -> None:
        association_id = self._association_ids.pop(id(event.assoc), None)
        if association_id is not None:
            self.index.end_association(association_id, released=released)

    def on_c_store(self, event: evt.Event) -> Dataset:
        """Stores one Instance; returns the status.

        | status | when |
        |---|---|
        | 0x0000 | it is on disk and in the index, or was already, byte for byte |
        | 0xA700 | the disk is full or cannot be written; send it again later |
        | 0xA900 | it is not CT, its SOP Class or UID is not the announced one, or this node made it |
        | 0xC000 | it cannot be parsed, or lacks a usable UID |
        | 0xC111 | another Instance with this UID is here |
        """
        cause = ""  # for our log only
        try:
            self._store(event)
            return _status(_SUCCESS)
        except RefusedError as refusal:
            status, comment = refusal.status, str(refusal)
        except (OSError, SQLAlchemyError) as error:
            status, comment = _OUT_OF_RESOURCES, "cannot be stored now; send it again later"
            cause = f" ({describe_error(error)})"
        except Exception as error:
            # Anything may come over a network, and pydicom has no one error for what it cannot parse.
            status, comment = _CANNOT_UNDERSTAND, "the dataset cannot be parsed"
            cause = f" ({describe_error(error)})"
        log.warning(
            "action=instance-refused calling=%r instance=%.64r status=0x%04X: %s%s",
            event.assoc.requestor.ae_title,
            event.request.AffectedSOPInstanceUID,
            status,
            comment,
            cause,
        )
        return _status(status, comment)

    def _store(self, event: evt.Event) -> None:
        free_mb = shutil.disk_usage(self.index.data_dir).free // 2**20
        if free_mb < self.config.receive.min_free_disk_mb:
            raise RefusedError(
                _OUT_OF_RESOURCES, f"{free_mb} MB free, min_free_disk_mb is {self.config.receive.min_free_disk_mb}"
            )
        encoded = event.encoded_dataset()
        headers = self._read_headers(event, encoded)
        uid, series_uid = headers[0]["sop_instance_uid"], headers[0]["series_instance_uid"]
        if self.index.is_result(uid):
            raise RefusedError(_MISMATCH, "this node made this Instance; results are never analysed")
        known = self.index.find_instance(uid)
        if known is not None:
            _check_same(known, encoded)
            return
        path = self.index.data_dir / "instances" / series_uid / f"{uid}.dcm"
        _write_durably(path, encoded)
        try:
            is_new = self.index.add_instance(
                association_id=self._association_id(event),
                calling_ae_title=event.assoc.requestor.ae_title,
                path=path,
                headers=headers,
                quiet_time_s=self.config.complete.quiet_time_s,
            )
            if not is_new:  # the same UID came in another Series at this moment
                raise RefusedError(_CONFLICT, "another Instance with this UID is here; the first one is kept")
        except BaseException:
            path.unlink()
            raise

    def _read_headers(self, event: evt.Event, encoded: bytes) -> list[dict[str, Any]]:
        request = event.request
        ds = dcmread(BytesIO(encoded), stop_before_pixels=True, specific_tags=HEADER_TAGS)
        # RSNA's files lack SOPClassUID and Modality: what is missing comes from the request, what differs is refused.
        for keyword, announced in (
            ("SOPClassUID", request.AffectedSOPClassUID),
            ("SOPInstanceUID", request.AffectedSOPInstanceUID),
        ):
            if ds.get(keyword, announced) != announced:
                raise RefusedError(_MISMATCH, f"{keyword} in the dataset is not the announced one")
            setattr(ds, keyword, announced)
        modality = ds.get("Modality") or "CT"
        if modality != "CT":
            raise RefusedError(_MISMATCH, f"Modality is {modality!r:.20}; only CT is taken")
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            if not is_uid(ds.get(keyword, "")):
                raise RefusedError(_CANNOT_UNDERSTAND, f"{keyword} is missing or not a UID (PS3.5 9.1)")
        headers = slice_headers(ds)
        if not headers:
            raise RefusedError(_CANNOT_UNDERSTAND, "the Instance has no frames")
        return [header.to_dict() for header in headers]


def is_uid(value: object) -> bool:
    """Whether the value has the form of a UID (PS3.5 9.1): safe as a file name. Leading zeros are let pass."""
    return len(str(value)) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", str(value)) is not None


def _status(code: int, comment: str = "") -> Dataset:
    status = Dataset()
    status.Status = code
    if comment:
        status.ErrorComment = comment[:64]  # VR LO
    return status


def _check_same(known: Path, encoded: bytes) -> None:
    """Passes when the stored Instance is the received one; the group 2 header may differ.

    Raises:
        RefusedError: it is another.
    """
    stored = known.read_bytes()
    if _dataset_of(stored) != _dataset_of(encoded):
        raise RefusedError(_CONFLICT, "another Instance with this UID is here; the first one is kept")


def _dataset_of(encoded: bytes) -> memoryview:
    """What follows the File Meta Information, whose length its first element gives (PS3.10 7.1)."""
    return memoryview(encoded)[144 + int.from_bytes(encoded[140:144], "little") :]


def _write_durably(path: Path, encoded: bytes) -> None:
    """Writes a new file that survives a power cut; leaves nothing behind when it fails.

    Raises:
        RefusedError: the file is there already: another association is storing the same UID at this moment.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    except FileExistsError as error:
        raise RefusedError(_OUT_OF_RESOURCES, "the same Instance is arriving on another association") from error
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            view = memoryview(encoded)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        sync(path.parent)
    except BaseException:
        path.unlink()
        raise


def reconcile(index: Index) -> int:
    """Removes files that no index row names, which a crash left before they were acknowledged; returns how many."""
    strays = [
        path
        for folder in index.data_dir.glob("instances/*")
        for path in set(folder.glob("*.dcm")) - set(index.instance_paths(folder.name))
    ]
    for path in strays:
        path.unlink()
    return len(strays)


def start_server(config: Config, index: Index) -> ThreadedAssociationServer:
    """A server that listens and stores, in threads of this process.

    Raises:
        OSError: the address cannot be bound.
    """
    receiver = Receiver(config, index)
    ae = AE(ae_title=config.receive.ae_title)
    ae.maximum_associations = config.receive.max_associations
    ae.maximum_pdu_size = 0  # unlimited: fastest
    ae.network_timeout = config.receive.network_timeout_s
    ae.acse_timeout = 5.0  # a health check that only connects holds one of the associations for so long
    ae.add_supported_context(Verification)
    syntaxes = decodable_transfer_syntaxes()
    for sop_class in CT_SOP_CLASSES:
        ae.add_supported_context(sop_class, syntaxes)
    server = ae.start_server(
        (config.receive.host, config.receive.port),
        block=False,
        evt_handlers=[
            (evt.EVT_CONN_OPEN, receiver.on_connect),
            (evt.EVT_ESTABLISHED, receiver.on_established),
            (evt.EVT_ACSE_RECV, receiver.on_acse),
            (evt.EVT_ABORTED, receiver.on_lost),
            (evt.EVT_CONN_CLOSE, receiver.on_lost),
            (evt.EVT_C_STORE, receiver.on_c_store),
        ],
    )
    server.socket.listen(128)  # pynetdicom's backlog of 5 refuses a burst of senders
    return server


def run(config: Config, ready: Connection) -> None:
    """The receiver process: says over `ready` that it listens ("") or why it cannot, then serves until SIGTERM."""
    be_child(config.log_level)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    index = Index(config.data_dir)
    index.end_lost_associations()
    (index.data_dir / "instances").mkdir(exist_ok=True)
    sync(index.data_dir)
    strays = reconcile(index)
    if strays:
        log.warning("action=reconciled removed=%d files that were never acknowledged", strays)
    try:
        server = start_server(config, index)
    except OSError as error:
        ready.send(f"{config.receive.host}:{config.receive.port} cannot be listened on: {error.strerror}")
        return
    ready.send("")
    stopping.wait()
    _shut_down(server, grace_s=3.0)
    index.close()


def _shut_down(server: ThreadedAssociationServer, grace_s: float) -> None:
    """Takes no more associations, lets those that run end within the grace time, then aborts them."""
    server.shutdown()
    deadline = time.monotonic() + grace_s
    while server.active_associations and time.monotonic() < deadline:
        time.sleep(0.05)
    for association in server.active_associations:
        association.abort()
