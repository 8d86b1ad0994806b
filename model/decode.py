"""Voxels of one CT Instance: stored pixels to Hounsfield units.

Knows one Instance at a time and nothing of Series, order or geometry. Called by `model.series.read_series`.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError  # noqa: N812 - a class, named like one

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.utils import pixel_array
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

AIR_HU = -1024
"""What padding, and anything below it, becomes: nothing physical lies under -1000 HU, vendors store -2000 or -3024."""

PIXEL_TAGS: list[BaseTag] = [
    Tag(keyword)
    for keyword in (
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "PlanarConfiguration",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "PixelPaddingValue",
        "PixelPaddingRangeLimit",
        "ExtendedOffsetTable",
        "ExtendedOffsetTableLengths",
        "PixelData",
    )
]
"""What decoding needs of a dataset, for `dcmread(specific_tags=...)`."""

_RAW_SYNTAXES = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian}
# What a damaged or very old header leaves out, as CT has it (PS3.3 C.8.2.1); pydicom decodes nothing without them.
_USUAL = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0}
# pydicom takes the first that works, which is GDCM: of damaged JPEG 2000 it aborts the process, and of JPEG-LS it is
# slower.
_PLUGINS = {
    JPEGBaseline8Bit: "pillow",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
}
PARSE_ERRORS = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    LookupError,
    NotImplementedError,
    StructError,
    TypeError,
    ValueError,
    zlib.error,
)
"""What pydicom raises on damaged datasets, when it reads them or when a value is first asked for (found by fuzzing)."""


class DecodeError(Exception):
    """One Instance cannot be read or decoded; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class FrameJob:
    """One frame to decode. index: the caller's own number for it. label: how messages name its Instance."""

    index: int
    label: str
    path: Path
    frame_number: int
    slope: float
    intercept: float


def read_instance(path: Path, tags: list[BaseTag]) -> pydicom.Dataset | None:
    """The tags of a DICOM file (file meta always included); None when the file is not DICOM.

    Raises:
        DecodeError: it is DICOM, but damaged.
        OSError: the file cannot be opened.
    """
    try:
        ds = pydicom.dcmread(path, specific_tags=list(tags))
        for keyword, value in _USUAL.items():
            if ds.get(keyword) in (None, ""):
                setattr(ds, keyword, value)
        if ds.get("BitsStored") is None and ds.get("BitsAllocated"):
            ds.BitsStored = ds.BitsAllocated
        return ds
    except InvalidDicomError:
        return None
    except PARSE_ERRORS as error:
        raise DecodeError(f"File {path} is damaged and cannot be read ({error}). Send the Instance again.") from error


def needs_codec(ds: pydicom.Dataset) -> bool:
    """Whether the pixels are compressed; anything odd is not, and is refused when it is decoded."""
    syntax = _transfer_syntax(ds)
    return syntax.is_transfer_syntax and syntax.is_compressed


def decoding_plugin(transfer_syntax_uid: str) -> str:
    """Which of pydicom's decoders to ask, by its name; "" leaves it to pydicom."""
    return _PLUGINS.get(UID(transfer_syntax_uid), "")


def decode_frame(ds: pydicom.Dataset, job: FrameJob) -> NDArray[np.int16]:
    """`frame_hu` of the job.

    Raises:
        DecodeError: as `frame_hu`, with the label.
    """
    try:
        return frame_hu(ds, job.frame_number, job.slope, job.intercept)
    except DecodeError as error:
        raise DecodeError(f"{job.label}: {error}") from error


def frame_hu(ds: pydicom.Dataset, frame_number: int, slope: float, intercept: float) -> NDArray[np.int16]:
    """Hounsfield units `(Y, X)`, int16, of one frame (1-based); padding is `AIR_HU`, fractions are rounded.

    PhotometricInterpretation MONOCHROME1 changes nothing: it inverts the display, not the rescaled value.
    Reference: PS3.3 C.7.5.1.1.2 (padding), C.8.2.1 (rescale), C.7.6.3.1.2 (photometric interpretation).

    Raises:
        DecodeError: pixels missing, cut short, or in a syntax no codec here can decode.
    """
    try:
        return _frame_hu(ds, frame_number, slope, intercept)
    except (*PARSE_ERRORS, RuntimeError) as error:  # codecs raise RuntimeError
        syntax = _transfer_syntax(ds)
        why = " ".join(str(error).split())
        raise DecodeError(
            f"its pixels cannot be decoded from transfer syntax {syntax.name or '(missing)'} ({why})"
        ) from error


