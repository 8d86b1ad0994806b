"""What of an Instance counts for its whole Series; none of it names a patient.

Kept with the case, for its priority. No description: anything may stand in those, and they would be at rest in the
database; the rules on which Series to take read them from a file.
"""

from typing import Any

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

from model import PARSE_ERRORS

_KEYWORDS = (
    "InstitutionalDepartmentName",
    "StationName",
    "CurrentPatientLocation",
    "RequestedProcedurePriority",
)
SERIES_TAGS: dict[str, BaseTag] = {keyword: Tag(keyword) for keyword in _KEYWORDS}
"""The attributes, by keyword."""

_MAX_LENGTH = 64  # of a text: what VR LO allows; a longer one is cut


def series_attributes(ds: Dataset) -> dict[str, Any]:
    """The attributes that are present and not empty: a text or a list of them."""
    found = {keyword: _value(ds, tag) for keyword, tag in SERIES_TAGS.items() if tag in ds}
    return {keyword: value for keyword, value in found.items() if value not in ("", None, [])}


def _value(ds: Dataset, tag: BaseTag) -> Any:
    """The value as JSON has it; None for what cannot be read, since an odd attribute refuses no Instance."""
    try:
        element = ds[tag]
        if isinstance(element.value, MultiValue):
            return [_text(item) for item in element.value]
        return _text(element.value)
    except PARSE_ERRORS:
        return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value).strip()[:_MAX_LENGTH]
