"""Frames of a Segmentation: which there are, their pixels, and their functional groups, as bytes.

highdicom builds a Dataset for each frame and looks at every voxel for each segment, which is most of its time.
Here the marked part is cropped out once, and functional groups are packed straight into Explicit VR Little Endian. All
else of a Segmentation is still highdicom's (`seg.py`), and the tests hold these frames against its own.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from highdicom.frame import encode_frame
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from node import codes
from node.encode.source import Source

Labels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Marked:
    """The marked part of a mask: `labels`, uint8 `(Z, Y, X)`, whose first voxel is `corner` `(z, y, x)` of the mask."""

    labels: Labels
    corner: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plane with a voxel of segment `number`; in a label map of any, `number` is 0. z: index in the volume."""

    number: int
    z: int


def marked_part(mask: Labels) -> Marked | None:
    """The smallest box with every marked voxel of `mask` `(Z, Y, X)`; None if none is."""
    if not mask.size:
        return None
    # The maximum of bytes runs at the speed of memory; `any` is ten times slower.
    planes = np.flatnonzero(mask.reshape(len(mask), -1).max(axis=1))
    if not planes.size:
        return None
    z = slice(planes[0], planes[-1] + 1)
    flat = mask[z].max(axis=0)
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    y, x = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return Marked(labels=mask[z, y, x], corner=(int(z.start), int(y.start), int(x.start)))


def renumbered(marked: Marked, labels: Sequence[int]) -> Marked:
    """The same with 1, 2, .. for these labels, as segments are numbered, and 0 for all others."""
    numbers = np.zeros(256, np.uint8)
    numbers[list(labels)] = range(1, len(labels) + 1)
    return Marked(labels=numbers[marked.labels], corner=marked.corner)


def find_frames(marked: Marked, numbers: Iterable[int], source: Source) -> list[Frame]:
    """The frames of these segments, one segment after the other; of all in one for number 0.

    Interpolated slices have none: there is no Instance they could lie on.
    """
    first = marked.corner[0]
    planes = [z for z in range(first, first + len(marked.labels)) if not source.slices[z].is_interpolated]
    planes = _in_order(planes, source)
    frames = []
    for number in numbers:
        present = np.any(marked.labels == number if number else marked.labels, axis=(1, 2))
        frames += [Frame(number=number, z=z) for z in planes if present[z - first]]
    return frames


def _in_order(planes: Iterable[int], source: Source) -> list[int]:
    """Z indices in the order highdicom gives them: by their place along minus the normal of the slices."""
    row, column = np.reshape(source.orientation, (2, 3))
    backwards = np.cross(column, row)
    return sorted(planes, key=lambda z: float(backwards @ np.asarray(source.slices[z].position_lps_mm)))


def binary_pixels(frames: Sequence[Frame], marked: Marked, shape: tuple[int, int]) -> bytes:
    """Frames of `shape` `(Y, X)` as bits, without gaps, the first voxel in the lowest bit. Reference: PS3.5 8.1.1."""
    packed = []
    eight = np.zeros((8, *shape), bool)  # eight frames fill whole bytes, whatever their shape
    box = eight[(slice(None), *_place(marked))]
    for start in range(0, len(frames), 8):
        part = frames[start : start + 8]
        for i, frame in enumerate(part):
            box[i] = marked.labels[frame.z - marked.corner[0]] == frame.number
        packed.append(np.packbits(eight[: len(part)], bitorder="little").tobytes())
    pixels = b"".join(packed)
    return pixels + b"\0" * (len(pixels) % 2)


def label_pixels(frames: Sequence[Frame], marked: Marked, shape: tuple[int, int], syntax: str) -> bytes:
    """Frames of `shape` `(Y, X)` with a segment number in each byte, as Pixel Data in this transfer syntax."""
    plane = np.zeros(shape, np.uint8)
    box = plane[_place(marked)]
    encoded = []
    for frame in frames:
        box[:] = marked.labels[frame.z - marked.corner[0]]
        is_native = syntax == ExplicitVRLittleEndian
        encoded.append(plane.tobytes() if is_native else encode_frame(plane, syntax, 8, 8, "MONOCHROME2"))
    if syntax != ExplicitVRLittleEndian:
        return encapsulate(encoded)
    pixels = b"".join(encoded)
    return pixels + b"\0" * (len(pixels) % 2)


