"""The DICOM JSON Model as other servers write it: what is missing or odd in an answer counts as not there.

Reference: PS3.18 F.
"""

import json
from typing import Any

from pydicom.datadict import keyword_for_tag


def datasets_in(content: bytes) -> list[dict[str, Any]]:
    """The datasets of an answer; none where it is anything else. A name that is not in UTF-8 counts as odd."""
    try:
        found = json.loads(content.decode(json.detect_encoding(content), "replace"))
    except (ValueError, RecursionError):
        return []
    listed = found if isinstance(found, list) else [found]
    return [item for item in listed if isinstance(item, dict)]


def first_value(dataset: dict[str, Any], tag: str) -> Any:
    """The first value of an attribute, given by its tag in eight hex digits; None if it has none."""
    values = _values(dataset.get(tag))
    return values[0] if values else None


def items_of(dataset: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    """The items of a sequence."""
    return [item for item in _values(dataset.get(tag)) if isinstance(item, dict)]


def texts_of(dataset: dict[str, Any]) -> dict[str, str]:
    """The attributes that have texts or numbers as values, by keyword; several are joined by backslashes."""
    texts = {}
    for tag, attribute in dataset.items():
        values = _values(attribute)
        is_tag = len(tag) == 8 and all(digit in "0123456789ABCDEFabcdef" for digit in tag)
        if is_tag and values and all(isinstance(value, str | int | float) for value in values):
            texts[keyword_for_tag(int(tag, 16))] = "\\".join(map(str, values))
    return texts


def _values(attribute: Any) -> list[Any]:
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return values if isinstance(values, list) else []
