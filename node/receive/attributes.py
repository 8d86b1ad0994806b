"""What of an Instance counts for its whole Series; none of it names a patient.

Kept with the case, for the rules on priority and on which Series to take.
"""

import math
from typing import Any

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import VR

from model import PARSE_ERRORS

_KEYWORDS = (
    # where it was asked for and made, and how soon it is needed
    "InstitutionalDepartmentName",
    "StationName",
    "CurrentPatientLocation",
    "RequestedProcedurePriority",
    # what it shows
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "BodyPartExamined",
    # how it was made
    "Manufacturer",
    "ManufacturerModelName",
    "ConvolutionKernel",
    "SliceThickness",
    "KVP",
)
SERIES_TAGS: dict[str, BaseTag] = {keyword: Tag(keyword) for keyword in _KEYWORDS}
"""The attributes, by keyword."""

_MAX_LENGTH = 64  # of a text: what VR LO allows; a longer one is cut


def series_attributes(ds: Dataset) -> dict[str, Any]:
    """The attributes that are present and not empty: a text, a number, or a list of them."""
    found = {keyword: _value(ds, tag) for keyword, tag in SERIES_TAGS.items() if tag in ds}
    return {keyword: value for keyword, value in found.items() if value not in ("", None, [])}


def _value(ds: Dataset, tag: BaseTag) -> Any:
    """The value as JSON has it; None for what cannot be read, since an odd attribute refuses no Instance."""
    try:
        element = ds[tag]
        plain = _number if element.VR in (VR.DS, VR.IS) else _text
        if isinstance(element.value, MultiValue):
            return [plain(item) for item in element.value]
        return plain(element.value)
    except PARSE_ERRORS:
        return None


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None  # JSON knows no other


def _text(value: Any) -> str | None:
    return None if value is None else str(value).strip()[:_MAX_LENGTH]
