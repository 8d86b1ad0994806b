"""The fast lane: C-STORE read from P-DATA-TF PDUs straight into its file. All else is pynetdicom's, as before.

pynetdicom builds a Dataset for every command, joins every PDU several times over and lets two threads an association
poll a thousand times a second: 5 ms of CPU an image. Here `LaneProvider` takes the place of the association's DUL
service provider, the thread that reads the socket. Negotiation, release, abort, timers and the state machine stay
what they are. When the association is established, the provider serves C-STORE by itself; the fragments of any other
message go to pynetdicom's DIMSE provider as if its own state machine had read them, and any other PDU to that state
machine. What of pynetdicom this relies on beyond its documentation: `_is_transport_event` and `_read_pdu_data` of
the DUL provider, and that the association's reactor asks `get_msg` for messages. `tests/node/test_lane.py` holds
the lane against pynetdicom's own SCP.
"""

import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from sqlalchemy.exc import SQLAlchemyError

from node.process import describe_error
from node.receive.access import parse_address
from node.receive.command import Command, c_store_response, parse_command
from node.receive.headers import Announced
from node.receive.request import RequestError, readable_request
from node.receive.sender import Sender
from node.receive.status import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, SOP_CLASS_NOT_SUPPORTED, SUCCESS, RefusedError
from node.receive.store import Arriving, Store

log = logging.getLogger(__name__)

_FIRST_BUFFER_BYTES = 4096
_BUFFER_BYTES = 256 * 1024  # a PDU of dcmtk has 128 KiB at most
_MAX_COMMAND_BYTES = 16 * 1024  # a C-STORE command has some 300
_MAX_OTHER_BYTES = 4 * 2**20  # of the dataset of another message: a storage commitment of 20,000 Instances
_MAX_OTHER_PDU_BYTES = 2**20  # of a PDU other than P-DATA-TF: an A-ASSOCIATE-RQ with every context there can be
_MIN_BYTES_PER_S = 16 * 1024  # a peer that is slower in the middle of a PDU is taken for dead
_TICK_S = 0.1  # how often an idle association looks up
_A_ASSOCIATE_RQ, _P_DATA_TF = 0x01, 0x04
_IS_COMMAND, _IS_LAST = 0x01, 0x02  # message control header (PS3.8 E.2)
_INVALID_PDU, _CONNECTION_CLOSED = "Evt19", "Evt17"  # PS3.8 table 9-10


class _BrokenError(Exception):
    """The peer does not speak DICOM, or no longer: the event that the state machine is told."""

    def __init__(self, event: str) -> None:
        super().__init__(event)
        self.event = event


@dataclass
class _Message:
    """A message that is arriving. command: None until it is complete; arriving: None when it is refused already."""

    context_id: int
    encoded_command: bytearray = field(default_factory=bytearray)
    command: Command | None = None
    num_other_bytes: int = 0
    arriving: Arriving | None = None
    refusal: tuple[int, str] | None = None


class LaneDimse(DIMSEServiceProvider):  # type: ignore[misc]
    """Lets the association's reactor rest while the lane is served, instead of asking a thousand times a second."""

    def __init__(self, assoc: Association) -> None:
        super().__init__(assoc)
        self._awake = threading.Event()
        self._awake.set()
        self._is_waiting = False

    def wake(self) -> None:
        """There is something for the reactor to do."""
        self._awake.set()

    def rest(self) -> bool:
        """The reactor may rest when it has nothing to do; whether it does."""
        if self.msg_queue.queue:
            return False
        self._awake.clear()
        return self._is_waiting

    def get_msg(self, block: bool = False) -> Any:
        """As pynetdicom's; one that would not block waits a little while the reactor rests."""
        if not block and not self._awake.is_set():
            self._is_waiting = True
            self._awake.wait(_TICK_S)
            self._is_waiting = False
        return super().get_msg(block)


