"""What a query asks of an attribute: a value, several, a pattern, or a range.

Reference: PS3.4 C.2.2.2 (matching), PS3.18 8.3.4.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from sqlalchemy import ColumnElement, String, and_, false, func, or_, true

from node.person_name import shortest_name

_ALL_DELIMITERS = "^^^^"  # of the five components of a name
_RANGES = ("DA", "TM", "DT")
TIMES = {"StudyDate": "StudyTime", "PerformedProcedureStepStartDate": "PerformedProcedureStepStartTime"}
"""The time that tells more of a date, by its keyword."""

_TAG = "[0-9A-Fa-f]{8}"
_WHOLE = ("IS", "US", "UL")
_NO_WILDCARDS = ("DA", "TM", "DT", "UI", "IS", "DS", "US", "UL")


class QueryError(ValueError):
    """A query cannot be answered; the message says what is wrong with it."""


@dataclass(frozen=True)
class Condition:
    """One attribute and what is asked of it; an empty value asks nothing.

    keyword: with that of its sequence and a dot before it, where it stands in one. is_empty: it must have no value.
    is_list: the value may be several, joined as DICOM joins values; of UIDs and codes it always may. is_moment: it is
    a range of a date with its time after it, and so is what it is asked of.
    """

    keyword: str
    value: str
    is_empty: bool = False
    is_list: bool = False
    is_moment: bool = False

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
            return _in_range(column, self.value, "DT" if self.is_moment else vr)
        if vr == "UI":
            return column.in_([uid for uid in re.split(r"[,\\]", self.value) if uid])
        if vr in _WHOLE and re.fullmatch("[+-]?[0-9]{1,12}", self.value):
            return column == str(int(self.value))
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


def with_moments(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Ranges of a date and of its time, of the same form, made one of moments (PS3.4 C.2.2.2.5, combined matching)."""
    asked = {condition.keyword: condition for condition in conditions}
    made: list[Condition] = []
    for condition in conditions:
        time = asked.get(TIMES.get(condition.keyword, ""))
        if time is not None and (moments := _moments(condition.value, time.value)):
            made.append(Condition(condition.keyword, moments, is_moment=True))
            asked.pop(condition.keyword)
        else:
            made.append(condition)
    used = {TIMES[condition.keyword] for condition in made if condition.is_moment}
    return tuple(condition for condition in made if condition.keyword not in used)


def _moments(dates: str, times: str) -> str:
    """The range from the first date at the first time to the last at the last; "" if not both are such a range."""
    if dates.count("-") != 1 or times.count("-") != 1 or "\\" in dates + times:
        return ""
    ends = list(zip(dates.split("-"), times.split("-"), strict=True))
    is_of_both = all(bool(day) == bool(time) and len(day) in (0, 8) for day, time in ends)
    return "-".join(day + time for day, time in ends) if is_of_both else ""


def _in_range(column: ColumnElement[Any], value: str, vr: str) -> ColumnElement[bool]:
    first, _, last = value.partition("-")
    if not re.fullmatch(r"[0-9.]*", first + last) or not first + last:
        raise QueryError(f"{value!r} is no range; a range is FIRST-LAST, FIRST- or -LAST, without spaces")
    limits = [column != ""]
    if first:
        # A time may be stored less precisely than it is given: 12 is 120000, too.
        limits.append(column >= (first if vr == "DA" else first.rstrip("0.")))
    if last:
        # Or given less precisely than it is stored: 12 includes 1230.
        limits.append(column <= (last if vr == "DA" else last + "~"))
    return and_(*limits)


def is_attribute(name: str) -> bool:
    """Whether it is meant as one: a keyword, or a tag or a path, whichever these name."""
    return "." in name or re.fullmatch(_TAG, name) is not None or tag_for_keyword(name) is not None


def is_private(name: str) -> bool:
    """Whether it is the tag of a private attribute."""
    return re.fullmatch(_TAG, name) is not None and int(name[:4], 16) % 2 == 1


def keyword_of(name: str) -> str:
    """The keyword of an attribute given by keyword or by tag in eight hex digits; in a sequence, with a dot between.

    Raises:
        QueryError: there is no such attribute.
    """
    if "." in name:
        return ".".join(map(keyword_of, name.split(".")))
    if re.fullmatch(_TAG, name):
        keyword = keyword_for_tag(int(name, 16))
    else:
        keyword = name if tag_for_keyword(name) is not None else ""
    if not keyword:
        raise QueryError(f"{name!r:.80} is no attribute; give a keyword, such as PatientID, or a tag, such as 00100020")
    return keyword
