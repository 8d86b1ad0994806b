"""DICOM on the wire, byte by byte: what a peer sends that no library would, and what it is answered."""

import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.dsutils import split_dataset
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.sop_class import Verification

from node.config import DicomDestination, ReceiveConfig
from tests.waiting import WAIT_S

P_DATA_TF, A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = 4, 5, 6, 7
COMMAND, LAST = 1, 2  # message control header
CT_CONTEXT, ECHO_CONTEXT = 1, 3


def pdu(pdu_type: int, body: bytes) -> bytes:
    return struct.pack(">BxL", pdu_type, len(body)) + body


def value(context_id: int, control: int, fragment: bytes) -> bytes:
    """A presentation data value."""
    return struct.pack(">LBB", len(fragment) + 2, context_id, control) + fragment


RELEASE = pdu(A_RELEASE_RQ, bytes(4))
ABORT = pdu(A_ABORT, bytes(4))


def associate_rq(
    transfer_syntaxes: Iterable[str] = (ExplicitVRLittleEndian,),
    max_length: int = 16384,
    calling: str = "WIRE",
    sop_class: str = CTImageStorage,
) -> bytes:
    """Offers CT, or another SOP Class, as context 1 and Verification as context 3."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = calling, "CSPINE"
    contexts = [build_context(sop_class, list(transfer_syntaxes)), build_context(Verification)]
    for context, context_id in zip(contexts, (CT_CONTEXT, ECHO_CONTEXT), strict=True):
        context.context_id = context_id
    primitive.presentation_context_definition_list = contexts
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = max_length
    implementation.implementation_class_uid = "1.2.3.4"
    primitive.user_information = [length, implementation]
    encoded: bytes = A_ASSOCIATE_RQ(primitive).encode()
    return encoded


def command(field: int, *, message_id: int = 1, dataset: bool = True, **uids: str) -> bytes:
    """A request's command set; sop_class, sop_instance: Affected SOP Class and Instance UID."""
    elements = {
        0x0002: _padded(uids.get("sop_class", "")),
        0x0100: struct.pack("<H", field),
        0x0110: struct.pack("<H", message_id),
        0x0700: struct.pack("<H", 0),
        0x0800: struct.pack("<H", 1 if dataset else 0x0101),
        0x1000: _padded(uids.get("sop_instance", "")),
    }
    body = b"".join(
        struct.pack("<HHL", 0, number, len(data)) + data
        for number, data in elements.items()
        if data or number != 0x1000
    )
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def c_store(sop_instance: str, sop_class: str = CTImageStorage, message_id: int = 1) -> bytes:
    return command(0x0001, message_id=message_id, sop_class=sop_class, sop_instance=sop_instance)


def c_echo(message_id: int = 1) -> bytes:
    return command(0x0030, message_id=message_id, dataset=False, sop_class=Verification)


def dataset_of(path: Path) -> bytes:
    """What follows the File Meta Information: what goes over the network."""
    _, offset = split_dataset(path)
    return path.read_bytes()[offset:]


def messages(sop_instance: str, dataset: bytes, piece: int = 4096, *, sop_class: str = CTImageStorage) -> list[bytes]:
    """A C-STORE request as PDUs of one value each."""
    pieces = [dataset[at : at + piece] for at in range(0, len(dataset), piece)] or [b""]
    return [
        pdu(P_DATA_TF, value(CT_CONTEXT, COMMAND | LAST, c_store(sop_instance, sop_class))),
        *(
            pdu(P_DATA_TF, value(CT_CONTEXT, LAST if number == len(pieces) - 1 else 0, fragment))
            for number, fragment in enumerate(pieces)
        ),
    ]


class Peer:
    """A connection to the receiver."""

    def __init__(self, at: DicomDestination | ReceiveConfig, timeout_s: float = WAIT_S) -> None:
        self.socket = socket.create_connection((at.host, at.port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        self.socket.sendall(b"".join(pieces))

    def associate(self, request: bytes | None = None) -> None:
        self.send(request or associate_rq())
        answer = self.receive()
        assert answer[0] == 2, answer

    def receive(self) -> tuple[int, bytes]:
        """The next PDU: type and body; (0, b"") when the connection was closed."""
        head = self._take(6)
        if len(head) < 6:
            return 0, b""
        pdu_type, length = struct.unpack(">BxL", head)
        return pdu_type, self._take(length)

    def response(self) -> tuple[int, int, int]:
        """The next response: command field, Message ID Being Responded To, status; over PDUs of any size."""
        encoded, control = b"", 0
        while not control & LAST:
            pdu_type, body = self.receive()
            assert pdu_type == P_DATA_TF, pdu_type
            control = body[5]
            encoded += body[6:]
        elements = dict(_elements(encoded))
        return tuple(int.from_bytes(elements[number], "little") for number in (0x0100, 0x0120, 0x0900))  # type: ignore[return-value]

    def status(self) -> int:
        """The status of the next response, which is to be of a C-STORE."""
        field, _, status = self.response()
        assert field == 0x8001
        return status

    def release(self) -> None:
        self.send(RELEASE)
        assert self.receive()[0] == A_RELEASE_RP

    def _take(self, num_bytes: int) -> bytes:
        taken = b""
        while len(taken) < num_bytes:
            try:
                received = self.socket.recv(num_bytes - len(taken))
            except ConnectionError:
                return b""
            if not received:
                return b""
            taken += received
        return taken


def _elements(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(encoded):
        _, number, length = struct.unpack_from("<HHL", encoded, at)
        yield number, encoded[at + 8 : at + 8 + length]
        at += 8 + length


def _padded(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)