class LaneProvider(DULServiceProvider):  # type: ignore[misc]
    """Reads all PDUs of an association, within bounds of size and time, and serves its C-STORE requests."""

    def __init__(self, assoc: Association, store: Store, max_pdu_bytes: int) -> None:
        super().__init__(assoc)
        self.sender = Sender(lambda: str(assoc.requestor.ae_title), store.index, store.run)
        self._store, self._max_pdu_bytes = store, max_pdu_bytes
        self._view = memoryview(bytearray(_FIRST_BUFFER_BYTES))  # a connection that sends no Instance needs no more
        self._begin = self._end = 0  # what of the buffer is still to be read
        self._deadline = 0.0
        self._message: _Message | None = None
        self.acknowledges_at_once = False  # what is received; for a peer that answers in small pieces, see `retrieve/`

    def run_reactor(self) -> None:
        """pynetdicom's thread; whatever ended it, nothing half received stays."""
        try:
            self._connection().settimeout(self._patience_s())
            super().run_reactor()
        except Exception as error:
            # pynetdicom's state machine raises at what has no place in its state, and leaves the connection open.
            self._warn("association-broken", describe_error(error))
            self.socket.close()
        finally:
            if self._message is not None and self._message.arriving is not None:
                self._message.arriving.abandon()
            self.sender.end(released=False)

    # ---- when to read what ----

    def _is_transport_event(self) -> bool:
        state = self.state_machine.current_state
        if state == "Sta6" and self.assoc.is_established:
            return self._serve()
        if state == "Sta6":  # about to be established
            return False
        if state == "Sta13":
            self._close()
            return True
        if self._is_readable(0):
            self._read_pdu_data()
            return True
        return False

    def _close(self) -> None:
        """Closes once the peer has nothing more to say; what it says is not looked at (PS3.8 table 9-10, AA-6)."""
        self._begin = self._end
        try:
            if self._is_readable(0):
                self._receive()
            else:
                self.socket.close()
        except _BrokenError:
            self.event_queue.put(_CONNECTION_CLOSED)

    def _serve(self) -> bool:
        """Serves C-STORE requests until there is something else to do; whether that came over the network."""
        dimse = self.assoc.dimse
        while not self._kill_thread and not self.to_provider_queue.queue and not self.event_queue.queue:
            is_resting = dimse.rest()
            if self._is_readable(_TICK_S if is_resting else 0.001):
                self._idle_timer.restart()
                self._read_pdu_data()
                if self.event_queue.queue or dimse.msg_queue.queue:
                    dimse.wake()
                    return True
            elif not is_resting or self._idle_timer.expired:
                break
        dimse.wake()
        return False

    def _read_pdu_data(self) -> None:
        try:
            self._deadline = time.monotonic() + self._patience_s()
            pdu_type, length = struct.unpack(">BxL", self._take(6))
            self._deadline += length / _MIN_BYTES_PER_S
            if pdu_type == _P_DATA_TF and self.state_machine.current_state == "Sta6":
                if length > self._max_pdu_bytes:
                    raise _BrokenError(_INVALID_PDU)
                self._read_p_data(length)
            elif not 1 <= pdu_type <= 7 or length > _MAX_OTHER_PDU_BYTES:
                raise _BrokenError(_INVALID_PDU)
            else:
                self._pass_on_pdu(struct.pack(">BxL", pdu_type, length) + self._take(length))
        except _BrokenError as error:
            self.event_queue.put(error.event)
        except RequestError as error:
            self._warn("invalid-pdu", str(error))
            self.event_queue.put(_INVALID_PDU)
        except Exception as error:
            # Anything may come over a network, and neither pynetdicom nor pydicom has one error for what it cannot read
            self._warn("invalid-pdu", describe_error(error))
            self.event_queue.put(_INVALID_PDU)

    def _warn(self, action: str, why: str) -> None:
        address = parse_address(self.assoc.requestor.address)
        log.warning("action=%s calling=%r address=%s: aborted (%s)", action, self.sender.ae_title, address, why)

    def _patience_s(self) -> float:
        """How long a PDU that has begun may stand still."""
        timeout = self.network_timeout if self.state_machine.current_state == "Sta6" else self.assoc.acse_timeout
        return float(timeout or 60.0)

    def _pass_on_pdu(self, encoded: bytes) -> None:
        if encoded[0] == _A_ASSOCIATE_RQ:
            encoded = readable_request(encoded)
        pdu, event = self._decode_pdu(encoded)
        self._recv_pdu.put(pdu)
        self.event_queue.put(event)

    # ---- messages ----

    def _read_p_data(self, length: int) -> None:
        """A P-DATA-TF PDU: presentation data values of any number and length (PS3.8 9.3.5)."""
        if len(self._view) < _BUFFER_BYTES:
            self._grow()
        while length:
            if length < 6:
                raise _BrokenError(_INVALID_PDU)
            num_bytes, context_id, control = struct.unpack(">LBB", self._take(6))
            if not 2 <= num_bytes <= length - 4:
                raise _BrokenError(_INVALID_PDU)
            length -= num_bytes + 4
            if control & _IS_COMMAND:
                self._read_command(num_bytes - 2, context_id, is_last=bool(control & _IS_LAST))
            else:
                self._read_dataset(num_bytes - 2, context_id, is_last=bool(control & _IS_LAST))

    def _read_command(self, num_bytes: int, context_id: int, *, is_last: bool) -> None:
        message = self._message = self._message or _Message(context_id)
        too_long = len(message.encoded_command) + num_bytes > _MAX_COMMAND_BYTES
        if message.command is not None or message.context_id != context_id or too_long:
            raise _BrokenError(_INVALID_PDU)
        message.encoded_command += self._take(num_bytes)
        if not is_last:
            return
        message.command = parse_command(bytes(message.encoded_command))
        if message.command.is_c_store:
            self._begin_instance(message, message.command)
        else:
            self._pass_on(context_id, _IS_COMMAND | _IS_LAST, bytes(message.encoded_command))
            if not message.command.has_dataset:
                self._message = None

    def _read_dataset(self, num_bytes: int, context_id: int, *, is_last: bool) -> None:
        message = self._message
        if message is None or message.command is None or message.context_id != context_id:
            raise _BrokenError(_INVALID_PDU)
        if not message.command.is_c_store:
            message.num_other_bytes += num_bytes
            if message.num_other_bytes > _MAX_OTHER_BYTES:
                raise _BrokenError(_INVALID_PDU)
            self._pass_on(context_id, _IS_LAST if is_last else 0, self._take(num_bytes))
        else:
            while num_bytes:
                piece = self._take_some(num_bytes)
                num_bytes -= len(piece)
                if message.arriving is not None:
                    self._attempt(message, message.arriving.write, piece)
        if is_last:
            self._message = None
            if message.command.is_c_store:
                self._end_instance(message, message.command)

    def _pass_on(self, context_id: int, control: int, fragment: bytes) -> None:
        """Gives a fragment to pynetdicom as its state machine would (action DT-2)."""
        primitive = P_DATA()
        primitive.presentation_data_value_list = [[context_id, bytes([control]) + fragment]]
        self.assoc.dimse.receive_primitive(primitive)

    # ---- C-STORE ----

    def _begin_instance(self, message: _Message, command: Command) -> None:
        context = self.assoc._accepted_cx.get(message.context_id)
        if context is None:
            raise _BrokenError(_INVALID_PDU)
        if not command.has_dataset:
            message.refusal = CANNOT_UNDERSTAND, "there is no dataset"
            self._end_instance(message, command)
            self._message = None
            return
        if command.sop_class_uid != context.abstract_syntax:
            message.refusal = SOP_CLASS_NOT_SUPPORTED, "the SOP Class is not that of the presentation context"
            return
        announced = Announced(
            sop_class_uid=command.sop_class_uid,
            sop_instance_uid=command.sop_instance_uid,
            transfer_syntax_uid=str(context.transfer_syntax[0]),
        )
        message.arriving = self._attempt(message, self._store.begin, announced, self.sender)

    def _end_instance(self, message: _Message, command: Command) -> None:
        if message.arriving is not None:
            self._attempt(message, message.arriving.finish)
        status, comment = message.refusal or (SUCCESS, "")
        if status != SUCCESS:
            log.warning(
                "action=instance-refused calling=%r instance=%r status=0x%04X: %s",
                self.sender.ae_title,
                command.sop_instance_uid[:64],
                status,
                comment,
            )
            self.sender.note_refusal(status)
        max_length = self.assoc.dimse.maximum_pdu_size
        for pdu in c_store_response(command, message.context_id, status, comment, max_length):
            self.socket.send(pdu)

    def _attempt(self, message: _Message, step: Callable[..., Any], *values: Any) -> Any:
        """Takes a step of storing. When it fails the Instance is refused, and what still comes of it is dropped.

        | status | when |
        |---|---|
        | 0x0000 | it is on disk and in the index, or was already, byte for byte |
        | 0x0122 | the announced SOP Class is not that of the presentation context |
        | 0xA700 | the disk is full or cannot be written; send it again later |
        | 0xA900 | it is not CT, its SOP Class or UID is not the announced one, or this node made it |
        | 0xC000 | it cannot be parsed, is cut off or too large, has other frames than it says, or lacks a usable UID |
        | 0xC111 | another Instance with this UID is here |
        """
        cause: Exception | None = None
        try:
            return step(*values)
        except RefusedError as refusal:
            message.refusal = refusal.status, str(refusal)
        except (OSError, SQLAlchemyError) as error:
            message.refusal, cause = (OUT_OF_RESOURCES, "cannot be stored now; send it again later"), error
        except Exception as error:
            # Anything may come over a network, and pydicom has no one error for what it cannot parse.
            message.refusal, cause = (CANNOT_UNDERSTAND, "the dataset cannot be parsed"), error
        message.arriving = None
        if cause is not None:
            log.warning("action=not-stored calling=%r: %s", self.sender.ae_title, describe_error(cause))
        return None

    # ---- bytes ----

    def _is_readable(self, timeout_s: float) -> bool:
        if self._begin < self._end:
            return True
        try:
            connection = self._connection()
            if isinstance(connection, ssl.SSLSocket) and connection.pending():
                return True
            poll = select.poll()  # select.select knows descriptors up to 1023 only
            poll.register(connection, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        except (_BrokenError, OSError, ValueError):  # closed by another thread
            self.event_queue.put(_CONNECTION_CLOSED)
            return False

    def _connection(self) -> socket.socket:
        connection: socket.socket | None = self.socket.socket if self.socket is not None else None
        if connection is None:
            raise _BrokenError(_CONNECTION_CLOSED)
        return connection

    def _take(self, num_bytes: int) -> bytes:
        """Exactly that many bytes."""
        taken = bytearray()
        while len(taken) < num_bytes:
            taken += self._take_some(num_bytes - len(taken))
        return bytes(taken)

    def _take_some(self, num_bytes: int) -> memoryview:
        """At least one byte and at most that many; valid until the next call."""
        if self._begin == self._end:
            if time.monotonic() > self._deadline:
                raise _BrokenError(_INVALID_PDU)
            self._receive()
        begin = self._begin
        self._begin = min(begin + num_bytes, self._end)
        return self._view[begin : self._begin]

    def _receive(self) -> None:
        try:
            received = self._connection().recv_into(self._view)
            if self.acknowledges_at_once and hasattr(socket, "TCP_QUICKACK"):  # Linux has it
                self._connection().setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except TimeoutError:
            raise _BrokenError(_INVALID_PDU) from None
        except OSError:
            raise _BrokenError(_CONNECTION_CLOSED) from None
        if not received:
            raise _BrokenError(_CONNECTION_CLOSED)
        self._begin, self._end = 0, received

    def _grow(self) -> None:
        rest = bytes(self._view[self._begin : self._end])
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._view[: len(rest)] = rest
        self._begin, self._end = 0, len(rest)
        self._connection().settimeout(self._patience_s())


def take_lane(assoc: Association, store: Store, max_pdu_bytes: int) -> None:
    """Has an association that is not started yet served by the lane."""
    provider = LaneProvider(assoc, store, max_pdu_bytes)
    provider.socket, provider.event_queue = assoc.dul.socket, assoc.dul.event_queue
    assoc.dul, assoc.dimse = provider, LaneDimse(assoc)
    assoc.acse_timeout, assoc.network_timeout = assoc.acse_timeout, assoc.network_timeout  # sets the provider's timers
