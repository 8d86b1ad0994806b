"""What the rules can ask of a Series that is still in a watched archive, from the attributes of one of its Instances.

Not the number of slices and what comes from it: that is judged when the Series is here, and so is all the rest, again.
"""

import math
from collections.abc import Mapping
from typing import Any

from node.rules.kernels import kernel_type
from node.rules.traits import Traits, plane_of


def describe(tags: Mapping[str, Any], ae_title: str) -> Traits:
    """The traits that the attributes tell of; those of Enhanced CT lie deeper and count as missing."""
    kernel = _texts(tags, "ConvolutionKernel")
    orientation = [number for text in _texts(tags, "ImageOrientationPatient") if (number := _number(text)) is not None]
    return Traits(
        modality=_text(tags, "Modality"),
        body_part=_text(tags, "BodyPartExamined"),
        study_description=_text(tags, "StudyDescription"),
        series_description=_text(tags, "SeriesDescription"),
        protocol=_text(tags, "ProtocolName"),
        image_type=_texts(tags, "ImageType"),
        kernel=kernel,
        kernel_type=kernel_type(kernel),
        plane=plane_of(orientation if len(orientation) == 6 else None),
        slice_thickness_mm=_number(_text(tags, "SliceThickness")),
        rows=int(_number(_text(tags, "Rows")) or 0) or None,
        kvp=_number(_text(tags, "KVP")),
        manufacturer=_text(tags, "Manufacturer"),
        model=_text(tags, "ManufacturerModelName"),
        station=_text(tags, "StationName"),
        calling_ae_title=ae_title,
    )


def _text(tags: Mapping[str, Any], keyword: str) -> str:
    value = tags.get(keyword)
    return value.strip() if isinstance(value, str) else ""


def _texts(tags: Mapping[str, Any], keyword: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in _text(tags, keyword).split("\\") if text.strip())


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
