"""Whether an Instance that came is the one that is here: byte for byte, or in another transfer syntax.

A PACS sends what it has in the transfer syntax that an association accepts, which may be another one the next time.
That costs decoding, so it is asked only when the bytes differ, and within bounds: what is beyond them is another
Instance. Asked by `store.py`, which holds no lock then.
"""

import time
from collections.abc import Iterator
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from model import PARSE_ERRORS
from node.receive.elements import find_elements

_COMPARED_BYTES = 2**20
_META_AT, _META_BYTES = 132, 65536
_TRANSFER_SYNTAX_UID = 0x00020010
_MAX_HEADER_BYTES = 2 * 2**20
_MAX_FRAME_BYTES = 8 * 2**20  # a codec keeps all other threads waiting for so long
_MAX_TIME_S = 20.0
_PIXEL_GROUP, _PADDING = 0x7FE0, 0xFFFCFFFC


def is_same(known: BinaryIO, received: BinaryIO) -> bool:
    """Whether two files hold the same Instance; the group 2 header may differ.

    Raises:
        OSError: they cannot be read.
    """
    if _has_same_bytes(known, received):
        return True
    syntaxes = [_transfer_syntax(file) for file in (known, received)]
    if syntaxes[0] == syntaxes[1] or DeflatedExplicitVRLittleEndian in syntaxes:  # who inflates knows no bound
        return False
    try:
        headers = [_header(file, syntax) for file, syntax in zip((known, received), syntaxes, strict=True)]
        if headers[0] != headers[1]:
            return False
        return _has_same_pixels(Path(known.name), Path(received.name))
    except OSError as error:
        if error.errno is not None:  # the disk's; pydicom's have no number
            raise
        return False
    except (*PARSE_ERRORS, RuntimeError, _BeyondError):  # codecs raise RuntimeError
        return False


class _BeyondError(Exception):
    """It would cost too much to say."""


def _has_same_bytes(*files: BinaryIO) -> bool:
    sizes = [_seek_dataset(file) for file in files]
    same = sizes[0] == sizes[1]
    while same and (piece := files[0].read(_COMPARED_BYTES)):
        same = piece == files[1].read(_COMPARED_BYTES)
    return same


def _seek_dataset(file: BinaryIO) -> int:
    """Goes behind the File Meta Information, whose length its first element gives (PS3.10 7.1); what follows, bytes."""
    file.seek(0)
    start = 144 + int.from_bytes(file.read(144)[140:], "little")
    return file.seek(0, 2) - file.seek(start)


def _transfer_syntax(file: BinaryIO) -> UID:
    _seek_dataset(file)
    end = file.tell()
    file.seek(_META_AT)
    meta = find_elements(file.read(min(end - _META_AT, _META_BYTES)), {_TRANSFER_SYNTAX_UID}, is_implicit=False)
    return UID(meta.value(_TRANSFER_SYNTAX_UID).decode("ascii", "replace").rstrip("\0 ") if meta else "")


def _header(file: BinaryIO, syntax: UID) -> bytes:
    """All elements but the pixel data, without what a transfer syntax implies, in one encoding.

    Raises:
        _BeyondError: it is long, or not plainly written.
    """
    _seek_dataset(file)
    is_implicit, is_little_endian = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    beginning = file.read(_MAX_HEADER_BYTES)
    found = find_elements(beginning, (), is_implicit=is_implicit, is_little_endian=is_little_endian)
    if found is None or found.num_pixel_bytes is None:
        raise _BeyondError
    ds = dcmread(Path(file.name), stop_before_pixels=True)
    _make_plain(ds)
    encoded = BytesIO()
    target = DicomIO(encoded)
    target.is_implicit_VR, target.is_little_endian = True, True
    write_dataset(target, ds)
    return encoded.getvalue()


def _make_plain(ds: Dataset) -> None:
    """Has it written as any other of the same content."""
    for element in list(ds):  # makes values of the bytes of each, whatever they were encoded in
        if element.tag.element == 0 or element.tag.group == _PIXEL_GROUP or element.tag == _PADDING:
            del ds[element.tag]
        elif element.VR == "SQ":
            element.is_undefined_length = False
            for item in element.value:
                item.is_undefined_length_sequence_item = False
                _make_plain(item)


def _has_same_pixels(*paths: Path) -> bool:
    """Decodes both, frame by frame.

    Raises:
        _BeyondError: they are large, or it takes long.
    """
    deadline = time.monotonic() + _MAX_TIME_S
    for one, other in zip_longest(*map(_frames, paths)):
        if one is None or other is None or one.dtype.newbyteorder("=") != other.dtype.newbyteorder("="):
            return False
        if not np.array_equal(one, other):
            return False
        if time.monotonic() > deadline:
            raise _BeyondError
    return True


def _frames(path: Path) -> Iterator[NDArray[Any]]:
    ds = dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns", "BitsAllocated", "SamplesPerPixel"])
    if ds.Rows * ds.Columns * ds.get("SamplesPerPixel", 1) * ds.BitsAllocated // 8 > _MAX_FRAME_BYTES:
        raise _BeyondError
    yield from iter_pixels(path, raw=True)
