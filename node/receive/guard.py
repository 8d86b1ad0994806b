"""The door of the receiver: limits, TLS and the list of peers, from the accepted connection to the answered request.

A connection takes a place at once, or will be told that there is none, as it will from an address of which nobody can
be let in: strangers take no place. It has `associate_timeout_s` for the TLS handshake and its whole A-ASSOCIATE-RQ;
`judge` says who is let in. One thread looks after all connections of the process. How long and how large later PDUs may
be, `lane.py` sees to.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import ThreadedAssociationServer

from node.config import ReceiveConfig
from node.receive.access import LOCAL_LIMIT_EXCEEDED, Address, Caller, Rejection, judge, may_come_from, parse_address
from node.receive.places import NoPlaceError, Places
from node.reminder import Reminder
from node.tls import ServerTls, describe_tls_error

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_GRACE_S = 1.0  # what pynetdicom has to end an association by itself
_NUM_TOLD = 32  # connections without a place that are answered at a time; more are closed unanswered
_SAY_AGAIN_S = 60.0
_TLS_HANDSHAKE = b"\x16"  # the first byte of a connection under TLS (RFC 8446 5.1)


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    address: Address
    place: int | None  # None: it will be told that there is none
    problem: str  # why there is none
    deadline: float  # for the A-ASSOCIATE-RQ
    assoc: Association | None = None
    was_greeted: bool = False  # it is pynetdicom's now
    was_started: bool = False  # its thread runs, or has ended; before, `is_alive` does not tell
    was_requested: bool = False
    was_cut: bool = False
    ending_since: float | None = None


class Guard:
    """Watches over the connections of one server.

    Raises:
        TlsError: certificate, key or authorities cannot be used.
    """

    def __init__(self, config: ReceiveConfig, data_dir: Path) -> None:
        self._config = config
        self._tls = None if config.tls is None else ServerTls(config.tls)
        self._places = Places(data_dir / "cspine.places", config.max_associations, config.max_associations_per_address)
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._lock = threading.Lock()
        self._reminder = Reminder(_SAY_AGAIN_S)
        self._stopping = threading.Event()
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def prepare(self, ae: AE) -> None:
        """Gives the application entity the limits that pynetdicom keeps by itself."""
        ae.maximum_associations = self._config.max_associations + _NUM_TOLD  # places are what counts
        ae.acse_timeout = self._config.associate_timeout_s + _GRACE_S
        ae.network_timeout = self._config.network_timeout_s
        ae.maximum_pdu_size = self._config.max_pdu_kb * 1024

    @property
    def handlers(self) -> list[tuple[Any, Callable[[evt.Event], Any]]]:
        """What is bound to the events of the server."""
        return [
            (evt.EVT_CONN_OPEN, self.on_connect),
            (evt.EVT_REQUESTED, self.on_requested),
            (evt.EVT_ESTABLISHED, self.on_established),
            (evt.EVT_ASYNC_OPS, lambda _: (1, 1)),  # is answered: one operation at a time
        ]

    def stop(self) -> None:
        """Looks after those that are there, then ends."""
        self._stopping.set()

    # ---- accepted ----

    def admit(self, connection: socket.socket, client_address: tuple[Any, ...]) -> bool:
        """Takes a place for a connection just accepted; False if it is to be closed unanswered."""
        address = parse_address(client_address[0])
        place, problem = None, ""
        if may_come_from(self._config, address):
            try:
                place = self._places.take(address)
            except NoPlaceError as error:
                problem = str(error)
        else:
            problem = "receive.allow lets nobody in from there"
        deadline = time.monotonic() + self._config.associate_timeout_s
        new = _Connection(connection, address, place, problem, deadline)
        with self._lock:
            before = self._connections.pop(connection.fileno(), None)
            num_told = sum(c.place is None for c in self._connections.values())
            is_answered = place is not None or num_told < _NUM_TOLD
            if is_answered:
                self._connections[connection.fileno()] = new
        if before is not None:  # closed since, its descriptor used again
            self._free_place(before)
        if not is_answered:
            self._say(("full", address), "action=connection-closed address=%s: %s", address, problem)
        return is_answered

    def greet(self, connection: socket.socket) -> _Connection | None:
        """The connection, under TLS if that is configured, once its peer speaks; None if it is over before that.

        pynetdicom would hold an association for a health check that only connects until a timeout.
        """
        known = self._connections[connection.fileno()]
        try:
            if self._tls is not None:
                known.socket = self._tls.context().wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                known.socket.do_handshake()
                known.was_greeted = True
                return known
            first = connection.recv(1, socket.MSG_PEEK)
            if first and first != _TLS_HANDSHAKE:
                known.was_greeted = True
                return known
            problem = "it speaks TLS, and receive.tls is not set" if first else ""
        except OSError as error:
            problem = describe_tls_error(error) if self._tls and not known.was_cut else ""
        if problem:
            self._say(
                ("greeting", known.address, problem),
                "action=connection-refused address=%s: %s",
                known.address,
                problem,
            )
        self.forget(known)
        known.socket.close()
        return None

    # ---- pynetdicom's events ----

    def on_connect(self, event: evt.Event) -> None:
        """Binds the association to its connection."""
        known = self._connections.get(event.assoc.dul.socket.socket.fileno())
        if known is not None:
            known.assoc = event.assoc

    def on_requested(self, event: evt.Event) -> None:
        """Rejects an association that may not be. Should judging fail, pynetdicom would go on and accept it."""
        rejection: Rejection | None = Rejection(LOCAL_LIMIT_EXCEEDED, "it could not be judged")
        known = next((c for c in list(self._connections.values()) if c.assoc is event.assoc), None)
        try:
            if known is not None:
                rejection = self._judge(known, event.assoc.requestor.primitive)
        finally:
            if rejection is not None:
                event.assoc.acse.send_reject(*rejection.code)
                evt.trigger(event.assoc, evt.EVT_REJECTED, {})
                if known is not None:
                    self._free_place(known)
                event.assoc.kill()

    def _judge(self, known: _Connection, request: A_ASSOCIATE) -> Rejection | None:
        known.was_requested = True
        calling, called = request.calling_ae_title.strip(), request.called_ae_title.strip()
        caller = Caller(
            calling_ae_title=calling,
            called_ae_title=called,
            address=known.address,
            application_context=str(request.application_context_name or ""),
        )
        rejection = judge(self._config, caller)
        if rejection is None and known.place is None:
            rejection = Rejection(LOCAL_LIMIT_EXCEEDED, known.problem)
        if rejection is not None:
            self._say(
                ("rejected", known.address, calling, called, rejection.code),
                "action=association-rejected calling=%r address=%s: %s",
                calling,
                known.address,
                rejection.message,
            )
        return rejection

    def on_established(self, event: evt.Event) -> None:
        """From here on a read may wait as long as for a PDU, no longer as for the request."""
        with contextlib.suppress(OSError):  # it is closed already
            event.assoc.dul.socket.socket.settimeout(self._config.network_timeout_s)

    # ---- watched ----

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S) or self._connections:
            now = time.monotonic()
            for known in list(self._connections.values()):
                self._look_after(known, now)
            if self._stopping.is_set():
                time.sleep(_LOOK_EVERY_S)
        self._places.close()

    def _look_after(self, known: _Connection, now: float) -> None:
        assoc = known.assoc
        is_running = assoc is not None and assoc.is_alive()
        if known.was_greeted and not is_running and known.socket.fileno() < 0:  # closed, say for lack of a thread
            self.forget(known)
        elif assoc is not None and known.was_started and not assoc.is_alive():
            if not assoc.dul.is_alive():
                self.forget(known)
                return
            known.ending_since = known.ending_since or now
        elif assoc is not None and assoc.is_rejected:
            known.ending_since = known.ending_since or now
        elif not known.was_requested and now > known.deadline and not known.was_cut:
            self._say(
                ("silent", known.address),
                "action=connection-closed address=%s: no association was asked for within %g s",
                known.address,
                self._config.associate_timeout_s,
            )
            self._cut(known)
        if known.ending_since is not None and now > known.ending_since + _GRACE_S:
            self._cut(known)

    def _cut(self, known: _Connection) -> None:
        """Ends the connection under whatever waits for it: a blocked `recv` returns, which `close` does not do."""
        known.was_cut = True
        with contextlib.suppress(OSError):
            known.socket.shutdown(socket.SHUT_RDWR)

    def forget(self, known: _Connection) -> None:
        """The connection is over."""
        self._free_place(known)
        with self._lock:
            for descriptor, other in list(self._connections.items()):
                if other is known:
                    del self._connections[descriptor]

    def _free_place(self, known: _Connection) -> None:
        with self._lock:
            place, known.place = known.place, None
        if place is not None:
            self._places.free(place)

    def _say(self, key: tuple[object, ...], message: str, *values: object) -> None:
        """Warns, of the same thing once a minute: whoever is turned away tries again, and may do so very often."""
        if self._reminder.is_due(key):
            log.warning(message, *values)


class GuardedServer(ThreadedAssociationServer):  # type: ignore[misc]
    """pynetdicom's server with a guard at its door."""

    def __init__(self, *args: Any, guard: Guard, **values: Any) -> None:
        self._guard = guard
        super().__init__(*args, **values)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Called with each accepted connection; what is False is closed."""
        return self._guard.admit(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Called in a thread of the connection: a slow peer holds up nobody else."""
        greeted = self._guard.greet(request)
        if greeted is not None:
            super().finish_request(greeted.socket, client_address)
            greeted.was_started = True

    def shutdown(self) -> None:
        super().shutdown()
        self._guard.stop()
