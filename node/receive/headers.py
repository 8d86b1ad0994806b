"""What the node needs to know of an Instance, read from the beginning of its dataset; what is no CT is refused.

Most attributes are the same in all slices of a Series, and turning bytes into values is what costs: the values of the
last slice are taken again for the bytes that have not changed; then pydicom is not asked at all.
"""

import math
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from model import HEADER_TAGS, PARSE_ERRORS, slice_headers
from node.receive.attributes import SERIES_TAGS, series_attributes
from node.receive.elements import PIXEL_DATA, Elements, find_elements
from node.receive.status import CANNOT_UNDERSTAND, MISMATCH, RefusedError

NUM_PREFIX_BYTES = 128 * 1024
"""How much of a dataset is kept in memory to be read here; longer headers are read from the file."""

_TAGS: list[BaseTag | int] = [*HEADER_TAGS, *SERIES_TAGS.values()]
# Plain numbers, since pydicom's tags are slow to compare.
_TAGS_TO_FIND = frozenset(int(tag) for tag in _TAGS)
_SINGLE_SLICE_TAGS = tuple(int(Tag(k)) for k in ("SOPInstanceUID", "ImagePositionPatient", "InstanceNumber"))
_SERIES_WIDE_TAGS = tuple(_TAGS_TO_FIND.difference(_SINGLE_SLICE_TAGS))
_PER_FRAME = int(Tag("PerFrameFunctionalGroupsSequence"))
_FRAME_TAGS = {_PER_FRAME, int(Tag("SharedFunctionalGroupsSequence"))}
_NUMBER_OF_FRAMES, _ROWS, _COLUMNS = (int(Tag(keyword)) for keyword in ("NumberOfFrames", "Rows", "Columns"))
_TAGS_THAT_COUNT = frozenset({_PER_FRAME, _NUMBER_OF_FRAMES, _ROWS, _COLUMNS})
_UNDEFINED_LENGTH = 0xFFFFFFFF
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"
_MAX_HEADER_BYTES = 64 * 2**20  # Enhanced CT of a thousand frames has some 5 MB
_MAX_FRAMES = 50_000  # of an Instance; a minute of a beating heart in 320 slices has half of that
_FRAGMENT_HEAD_BYTES = 8  # each frame that is encapsulated has a fragment at least (PS3.5 A.4)
_INFLATED_BYTES = 2**20  # at a time
_NUM_SERIES_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class Announced:
    """What is said of a dataset before it follows: by the C-STORE request and its presentation context, or by STOW-RS.

    study_instance_uid: of the Study it must belong to, "" for any.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    study_instance_uid: str = ""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A dataset on disk. prefix: its first `NUM_PREFIX_BYTES`. path: its file, from offset `start` in it."""

    prefix: bytes
    num_bytes: int
    path: Path
    start: int


@dataclass(frozen=True, kw_only=True)
class Headers:
    """headers: `SliceHeader.to_dict()` of every frame. attributes: what counts for the whole Series."""

    headers: list[dict[str, Any]]
    attributes: dict[str, Any]


