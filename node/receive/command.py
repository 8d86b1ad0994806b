"""C-STORE on the wire: the request's command set read, the response's made, without a pydicom Dataset for either.

A command set is Implicit VR Little Endian, group 0000 (PS3.7 6.3.1). Checked against pynetdicom's own encoding by test.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_C_STORE_RQ, _C_STORE_RSP = 0x0001, 0x8001
_NO_DATASET = 0x0101
_AFFECTED_SOP_CLASS_UID, _COMMAND_FIELD, _MESSAGE_ID, _RESPONDED_TO = 0x0002, 0x0100, 0x0110, 0x0120
_DATASET_TYPE, _STATUS, _ERROR_COMMENT, _AFFECTED_SOP_INSTANCE_UID = 0x0800, 0x0900, 0x0902, 0x1000
_P_DATA_TF = 0x04
_LAST_COMMAND = 0x03  # message control header: the last fragment of a command (PS3.8 E.2)
_MAX_COMMENT_LENGTH = 64  # VR LO


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command set. is_c_store: it is a C-STORE request; the rest is filled for such a one only."""

    has_dataset: bool
    is_c_store: bool
    message_id: int = 0
    sop_class_uid: str = ""
    sop_instance_uid: str = ""


def parse_command(encoded: bytes) -> Command:
    """The command set.

    Raises:
        ValueError: it is none.
    """
    elements: dict[int, bytes] = {}
    at = 0
    while at < len(encoded):
        if at + 8 > len(encoded):
            raise ValueError("a command element is cut off")
        group, element, length = struct.unpack_from("<HHL", encoded, at)
        at += 8
        if group != 0 or at + length > len(encoded):
            raise ValueError("a command element of another group, or longer than its command set")
        elements[element] = encoded[at : at + length]
        at += length
    has_dataset = _number(elements, _DATASET_TYPE) != _NO_DATASET
    message_id = _number(elements, _MESSAGE_ID)
    if _number(elements, _COMMAND_FIELD) != _C_STORE_RQ:
        return Command(has_dataset=has_dataset, is_c_store=False)
    if message_id is None:
        raise ValueError("a C-STORE request without a Message ID")
    return Command(
        has_dataset=has_dataset,
        is_c_store=True,
        message_id=message_id,
        sop_class_uid=_uid(elements, _AFFECTED_SOP_CLASS_UID),
        sop_instance_uid=_uid(elements, _AFFECTED_SOP_INSTANCE_UID),
    )


def c_store_response(command: Command, context_id: int, status: int, comment: str, max_length: int) -> Iterator[bytes]:
    """P-DATA-TF PDUs that answer a C-STORE request; max_length: of what a PDU of the peer may hold, 0 for any."""
    body = _element(_AFFECTED_SOP_CLASS_UID, _encode_uid(command.sop_class_uid))
    body += _element(_COMMAND_FIELD, struct.pack("<H", _C_STORE_RSP))
    body += _element(_RESPONDED_TO, struct.pack("<H", command.message_id))
    body += _element(_DATASET_TYPE, struct.pack("<H", _NO_DATASET))
    body += _element(_STATUS, struct.pack("<H", status))
    if comment:
        text = comment[:_MAX_COMMENT_LENGTH].encode("ascii", "replace")
        body += _element(_ERROR_COMMENT, text + b" " * (len(text) % 2))
    body += _element(_AFFECTED_SOP_INSTANCE_UID, _encode_uid(command.sop_instance_uid))
    encoded = _element(0x0000, struct.pack("<L", len(body))) + body
    step = max(max_length - 6, 1) if max_length else len(encoded)
    for at in range(0, len(encoded), step):
        piece = encoded[at : at + step]
        control = _LAST_COMMAND if at + step >= len(encoded) else _LAST_COMMAND & ~2
        yield struct.pack(">BxLLBB", _P_DATA_TF, len(piece) + 6, len(piece) + 2, context_id, control) + piece


def _element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, number, len(value)) + value


def _number(elements: dict[int, bytes], number: int) -> int | None:
    value = elements.get(number, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else None


def _uid(elements: dict[int, bytes], number: int) -> str:
    return elements.get(number, b"").decode("ascii", "backslashreplace").rstrip("\0 ")


def _encode_uid(uid: str) -> bytes:
    value = uid.encode("ascii", "replace")
    return value + b"\0" * (len(value) % 2)
