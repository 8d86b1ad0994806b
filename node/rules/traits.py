"""What rules can ask of a Series, from its slices' headers and one of its Instances.

Geometry and ImageType come from all slices, so that a scout among them decides nothing; the rest is read from the file
of one typical slice when it is needed. None of it is kept or logged: a description may hold anything.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag

from model import PARSE_ERRORS, SliceHeader
from node.rules.kernels import kernel_type

_KEYWORDS = (
    "BodyPartExamined",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "ConvolutionKernel",
    "SliceThickness",
    "KVP",
    "Manufacturer",
    "ManufacturerModelName",
    "StationName",
)
# Where Enhanced CT has some of them.
_FRAME_SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_FUNCTIONAL_GROUPS = ("PixelMeasuresSequence", "CTReconstructionSequence", "CTXRayDetailsSequence")
_READ_TAGS = [Tag(keyword) for keyword in ("SpecificCharacterSet", *_KEYWORDS, *_FRAME_SEQUENCES)]
# Gantries tilt by up to 30 degrees; beyond, it is a reformat.
_TILT_DEG = 31.0
_MAX_TEXT = 128  # characters; LO has 64, and a pattern must not meet a novel


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What is known of a Series; "", () or None where it is not.

    image_type, rows: of most of its slices. plane: axial, coronal, sagittal (up to 31 degrees off), oblique or unknown.
    spacing_mm: the usual distance between neighbouring slices. num_slices: positions with a slice.
    """

    modality: str = ""
    body_part: str = ""
    study_description: str = ""
    series_description: str = ""
    protocol: str = ""
    image_type: tuple[str, ...] = ()
    kernel: tuple[str, ...] = ()
    kernel_type: str = "unknown"
    plane: str = "unknown"
    slice_thickness_mm: float | None = None
    spacing_mm: float | None = None
    num_slices: int | None = None
    rows: int | None = None
    kvp: float | None = None
    manufacturer: str = ""
    model: str = ""
    station: str = ""
    calling_ae_title: str = ""


def describe_series(headers: Sequence[SliceHeader], path_of: dict[str, Path], calling_ae_title: str) -> Traits:
    """The traits of the Series these are the slices of. path_of: the file of each Instance, by SOPInstanceUID.

    What cannot be read counts as missing; whether the Series can be analysed without it is for others to say.
    """
    image_type = Counter(header.image_type for header in headers).most_common(1)[0][0]
    slices = sorted((h for h in headers if h.image_type == image_type), key=lambda h: h.sop_instance_uid)
    typical = slices[len(slices) // 2]  # the same one, in whatever order they are given
    values = _read(path_of.get(typical.sop_instance_uid))
    heights_mm = _heights_mm(slices)
    kernel = _texts(values.get("ConvolutionKernel"))
    return Traits(
        modality=typical.modality or "CT",  # as the receiver takes it
        body_part=_text(values.get("BodyPartExamined")),
        study_description=_text(values.get("StudyDescription")),
        series_description=_text(values.get("SeriesDescription")),
        protocol=_text(values.get("ProtocolName")),
        image_type=image_type,
        kernel=kernel,
        kernel_type=kernel_type(kernel),
        plane=plane_of(typical.orientation),
        slice_thickness_mm=_number(values.get("SliceThickness")),
        spacing_mm=float(np.median(np.diff(heights_mm))) if len(heights_mm) > 1 else None,
        num_slices=len(heights_mm) or len(slices),
        rows=typical.rows or None,
        kvp=_number(values.get("KVP")),
        manufacturer=_text(values.get("Manufacturer")),
        model=_text(values.get("ManufacturerModelName")),
        station=_text(values.get("StationName")),
        calling_ae_title=calling_ae_title,
    )


def plane_of(orientation: Sequence[float] | None) -> str:
    """The plane of slices with this ImageOrientationPatient."""
    if not orientation:
        return "unknown"
    row, column = np.reshape(orientation, (2, 3))
    normal = np.cross(row, column)
    length = float(np.linalg.norm(normal))
    if not length:
        return "unknown"
    along = int(np.abs(normal).argmax())
    off_deg = float(np.degrees(np.arccos(min(abs(normal[along]) / length, 1.0))))
    return ("sagittal", "coronal", "axial")[along] if off_deg <= _TILT_DEG else "oblique"


def _heights_mm(slices: Sequence[SliceHeader]) -> Sequence[float]:
    """Where slices lie along their normal, each place once, rising; none when positions or orientation are missing."""
    typical = slices[len(slices) // 2].orientation
    if not typical:
        return ()
    normal = np.cross(*np.reshape(typical, (2, 3)))
    heights = (float(np.dot(normal, h.position_lps_mm)) for h in slices if h.position_lps_mm)
    return sorted({round(height, 2) for height in heights})


def _read(path: Path | None) -> dict[str, Any]:
    """The values of `_KEYWORDS` in a file, at its top level or in its functional groups (Enhanced CT)."""
    if path is None:
        return {}
    try:
        ds = dcmread(path, stop_before_pixels=True, specific_tags=_READ_TAGS, force=True)
    except (OSError, *PARSE_ERRORS):
        return {}
    found: dict[str, Any] = {}
    for place in _places(ds):
        for keyword in _KEYWORDS:
            if keyword not in found and (value := _value(place, keyword)) not in (None, ""):
                found[keyword] = value
    return found


def _places(ds: Dataset) -> Iterator[Dataset]:
    """The dataset, then the functional groups shared by all frames, then those of the first frame (PS3.3 A.38.1.4)."""
    yield ds
    for keyword in _FRAME_SEQUENCES:
        for group in _FUNCTIONAL_GROUPS:
            for item in _items(ds, keyword)[:1]:
                yield from _items(item, group)[:1]


def _items(ds: Dataset, keyword: str) -> list[Dataset]:
    value = _value(ds, keyword)
    return list(value) if isinstance(value, DicomSequence) else []


def _value(ds: Dataset, keyword: str) -> Any:
    """The value of an attribute, None when it is missing or damaged: pydicom parses it only now."""
    try:
        return ds.get(keyword)
    except PARSE_ERRORS:
        return None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, MultiValue | list | tuple) else [] if value is None else [value]
    return tuple(str(item).strip()[:_MAX_TEXT] for item in values if str(item).strip())


def _text(value: Any) -> str:
    return "\\".join(_texts(value))[:_MAX_TEXT]


def _number(value: Any) -> float | None:
    try:
        number = float(_texts(value)[0])
    except (ValueError, IndexError):
        return None
    return number if np.isfinite(number) else None
