"""What a query asks of an attribute: a value, several, a pattern, or a range.

Reference: PS3.4 C.2.2.2 (matching), PS3.18 8.3.4.
"""

import re
from dataclasses import dataclass
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from sqlalchemy import ColumnElement, String, and_, false, func, or_, true

from node.person_name import shortest_name

_ALL_DELIMITERS = "^^^^"  # of the five components of a name
_RANGES = ("DA", "TM", "DT")
_NO_WILDCARDS = ("DA", "TM", "DT", "UI", "IS", "DS", "US", "UL")


class QueryError(ValueError):
    """A query cannot be answered; the message says what is wrong with it."""


@dataclass(frozen=True)
class Condition:
    """One attribute and what is asked of it; an empty value asks nothing.

    keyword: with that of its sequence and a dot before it, where it stands in one. is_empty: it must have no value.
    is_list: the value may be several, joined as DICOM joins values; of UIDs and codes it always may.
    """

    keyword: str
    value: str
    is_empty: bool = False
    is_list: bool = False

    def of(self, column: ColumnElement[Any]) -> ColumnElement[bool]:
        """SQL for a column that holds the attribute as text."""
        if self.is_empty:
            return column == ""
        if self.is_list and "\\" in self.value:
            return or_(
                false(), *(Condition(self.keyword, value).of(column) for value in self.value.split("\\") if value)
            )
        vr = "CS" if self.keyword == "ModalitiesInStudy" else dictionary_VR(self.keyword.rpartition(".")[2])
        if vr in _RANGES and "-" in self.value:
            return _in_range(column, self.value, vr)
        if vr == "UI":
            return column.in_([uid for uid in re.split(r"[,\\]", self.value) if uid])
        if vr in _NO_WILDCARDS:
            return column == self.value
        if vr == "PN":
            return _is_name(column, self.value)
        if vr == "CS":  # a code has no comma: viewers ask for several modalities so, others as DICOM joins values
            return or_(*(_fits(column, code) for code in {self.value, *re.split(r"[,\\]", self.value)} if code))
        return _fits(column, self.value)


def _fits(column: ColumnElement[Any], value: str) -> ColumnElement[bool]:
    """A value, or a pattern: GLOB has DICOM's wildcards and minds the case, as LIKE does not; `[` is its own."""
    if "*" not in value and "?" not in value:
        return column == value
    return column.op("GLOB", is_comparison=True)(value.replace("[", "[[]"))


def _is_name(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """A name, or one of its component groups (PS3.5 6.2.1.2), whatever the case and the delimiters at its end.

    column: holds names as `shortest_name` writes them.
    """
    asked = shortest_name(name)
    if not asked:  # nothing but delimiters: no value
        return true()
    pattern = _as_like(asked)
    places = (pattern,) if "=" in asked else (pattern, f"{pattern}=%", f"%={pattern}", f"%={pattern}=%")
    spelled: list[ColumnElement[Any]] = [column]
    if "*" in asked:  # `Doe^*` is to find `Doe`, which is `Doe^` too
        spelled.append(func.replace(column, "=", f"{_ALL_DELIMITERS}=", type_=String).concat(_ALL_DELIMITERS))
    return or_(*(written.like(place, escape="!") for written in spelled for place in places))


def _as_like(pattern: str) -> str:
    escaped = re.sub(r"([!%_])", r"!\1", pattern)
    return escaped.replace("*", "%").replace("?", "_")


def _in_range(column: ColumnElement[Any], value: str, vr: str) -> ColumnElement[bool]:
    first, _, last = value.partition("-")
    if not re.fullmatch(r"[0-9.]*", first + last) or not first + last:
        raise QueryError(f"{value!r} is no range; a range is FIRST-LAST, FIRST- or -LAST, without spaces")
    limits = [column != ""]
    if first:
        limits.append(column >= first)
    if last:
        # A time may be given less precisely than it is stored: 12 includes 1230.
        limits.append(column <= (last if vr == "DA" else last + "~"))
    return and_(*limits)


def keyword_of(name: str) -> str:
    """The keyword of an attribute given by keyword or by tag in eight hex digits; in a sequence, with a dot between.

    Raises:
        QueryError: there is no such attribute.
    """
    if "." in name:
        return ".".join(map(keyword_of, name.split(".")))
    if re.fullmatch(r"[0-9A-Fa-f]{8}", name):
        keyword = keyword_for_tag(int(name, 16))
    else:
        keyword = name if tag_for_keyword(name) is not None else ""
    if not keyword:
        raise QueryError(f"{name!r:.80} is no attribute; give a keyword, such as PatientID, or a tag, such as 00100020")
    return keyword
