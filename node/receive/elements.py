"""Where the top-level elements of an encoded dataset lie, found by their lengths alone: no value is read.

pydicom makes an object of each element that it keeps, which for a CT slice is ten times the work. What is not plainly
written (another encoding than announced, a sequence without end) is left to pydicom, by `None`.

Reference: PS3.5 7.1 (elements), 7.5 (sequences).
"""

import struct
from collections.abc import Container
from dataclasses import dataclass

from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STANDARD_VR

_LONG_VRS = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
_SHORT_VRS = frozenset(vr.encode() for vr in STANDARD_VR) - _LONG_VRS
_EXPLICIT, _IMPLICIT, _LENGTH = struct.Struct("<HH2sH"), struct.Struct("<HHL"), struct.Struct("<L")
_UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_GROUP = 0x7FE0
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 16


class _OddError(Exception):
    """It is not plainly written."""


@dataclass(frozen=True, kw_only=True)
class Elements:
    """places: of each wanted element that is there: where it begins, where its value begins, and where that ends.

    pixels_at: where the value of the first element of the pixel data's group begins. num_pixel_bytes: its length, of
    which 0xFFFFFFFF means that a delimiter ends it; None if the bytes end with the last element before that group.
    """

    encoded: bytes
    places: dict[int, tuple[int, int, int]]
    pixels_at: int
    num_pixel_bytes: int | None

    def value(self, tag: int) -> bytes:
        """As it is encoded; empty if it is not there."""
        _, begin, end = self.places.get(tag, (0, 0, 0))
        return self.encoded[begin:end]

    def whole(self, tag: int) -> bytes:
        """Tag, VR, length and value as they are encoded; empty if it is not there."""
        begin, _, end = self.places.get(tag, (0, 0, 0))
        return self.encoded[begin:end]


def find_elements(encoded: bytes, wanted: Container[int], *, is_implicit: bool) -> Elements | None:
    """The elements in front of the pixel data, of Little Endian; None if they are not plainly written or one is cut.

    encoded: the beginning of a dataset, or File Meta Information.
    """
    try:
        if is_implicit and encoded[4:6].isalpha():  # where pydicom, too, takes it for Explicit VR
            return None
        places: dict[int, tuple[int, int, int]] = {}
        at = 0
        while at != len(encoded):
            tag, value_at, length = _head(encoded, at, is_implicit)
            if tag >> 16 >= _PIXEL_GROUP:
                if tag >> 16 != _PIXEL_GROUP:
                    return None
                return Elements(encoded=encoded, places=places, pixels_at=value_at, num_pixel_bytes=length)
            if length == _UNDEFINED_LENGTH:
                if tag in wanted:
                    return None
                at = _end_of_sequence(encoded, value_at, is_implicit, _MAX_DEPTH)
                continue
            end = value_at + length
            if tag in wanted:
                places[tag] = at, value_at, end
            at = end
        return Elements(encoded=encoded, places=places, pixels_at=at, num_pixel_bytes=None)
    except (struct.error, _OddError):
        return None


def _head(encoded: bytes, at: int, is_implicit: bool) -> tuple[int, int, int]:
    """Tag of the element there, where its value begins, and its length."""
    if is_implicit:
        group, element, length = _IMPLICIT.unpack_from(encoded, at)
        return group << 16 | element, at + 8, length
    group, element, vr, length = _EXPLICIT.unpack_from(encoded, at)
    if vr in _SHORT_VRS:
        return group << 16 | element, at + 8, length
    if vr in _LONG_VRS:
        return group << 16 | element, at + 12, _LENGTH.unpack_from(encoded, at + 8)[0]
    raise _OddError


def _end_of_sequence(encoded: bytes, at: int, is_implicit: bool, depth: int) -> int:
    """Behind the delimiter of a sequence of undefined length whose value begins there."""
    while True:
        group, element, length = _IMPLICIT.unpack_from(encoded, at)
        tag, at = group << 16 | element, at + 8
        if tag == _END_OF_SEQUENCE:
            return at
        if tag != _ITEM or depth == 0:
            raise _OddError
        at = _end_of_item(encoded, at, is_implicit, depth) if length == _UNDEFINED_LENGTH else at + length


def _end_of_item(encoded: bytes, at: int, is_implicit: bool, depth: int) -> int:
    """Behind the delimiter of an item of undefined length."""
    while True:
        group, element, length = _IMPLICIT.unpack_from(encoded, at)
        if group << 16 | element == _END_OF_ITEM:
            return at + 8
        _, value_at, length = _head(encoded, at, is_implicit)
        is_open = length == _UNDEFINED_LENGTH
        at = _end_of_sequence(encoded, value_at, is_implicit, depth - 1) if is_open else value_at + length