class HeaderReader:
    """Reads headers; remembers those of the latest Series. Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], Headers] = OrderedDict()  # by the bytes of what is Series-wide

    def read(self, encoded: Encoded, announced: Announced) -> Headers:
        """The headers of the Instance.

        Raises:
            RefusedError: it is not CT, not what was announced, incomplete, or lacks a UID.
            Exception: the dataset cannot be parsed; pydicom has no one error for that.
        """
        elements = _find(encoded, announced.transfer_syntax_uid)
        key = _series_wide(elements, announced) if elements else None
        known = self._known.get(key) if key else None
        if known is not None and elements and (like := _like(known, elements, announced)) is not None:
            _check_whole(encoded, elements.pixels_at, elements.num_pixel_bytes or 0)
            return like
        try:
            ds = _read(encoded, announced.transfer_syntax_uid)
        except OSError as error:
            if error.errno is None:  # pydicom's, for a sequence that breaks off; the disk's have a number
                raise RefusedError(CANNOT_UNDERSTAND, "the dataset cannot be parsed") from error
            raise
        _check(ds, announced)
        _check_frames_read(ds)
        headers = slice_headers(ds)
        if not headers:
            raise RefusedError(CANNOT_UNDERSTAND, "the Instance has no frames")
        read = Headers(headers=[header.to_dict() for header in headers], attributes=series_attributes(ds))
        if key:
            self._known[key] = read
            if len(self._known) > _NUM_SERIES_KEPT:
                self._known.popitem(last=False)
        return read


def is_uid(value: object) -> bool:
    """Whether the value has the form of a UID (PS3.5 9.1): safe as a file name. Leading zeros are let pass."""
    return len(str(value)) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", str(value)) is not None


def _find(encoded: Encoded, transfer_syntax_uid: str) -> Elements | None:
    """Where the attributes we need lie; None if that is for pydicom to find out, or there are frames (Enhanced CT)."""
    if transfer_syntax_uid in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
        return None
    is_implicit = transfer_syntax_uid == ImplicitVRLittleEndian
    found = find_elements(encoded.prefix, _TAGS_TO_FIND, is_implicit=is_implicit)
    if found is None or found.num_pixel_bytes is None or _FRAME_TAGS & found.places.keys():
        return None
    return found


def _series_wide(elements: Elements, announced: Announced) -> tuple[Any, ...]:
    """The bytes of what a whole Series shares."""
    return announced.sop_class_uid, announced.transfer_syntax_uid, *map(elements.whole, _SERIES_WIDE_TAGS)


def _like(known: Headers, elements: Elements, announced: Announced) -> Headers | None:
    """The headers of an Instance that shares with a known one all but what a slice has for itself.

    None if that is not plainly written: then the whole is read, which knows what to make of it.
    """
    uid, position, number = (elements.value(tag).decode("ascii", "replace").rstrip("\0 ") for tag in _SINGLE_SLICE_TAGS)
    try:
        position_lps_mm = tuple(float(value) for value in position.split("\\"))
        instance_number = int(number)
    except ValueError:
        return None
    if uid != announced.sop_instance_uid or len(position_lps_mm) != 3 or not all(map(math.isfinite, position_lps_mm)):
        return None
    single = {"sop_instance_uid": uid, "position_lps_mm": position_lps_mm, "instance_number": instance_number}
    return Headers(headers=[known.headers[0] | single], attributes=known.attributes)


def _check(ds: Dataset, announced: Announced) -> None:
    # RSNA's files lack SOPClassUID and Modality: what is missing comes from the request, what differs is refused.
    _check_announced(ds, "SOPClassUID", announced.sop_class_uid)
    _check_announced(ds, "SOPInstanceUID", announced.sop_instance_uid)
    modality = ds.get("Modality") or "CT"
    if modality != "CT":
        raise RefusedError(MISMATCH, f"Modality is {modality!r:.20}; only CT is taken")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        if not is_uid(ds.get(keyword, "")):
            raise RefusedError(CANNOT_UNDERSTAND, f"{keyword} is missing or not a UID (PS3.5 9.1)")


def _check_announced(ds: Dataset, keyword: str, announced: str) -> None:
    if ds.get(keyword, announced) != announced:
        raise RefusedError(MISMATCH, f"{keyword} in the dataset is not the announced one")
    setattr(ds, keyword, announced)


def _read(encoded: Encoded, transfer_syntax_uid: str) -> Dataset:
    """The attributes we need of a dataset that is all there.

    Raises:
        RefusedError: it ends before its pixel data do, or they begin too far back, or it has frames for which there is
            no room.
        zlib.error: it is deflated, and damaged.
    """
    syntax = UID(transfer_syntax_uid)
    is_deflated, is_implicit = syntax.is_deflated, syntax.is_implicit_VR
    for beginning, is_last in _beginnings(encoded):
        if is_deflated:
            beginning = zlib.decompressobj(-zlib.MAX_WBITS).decompress(beginning, _MAX_HEADER_BYTES)
        length = None

        def is_pixel_data(tag: BaseTag, _: str | None, value_length: int) -> bool:
            nonlocal length
            is_it = int(tag) >= PIXEL_DATA
            length = value_length if is_it else None
            return is_it

        _check_frames(beginning, encoded, syntax, is_last=is_last)
        file = BytesIO(beginning)
        try:
            ds = read_dataset(file, is_implicit, syntax.is_little_endian, stop_when=is_pixel_data, specific_tags=_TAGS)
        except (OSError, *PARSE_ERRORS):
            if is_last:
                raise
            continue  # it was cut in the middle of a sequence of undefined length
        if length is not None:
            value_at = file.tell() + (8 if is_implicit else 12)
            if is_deflated:
                _check_inflates(encoded, value_at + (0 if length == _UNDEFINED_LENGTH else length))
            else:
                _check_whole(encoded, value_at, length)
            return ds
    raise RefusedError(CANNOT_UNDERSTAND, "the dataset ends before its pixel data")


def _check_frames(beginning: bytes, encoded: Encoded, syntax: UID, *, is_last: bool) -> None:
    """Refuses frames that there cannot be, before an object is made of each: of empty ones 8 bytes are enough.

    What is not plainly written here, `_check_frames_read` sees to.
    """
    found = find_elements(
        beginning,
        _TAGS_THAT_COUNT,
        is_implicit=syntax.is_implicit_VR,
        is_little_endian=syntax.is_little_endian,
        sequences={_PER_FRAME},
    )
    if found is None or not (num_items := found.num_items(_PER_FRAME)):
        return
    _check_num_frames(num_items, found.value(_NUMBER_OF_FRAMES).decode("ascii", "replace"))
    if found.num_pixel_bytes is None and not is_last:  # it was cut just in front of them
        return
    if syntax.is_encapsulated or found.num_pixel_bytes == _UNDEFINED_LENGTH:
        num_pixel_bytes, num_frame_bytes = encoded.num_bytes, _FRAGMENT_HEAD_BYTES
    else:
        num_pixel_bytes, num_frame_bytes = found.num_pixel_bytes or 0, found.number(_ROWS) * found.number(_COLUMNS)
    if num_items * max(num_frame_bytes, 1) > num_pixel_bytes:
        raise RefusedError(CANNOT_UNDERSTAND, f"{num_items} frames are more than the pixel data can hold")


def _check_frames_read(ds: Dataset) -> None:
    """As `_check_frames`, of what is read already."""
    try:
        num_items = len(ds.get("PerFrameFunctionalGroupsSequence") or ())
        number_of_frames = ds.get("NumberOfFrames")
    except PARSE_ERRORS:  # `slice_headers` reads no such frames either
        return
    if num_items:
        _check_num_frames(num_items, str(number_of_frames or ""))


def _check_num_frames(num_items: int, number_of_frames: str) -> None:
    """number_of_frames: "" if it is missing."""
    number = number_of_frames.strip(" \0")
    if num_items > _MAX_FRAMES:
        raise RefusedError(CANNOT_UNDERSTAND, f"{num_items} frames; an Instance may have {_MAX_FRAMES}")
    if number and number.lstrip("+0") != str(num_items):
        raise RefusedError(CANNOT_UNDERSTAND, f"NumberOfFrames is {number:.12}, and {num_items} are described")


def _beginnings(encoded: Encoded) -> Iterator[tuple[bytes, bool]]:
    """The prefix, enough for nearly all; then as much as a header may be long. With each, whether it is the last."""
    is_all = encoded.num_bytes <= len(encoded.prefix)
    yield encoded.prefix, is_all
    if not is_all:
        with encoded.path.open("rb") as file:
            file.seek(encoded.start)
            yield file.read(_MAX_HEADER_BYTES), True


def _check_whole(encoded: Encoded, value_at: int, length: int) -> None:
    """Refuses pixel data that are shorter than they say, or of undefined length and without an end."""
    if length != _UNDEFINED_LENGTH:
        is_whole = value_at + length <= encoded.num_bytes
    else:
        with encoded.path.open("rb") as file:
            file.seek(max(encoded.start + encoded.num_bytes - 512, encoded.start))
            is_whole = _SEQUENCE_DELIMITER in file.read()  # padding or signatures may follow
    if not is_whole:
        raise RefusedError(CANNOT_UNDERSTAND, "the pixel data are shorter than they say")


def _check_inflates(encoded: Encoded, num_bytes: int) -> None:
    """Refuses what is deflated if it breaks off, or holds less than these bytes or far more; nobody could read it.

    Raises:
        RefusedError: so it is.
        zlib.error: it is damaged.
    """
    inflating, num_inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with encoded.path.open("rb") as file:
        file.seek(encoded.start)
        while piece := inflating.unconsumed_tail or file.read(_INFLATED_BYTES):
            num_inflated += len(inflating.decompress(piece, _INFLATED_BYTES))
            if num_inflated > num_bytes + _MAX_HEADER_BYTES:  # what is left could fill the memory: it is not looked at
                raise RefusedError(CANNOT_UNDERSTAND, "the deflated dataset is far longer than it says")
            if inflating.eof:
                break
    num_inflated += len(inflating.flush())
    if not inflating.eof or num_inflated < num_bytes:
        raise RefusedError(CANNOT_UNDERSTAND, "the deflated dataset is shorter than it says, or damaged")