def _place(marked: Marked) -> tuple[slice, slice]:
    _, y, x = marked.corner
    return slice(y, y + marked.labels.shape[1]), slice(x, x + marked.labels.shape[2])


# ---- functional groups ----

# PS3.5 7.1.2: its length has four bytes, after two that are reserved; that of all others that occur here has two.
_LONG_VRS = (b"SQ",)


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    """A data element in Explicit VR Little Endian. Reference: PS3.5 7.1.2."""
    if len(value) % 2:
        value += b"\0" if vr == b"UI" else b" "
    length = struct.pack("<2xI" if vr in _LONG_VRS else "<H", len(value))
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + length + value


def items(*contents: bytes) -> bytes:
    """The value of a sequence whose items hold these elements. Reference: PS3.5 7.5."""
    return b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(content)) + content for content in contents)


def sequence(tag: int, *contents: bytes) -> bytes:
    """A sequence with these items."""
    return element(tag, b"SQ", items(*contents))


def _code(code: Code) -> bytes:
    return (
        element(0x00080100, b"SH", code.value.encode())
        + element(0x00080102, b"SH", code.scheme_designator.encode())
        + element(0x00080104, b"LO", code.meaning.encode())
    )


def functional_groups(frames: Sequence[Frame], num_segments: int, source: Source) -> list[bytes]:
    """Items of the Per-Frame Functional Groups Sequence.

    Frames are indexed by segment, unless they are a label map's, and place. Which segment a frame shows stands in the
    shared groups when there is only one.
    """
    planes = _in_order({frame.z for frame in frames}, source)
    ranks = {z: rank for rank, z in enumerate(planes, start=1)}
    derivations = {z: _derivation(source, z) for z in planes}
    positions = {z: _position(source, z) for z in planes}
    groups = []
    for frame in frames:
        index = (frame.number, ranks[frame.z]) if frame.number else (ranks[frame.z],)
        content = sequence(0x00209111, element(0x00209157, b"UL", struct.pack(f"<{len(index)}I", *index)))
        segment = b""
        if frame.number and num_segments > 1:
            segment = sequence(0x0062000A, element(0x0062000B, b"US", struct.pack("<H", frame.number)))
        groups.append(derivations[frame.z] + content + positions[frame.z] + segment)
    return groups


def _position(source: Source, z: int) -> bytes:
    text = "\\".join(source.position_texts(z))
    return sequence(0x00209113, element(0x00200032, b"DS", text.encode()))


def _derivation(source: Source, z: int) -> bytes:
    """From which Instance, and which of its frames, the frame was made."""
    origin = source.slices[z]
    reference = element(0x00081150, b"UI", source.sop_class_uid.encode())
    reference += element(0x00081155, b"UI", origin.sop_instance_uid.encode())
    if source.is_multi_frame:
        reference += element(0x00081160, b"IS", str(origin.frame_number).encode())
    reference += element(0x0028135A, b"CS", b"YES")
    reference += sequence(0x0040A170, _code(codes.SOURCE_IMAGE))
    return sequence(
        0x00089124, sequence(0x00082112, reference) + sequence(0x00089215, _code(codes.SEGMENTATION_DERIVATION))
    )


def references(frames: Sequence[Frame], source: Source) -> list[bytes]:
    """References to each Instance the frames were made from."""
    uids = dict.fromkeys(source.slices[z].sop_instance_uid for z in sorted({frame.z for frame in frames}))
    sop_class = element(0x00081150, b"UI", source.sop_class_uid.encode())
    return [sop_class + element(0x00081155, b"UI", uid.encode()) for uid in uids]


def referenced_series(frames: Sequence[Frame], source: Source) -> bytes:
    """The same, as the item of the Referenced Series Sequence."""
    series_instance_uid = element(0x0020000E, b"UI", str(source.header.SeriesInstanceUID).encode())
    return sequence(0x0008114A, *references(frames, source)) + series_instance_uid
