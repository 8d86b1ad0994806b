"""An A-ASSOCIATE-RQ before pynetdicom decodes it: what it does not know is left out, what it would break at is refused.

It aborts at an item that it does not know, which is to be ignored, and a presentation context without a transfer syntax
ends its thread. Asked by `lane.py`.

Reference: PS3.8 9.3.1 (items that are not recognised), 9.3.2 (the request), PS3.7 annex D (user information).
"""

import struct
from collections.abc import Iterator

_ITEMS_AT = 74
_HEAD = struct.Struct(">BxH")
_PRESENTATION_CONTEXT, _USER_INFORMATION = 0x20, 0x50
_ABSTRACT_SYNTAX, _TRANSFER_SYNTAX = 0x30, 0x40
_KNOWN = frozenset({0x10, _PRESENTATION_CONTEXT, _USER_INFORMATION})
_KNOWN_OF_CONTEXT = frozenset({_ABSTRACT_SYNTAX, _TRANSFER_SYNTAX})
_KNOWN_OF_USER = frozenset(range(0x51, 0x59))
_CONTEXT_HEAD_BYTES = 4


class RequestError(Exception):
    """The request cannot be understood; the message says why, and quotes nothing of it."""


def readable_request(encoded: bytes) -> bytes:
    """The request without the items that the Standard does not know, or as it is.

    Raises:
        RequestError: the head of an item is cut off, or a presentation context names no abstract or no transfer syntax.
    """
    items = []
    for kind, content in _items(encoded[_ITEMS_AT:]):
        if kind == _PRESENTATION_CONTEXT:
            _check_context(content)
            content = content[:_CONTEXT_HEAD_BYTES] + _only(_KNOWN_OF_CONTEXT, content[_CONTEXT_HEAD_BYTES:])
        elif kind == _USER_INFORMATION:
            content = _only(_KNOWN_OF_USER, content)
        if kind in _KNOWN:
            items.append(_item(kind, content))
    body = encoded[6:_ITEMS_AT] + b"".join(items)
    return struct.pack(">BxL", encoded[0], len(body)) + body


def _check_context(content: bytes) -> None:
    kinds = [kind for kind, name in _items(content[_CONTEXT_HEAD_BYTES:]) if name]
    for kind, name in ((_ABSTRACT_SYNTAX, "abstract"), (_TRANSFER_SYNTAX, "transfer")):
        if kind not in kinds:
            raise RequestError(f"a presentation context without {name} syntax")


def _only(known: frozenset[int], encoded: bytes) -> bytes:
    """The items of these kinds."""
    return b"".join(_item(kind, content) for kind, content in _items(encoded) if kind in known)


def _items(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each. One that says to be longer than what holds it ends there, as for pynetdicom."""
    at = 0
    while at < len(encoded):
        if at + _HEAD.size > len(encoded):
            raise RequestError("an item is cut off")
        kind, length = _HEAD.unpack_from(encoded, at)
        at += _HEAD.size
        yield kind, encoded[at : at + length]
        at += length


def _item(kind: int, content: bytes) -> bytes:
    return _HEAD.pack(kind, len(content)) + content
