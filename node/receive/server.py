"""The SCP: associations, their handlers, and the process they live in. What becomes of an Instance is `store.py`."""

import logging
import signal
import socket
import threading
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

from pydicom import Dataset
from pynetdicom import evt
from pynetdicom.pdu_primitives import A_RELEASE
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer
from sqlalchemy.exc import SQLAlchemyError

from node.commitment import SOP_CLASS as COMMITMENT
from node.commitment import CommitmentScp
from node.config import Config
from node.implementation import make_ae
from node.index import Index
from node.process import be_child, describe_error, sync
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.receive.guard import Guard, GuardedServer
from node.receive.reconcile import reconcile
from node.receive.store import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, SUCCESS, Received, RefusedError, Store
from node.tls import TlsError

log = logging.getLogger(__name__)


@dataclass
class Receiver:
    """The handlers of the SCP and what they share. One per process."""

    store: Store

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
            self._association_ids[key] = self.store.index.open_association(event.assoc.requestor.ae_title)
        return self._association_ids[key]

    def _end(self, event: evt.Event, *, released: bool) -> None:
        association_id = self._association_ids.pop(id(event.assoc), None)
        if association_id is not None:
            self.store.index.end_association(association_id, released=released)

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
            self.store.put(
                Received(
                    encoded=event.encoded_dataset(),
                    sop_class_uid=event.request.AffectedSOPClassUID,
                    sop_instance_uid=event.request.AffectedSOPInstanceUID,
                    calling_ae_title=event.assoc.requestor.ae_title,
                    association_id=partial(self._association_id, event),
                )
            )
            return _status(SUCCESS)
        except RefusedError as refusal:
            status, comment = refusal.status, str(refusal)
        except (OSError, SQLAlchemyError) as error:
            status, comment = OUT_OF_RESOURCES, "cannot be stored now; send it again later"
            cause = f" ({describe_error(error)})"
        except Exception as error:
            # Anything may come over a network, and pydicom has no one error for what it cannot parse.
            status, comment = CANNOT_UNDERSTAND, "the dataset cannot be parsed"
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


def _status(code: int, comment: str = "") -> Dataset:
    status = Dataset()
    status.Status = code
    if comment:
        status.ErrorComment = comment[:64]  # VR LO
    return status


def start_server(config: Config, index: Index) -> GuardedServer:
    """A server that listens and stores, in threads of this process.

    Raises:
        OSError: the address cannot be bound.
        TlsError: the files of receive.tls cannot be used.
    """
    receiver = Receiver(Store(config, index))
    ae = make_ae(config.receive.ae_title)
    ae.add_supported_context(Verification)
    ae.add_supported_context(COMMITMENT, scu_role=True, scp_role=False)
    syntaxes = decodable_transfer_syntaxes()
    for sop_class in CT_SOP_CLASSES:
        ae.add_supported_context(sop_class, syntaxes, scu_role=True, scp_role=False)  # the peer's roles
    guard = Guard(config.receive, index.data_dir)
    guard.prepare(ae)
    server: GuardedServer = ae.make_server(
        (config.receive.host, config.receive.port),
        evt_handlers=[
            *guard.handlers,
            (evt.EVT_CONN_OPEN, receiver.on_connect),
            (evt.EVT_ESTABLISHED, receiver.on_established),
            (evt.EVT_ACSE_RECV, receiver.on_acse),
            (evt.EVT_ABORTED, receiver.on_lost),
            (evt.EVT_CONN_CLOSE, receiver.on_lost),
            (evt.EVT_C_STORE, receiver.on_c_store),
            (evt.EVT_N_ACTION, CommitmentScp(index).on_n_action),
        ],
        server_class=GuardedServer,
        guard=guard,
    )
    server.socket.listen(128)  # pynetdicom's backlog of 5 refuses a burst of senders
    ae._servers.append(server)
    threading.Thread(target=server.serve_forever, name="accept", daemon=True).start()
    return server


def run(config: Config, ready: Connection) -> None:
    """The receiver process: says over `ready` that it listens ("") or why it cannot, then serves until SIGTERM."""
    be_child(config.log_level)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    index = Index(config.data_dir, config.database)
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
    except TlsError as error:
        ready.send(f"receive.tls: {error}")
        return
    ready.send("")
    stopping.wait()
    shut_down(server, grace_s=3.0)
    index.close()


def shut_down(server: ThreadedAssociationServer, grace_s: float) -> None:
    """Takes no more associations, lets those that run end within the grace time, then aborts them."""
    server.shutdown()
    deadline = time.monotonic() + grace_s
    while server.active_associations and time.monotonic() < deadline:
        time.sleep(0.05)
    for association in server.active_associations:
        association.abort()
