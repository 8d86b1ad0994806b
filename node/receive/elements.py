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
# The head of an element says how the whole is encoded; that of an item is as of implicit VR.
_IMPLICIT, _EXPLICIT, _EXPLICIT_BIG = struct.Struct("<HHL"), struct.Struct("<HH2sH"), struct.Struct(">HH2sH")
_ITEM_BIG = struct.Struct(">HHL")
_LENGTH, _LENGTH_BIG = struct.Struct("<L"), struct.Struct(">L")
_UNDEFINED_LENGTH = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00008
"""The first tag that pixel data may have, as floats; in front of it in their group are lengths and offsets only."""
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 16


class _OddError(Exception):
    """It is not plainly written."""


@dataclass(frozen=True, kw_only=True)
class Elements:
    """places: of each wanted element that is there: where it begins, where its value begins, and where that ends.

    pixels_at: where the value of the pixel data begins. num_pixel_bytes: its length, of which 0xFFFFFFFF means that a
    delimiter ends it; None if the bytes end with the last element before the pixel data.
    """

    form: struct.Struct
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

    def number(self, tag: int) -> int:
        """The value of an element of VR US; 0 if it is none."""
        value = self.value(tag)
        return int.from_bytes(value, "little" if self.form is not _EXPLICIT_BIG else "big") if len(value) == 2 else 0

    def num_items(self, tag: int) -> int | None:
        """How many items a sequence has, 0 if it is not there; None if it is not plainly written."""
        _, at, end = self.places.get(tag, (0, 0, 0))
        head, num = _head_of_item(self.form), 0
        try:
            while at < end:
                group, element, length = head.unpack_from(self.encoded, at)
                at += 8
                if group << 16 | element == _END_OF_SEQUENCE:
                    return num
                if group << 16 | element != _ITEM:
                    return None
                num += 1
                is_open = length == _UNDEFINED_LENGTH
                at = _end_of_item(self.encoded, at, self.form, _MAX_DEPTH) if is_open else at + length
        except (struct.error, _OddError):
            return None
        return num if at == end else None


def find_elements(
    encoded: bytes,
    wanted: Container[int],
    *,
    is_implicit: bool,
    is_little_endian: bool = True,
    sequences: Container[int] = (),
) -> Elements | None:
    """The elements in front of the pixel data; None if they are not plainly written or one is cut.

    encoded: the beginning of a dataset, or File Meta Information. sequences: of the wanted elements, those that may be
    of undefined length; their value ends with the delimiter then.
    """
    form = (_IMPLICIT if is_implicit else _EXPLICIT) if is_little_endian else _EXPLICIT_BIG
    try:
        if is_implicit and encoded[4:6].isalpha():  # where pydicom, too, takes it for Explicit VR
            return None
        places: dict[int, tuple[int, int, int]] = {}
        at = 0
        while at != len(encoded):
            tag, value_at, length = _head(encoded, at, form)
            if tag >= PIXEL_DATA:
                if tag >> 16 != PIXEL_DATA >> 16:
                    return None
                return Elements(form=form, encoded=encoded, places=places, pixels_at=value_at, num_pixel_bytes=length)
            if length == _UNDEFINED_LENGTH:
                if tag in wanted and tag not in sequences:
                    return None
                end = _end_of_sequence(encoded, value_at, form, _MAX_DEPTH)
            else:
                end = value_at + length
            if tag in wanted:
                places[tag] = at, value_at, end
            at = end
        return Elements(form=form, encoded=encoded, places=places, pixels_at=at, num_pixel_bytes=None)
    except (struct.error, _OddError):
        return None


def _head(encoded: bytes, at: int, form: struct.Struct) -> tuple[int, int, int]:
    """Tag of the element there, where its value begins, and its length."""
    if form is _IMPLICIT:
        group, element, length = form.unpack_from(encoded, at)
        return group << 16 | element, at + 8, length
    group, element, vr, length = form.unpack_from(encoded, at)
    if vr in _SHORT_VRS:
        return group << 16 | element, at + 8, length
    if vr in _LONG_VRS:
        (length,) = (_LENGTH if form is _EXPLICIT else _LENGTH_BIG).unpack_from(encoded, at + 8)
        return group << 16 | element, at + 12, length
    raise _OddError


def _head_of_item(form: struct.Struct) -> struct.Struct:
    return _ITEM_BIG if form is _EXPLICIT_BIG else _IMPLICIT


def _end_of_sequence(encoded: bytes, at: int, form: struct.Struct, depth: int) -> int:
    """Behind the delimiter of a sequence of undefined length whose value begins there."""
    head = _head_of_item(form)
    while True:
        group, element, length = head.unpack_from(encoded, at)
        tag, at = group << 16 | element, at + 8
        if tag == _END_OF_SEQUENCE:
            return at
        if tag != _ITEM or depth == 0:
            raise _OddError
        at = _end_of_item(encoded, at, form, depth) if length == _UNDEFINED_LENGTH else at + length


def _end_of_item(encoded: bytes, at: int, form: struct.Struct, depth: int) -> int:
    """Behind the delimiter of an item of undefined length."""
    head = _head_of_item(form)
    while True:
        group, element, length = head.unpack_from(encoded, at)
        if group << 16 | element == _END_OF_ITEM:
            return at + 8
        _, value_at, length = _head(encoded, at, form)
        is_open = length == _UNDEFINED_LENGTH
        at = _end_of_sequence(encoded, value_at, form, depth - 1) if is_open else value_at + length
