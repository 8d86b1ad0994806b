"""The SCP: what is offered, who answers what, and the process it lives in."""

import logging
import socket
import threading
import time
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from pynetdicom import _config, evt
from pynetdicom.pdu_primitives import A_RELEASE
from pynetdicom.sop_class import Verification
from pynetdicom.transport import RequestHandler

from node.commitment import SOP_CLASS as COMMITMENT
from node.commitment import CommitmentScp, note_report
from node.config import Config
from node.implementation import make_ae
from node.index import Index
from node.process import be_child, spare_the_collector
from node.reactor import use_checkpoint
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.receive.guard import Guard, GuardedServer
from node.receive.lane import take_lane
from node.receive.store import Store
from node.tls import TlsError

if TYPE_CHECKING:
    from node.retrieve.scp import RetrieveScp

log = logging.getLogger(__name__)

_ACCEPT_POLL_S = 0.2


class Server(GuardedServer):
    """A guarded server that accepts from a socket that listens already and that other processes may share."""

    retrieve: "RetrieveScp | None" = None

    def __init__(self, *args: Any, listener: socket.socket, store: Store, max_pdu_bytes: int, **values: Any) -> None:
        self.socket: socket.socket
        self._listener, self.store, self.max_pdu_bytes = listener, store, max_pdu_bytes
        super().__init__(*args, **values)

    def server_bind(self) -> None:
        """In place of binding the socket that socketserver made."""
        self.socket.close()
        self.socket = self._listener
        self.server_address = self._listener.getsockname()

    def server_activate(self) -> None:
        """It listens."""

    def server_close(self) -> None:
        """Lets go of the socket; a shutdown of it would end the listening of the others too."""
        self.socket.close()


class _Handler(RequestHandler):  # type: ignore[misc]
    """A new connection: its association is served by the fast lane."""

    def _create_association(self) -> Any:
        assoc = super()._create_association()
        take_lane(assoc, self.server.store, self.server.max_pdu_bytes)
        use_checkpoint(assoc)  # a report on storage commitment is sent from another thread than the reactor's
        return assoc


def _on_connect(event: evt.Event) -> None:
    """Without TCP_NODELAY every image waits about 45 ms for a delayed acknowledgement."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _on_established(event: evt.Event) -> None:
    if not event.assoc.accepted_contexts:
        offered = sorted({context.abstract_syntax.name for context in event.assoc.rejected_contexts})
        calling = event.assoc.requestor.ae_title
        log.warning("action=nothing-accepted calling=%r offered=%s: only CT is taken", calling, offered[:5])


def _on_acse(event: evt.Event) -> None:
    """Notes a release when it is asked for, before it is granted; any other end is noted by the lane."""
    if isinstance(event.primitive, A_RELEASE):
        event.assoc.dul.sender.end(released=True)


def start_server(config: Config, store: Store, listener: socket.socket) -> Server:
    """A server that accepts from `listener` and stores, in threads of this process.

    Raises:
        TlsError: the files of receive.tls cannot be used.
    """
    _config.LOG_HANDLER_LEVEL = "none"  # of every PDU, and it trips over some
    ae = make_ae(config.receive.ae_title)
    ae.add_supported_context(Verification)
    ae.add_supported_context(COMMITMENT, scu_role=True, scp_role=True)  # a PACS that reports to us is the SCP
    syntaxes = decodable_transfer_syntaxes()
    for sop_class in CT_SOP_CLASSES:
        ae.add_supported_context(sop_class, syntaxes, scu_role=True, scp_role=False)  # the peer's roles
    retrieve = None
    if config.retrieve.enabled:
        from node.retrieve.scp import RetrieveScp, offer  # it needs the catalog of the HTTP side

        retrieve = RetrieveScp(config, store.index)
        offer(ae)
    guard = Guard(config.receive, store.index.data_dir)
    guard.prepare(ae)
    server: Server = ae.make_server(
        listener.getsockname()[:2],
        evt_handlers=[
            *guard.handlers,
            (evt.EVT_CONN_OPEN, _on_connect),
            (evt.EVT_ESTABLISHED, _on_established),
            (evt.EVT_ACSE_RECV, _on_acse),
            (evt.EVT_N_ACTION, CommitmentScp(store.index).on_n_action),
            (evt.EVT_N_EVENT_REPORT, partial(note_report, store.index)),
            *(retrieve.handlers if retrieve is not None else ()),
        ],
        server_class=Server,
        request_handler=_Handler,
        guard=guard,
        listener=listener,
        store=store,
        max_pdu_bytes=ae.maximum_pdu_size,
    )
    server.retrieve = retrieve
    ae._servers.append(server)  # its shutdown removes it there
    threading.Thread(target=partial(server.serve_forever, _ACCEPT_POLL_S), name="accept", daemon=True).start()
    return server


def run(config: Config, listener: socket.socket, run_name: str, ready: Connection) -> None:
    """A receiver process: says over `ready` that it serves ("") or why it cannot, then does so until SIGTERM."""
    stopping: SimpleQueue[None] = SimpleQueue()  # an Event may not be set by a signal while it is waited for
    be_child(config.log_level, on_sigterm=lambda *_: stopping.put(None))
    index = Index(config.data_dir, config.database)
    store = Store(config, index, run_name)
    try:
        server = start_server(config, store, listener)
    except TlsError as error:
        ready.send(f"receive.tls: {error}")
        return
    spare_the_collector()
    ready.send("")
    ready.close()
    stopping.get()
    shut_down(server, grace_s=3.0)
    store.close()
    index.close()


def shut_down(server: Server, grace_s: float) -> None:
    """Takes no more associations, lets those that run end within the grace time, then aborts them."""
    server.shutdown()
    deadline = time.monotonic() + grace_s
    while server.active_associations and time.monotonic() < deadline:
        time.sleep(0.05)
    for association in server.active_associations:
        association.abort()
    if server.retrieve is not None:
        server.retrieve.close()