def _frame_hu(ds: pydicom.Dataset, frame_number: int, slope: float, intercept: float) -> NDArray[np.int16]:
    """`frame_hu`, with whatever pydicom raises."""
    stored = _stored_frame(ds, frame_number)
    padding = _padding_mask(ds, stored)
    # BitsStored bits up to HighBit count; shifting up and down again masks them, and extends the sign (PS3.5 8.1.1).
    num_bits = stored.dtype.itemsize * 8
    bits_stored = int(ds.get("BitsStored") or num_bits)
    high_bit = int(ds.get("HighBit") or 0) if _keeps_cells(ds) else 0
    unused_above = num_bits - 1 - max(high_bit, bits_stored - 1)
    unused_bits = num_bits - bits_stored
    if unused_bits > 0:
        stored = (stored << max(unused_above, 0)) >> unused_bits
    if slope == 1 and float(intercept).is_integer():
        hu = np.add(stored, int(intercept), dtype=np.int32)
    else:
        hu = np.rint(stored * np.float32(slope) + np.float32(intercept))
    clipped: NDArray[np.int16] = np.clip(hu, AIR_HU, np.iinfo(np.int16).max, out=hu).astype(np.int16)
    if padding is not None:
        clipped[padding] = AIR_HU
    return clipped


def _transfer_syntax(ds: pydicom.Dataset) -> UID:
    return UID(str(ds.file_meta.get("TransferSyntaxUID", "")))


def _keeps_cells(ds: pydicom.Dataset) -> bool:
    """Whether pixels decode to the cells they were stored in; JPEG and its kin put the value in the low bits."""
    return not _transfer_syntax(ds).is_encapsulated or _transfer_syntax(ds) == RLELossless


def _stored_frame(ds: pydicom.Dataset, frame_number: int) -> NDArray[np.integer]:
    """Stored values `(Y, X)` of one frame (1-based), before any rescaling; a read-only view where it can be."""
    rows, columns = int(ds.Rows), int(ds.Columns)
    syntax = _transfer_syntax(ds)
    if "PixelData" not in ds:
        raise DecodeError("it has no PixelData")
    if syntax in _RAW_SYNTAXES and ds.get("BitsAllocated") == 16 and ds.get("SamplesPerPixel", 1) == 1:
        frame_bytes = rows * columns * 2
        if len(ds.PixelData) < frame_bytes * frame_number:
            raise DecodeError(
                f"its PixelData is cut short: {len(ds.PixelData)} bytes, expected {frame_bytes * frame_number}"
            )
        dtype = "<i2" if ds.get("PixelRepresentation") == 1 else "<u2"
        offset = frame_bytes * (frame_number - 1)
        return np.frombuffer(ds.PixelData, dtype, count=rows * columns, offset=offset).reshape(rows, columns)
    stored: NDArray[np.integer] = pixel_array(
        ds, index=frame_number - 1, raw=True, decoding_plugin=decoding_plugin(syntax), correct_unused_bits=False
    )
    if stored.shape != (rows, columns):
        raise DecodeError(f"its pixels decode to shape {stored.shape}, expected {(rows, columns)}")
    return stored


def _padding_mask(ds: pydicom.Dataset, stored: NDArray[np.integer]) -> NDArray[np.bool_] | None:
    """Where `stored` is padding; None when the Instance declares none.

    The declared value is wrapped to the type of the cells: some writers give -2000 as 63536.
    """
    value, limit = ds.get("PixelPaddingValue"), ds.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    first = np.array(int(value)).astype(stored.dtype)
    second = np.array(int(value if limit is None else limit)).astype(stored.dtype)
    mask: NDArray[np.bool_] = stored == first
    if limit is not None:
        mask = (stored >= min(first, second)) & (stored <= max(first, second))
    return mask
