"""QIDO-RS: a query string becomes conditions, matches become DICOM JSON with their addresses.

Reference: PS3.18 8.3.4 (query parameters), 10.6 (Search transaction).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pydicom import Dataset, dcmread
from pydicom.tag import BaseTag, Tag

from model import PARSE_ERRORS
from node.transcode import in_little_endian
from node.web.attributes import attribute_json, completed, dataset_json
from node.web.catalog import Catalog
from node.web.levels import IN_REQUEST, OPTIONAL, Level
from node.web.matching import Condition, QueryError, is_attribute, is_private, keyword_of, with_moments

DEFAULT_LIMIT, MAX_LIMIT = 1000, 10_000
MATCHED = {Level.STUDY: (Level.STUDY,), Level.SERIES: (Level.STUDY, Level.SERIES), Level.INSTANCE: tuple(Level)}
_RETRIEVE_URL = "00081190"
_FLAGS = ("fuzzymatching", "emptyvaluematching", "multiplevaluematching")
_ABOUT_THE_ANSWER = ("accept", "charset")  # its form; JSON is in UTF-8
_ZONE = "TimezoneOffsetFromUTC"  # of the dates and times of the query; no key itself (PS3.18 8.3.4.1.1)
_AS_THEY_STAND = f"Dates and times are compared as they stand; {_ZONE} is not taken into account"
_LITERALLY = "The fuzzymatching parameter is not supported. Only literal matching has been performed."


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query string, understood. include: keywords that are wanted beyond what is returned anyway.

    is_all: whether all that the level has are wanted. For them each match is read from a file: a page has fewer.
    warnings: what of it was not done.
    """

    conditions: tuple[Condition, ...]
    include: tuple[str, ...]
    is_all: bool
    limit: int
    offset: int
    warnings: tuple[str, ...]


def parse_query(level: Level, parameters: Iterable[tuple[str, str]], scope: dict[str, str]) -> Query:
    """Understands a query string.

    scope: UIDs that the address itself names, by keyword.

    A parameter that is no attribute is ignored, with a warning, as the Standard has it (PS3.18 8.3).

    Raises:
        QueryError: an unknown attribute, one that cannot be matched at this level, a bad number or range.
    """
    conditions = [Condition(keyword, uid) for keyword, uid in scope.items()]
    ignored: list[str] = []
    include: list[str] = []
    numbers = {"limit": DEFAULT_LIMIT, "offset": 0}
    is_all = is_zoned = False
    parameters = list(parameters)
    flags = {name for name, value in parameters if name in _FLAGS and value.lower() == "true"}
    can_match = {keyword for upper in MATCHED[level] for keyword in upper.keywords if keyword != _ZONE}
    can_match.add("ModalitiesInStudy")
    can_match |= set(IN_REQUEST if Level.SERIES in MATCHED[level] else ())
    for name, value in parameters:
        if name in numbers:
            numbers[name] = _whole(name, value)
        elif name in (*_FLAGS, *_ABOUT_THE_ANSWER):
            continue
        elif name == "includefield":
            is_all |= "all" in value.split(",")
            named = [field for field in value.split(",") if field and field != "all" and not is_private(field)]
            fields = [keyword_of(field) for field in named]
            include += [field.partition(".")[0] for field in fields]  # of a sequence, all of it
        elif name in (_ZONE, f"{Tag(_ZONE):08X}"):
            is_zoned = bool(value)
        elif is_private(name) or not is_attribute(name):
            ignored.append(quote(name[:64], safe=""))
        else:
            keyword = keyword_of(name)
            if keyword not in can_match:
                raise QueryError(f"{keyword} cannot be matched here; these can: {', '.join(sorted(can_match))}")
            is_empty = value == '""' and "emptyvaluematching" in flags
            if value.strip("*"):  # nothing, or any number of anything, asks nothing
                is_list = "multiplevaluematching" in flags
                conditions.append(Condition(keyword, value, is_empty=is_empty, is_list=is_list))
    warnings = [_LITERALLY] if "fuzzymatching" in flags else []
    if is_zoned and any(condition.keyword.endswith(("Date", "Time")) for condition in conditions):
        warnings.append(_AS_THEY_STAND)
    if ignored:
        warnings.append(f"These parameters are not supported and were ignored: {', '.join(ignored[:10])}")
    return Query(
        conditions=with_moments(conditions),
        include=tuple(include),
        is_all=is_all,
        limit=min(numbers["limit"], DEFAULT_LIMIT if is_all else MAX_LIMIT),
        offset=numbers["offset"],
        warnings=tuple(warnings),
    )


def _whole(name: str, value: str) -> int:
    if not value.isascii() or not value.isdecimal() or len(value) > 9:
        raise QueryError(f"{name} is {value!r:.80}; give a whole number, 0 or more")
    return int(value)


def search(catalog: Catalog, level: Level, query: Query, root: str) -> list[dict[str, Any]]:
    """The matches. root: the address of the service, to which theirs are appended.

    Raises:
        QueryError: as `parse_query`.
    """
    found = catalog.find(level, query.conditions, limit=query.limit, offset=query.offset)
    for answer in found:
        uids = [uid_of(answer, upper) for upper in MATCHED[level]]
        names = ("studies", "series", "instances")
        path = "".join(f"/{name}/{uid}" for name, uid in zip(names, uids, strict=False))
        answer[_RETRIEVE_URL] = {"vr": "UR", "Value": [root + path]}
        include = query.include
        if query.is_all and level is Level.INSTANCE:
            answer |= _read_all(catalog, uids) | answer
        elif query.is_all:
            include += tuple(keyword for upper in MATCHED[level] for keyword in OPTIONAL[upper])
        missing = [keyword for keyword in include if f"{Tag(keyword):08X}" not in answer]
        if missing:
            answer |= read_attributes(catalog, uids, missing)
    return found


def uid_of(answer: dict[str, Any], level: Level) -> str:
    return str(answer[f"{Tag(level.uid_keyword):08X}"]["Value"][0])


def read_attributes(catalog: Catalog, uids: Sequence[str], keywords: Iterable[str]) -> dict[str, Any]:
    """Attributes that the catalog does not keep, from the first Instance."""
    ds = _read_first(catalog, uids, [Tag(keyword) for keyword in keywords])
    return {f"{Tag(keyword):08X}": attribute_json(ds, Tag(keyword)) for keyword in keywords if keyword in ds}


def _read_all(catalog: Catalog, uids: Sequence[str]) -> dict[str, Any]:
    """All attributes of an Instance but bulk data."""
    told = dataset_json(_read_first(catalog, uids))
    left_out = "00080005"  # the character set is that of the file; JSON is in UTF-8
    return {tag: value for tag, value in told.items() if tag != left_out and "InlineBinary" not in value}


def _read_first(catalog: Catalog, uids: Sequence[str], tags: list[BaseTag] | None = None) -> Dataset:
    """The first Instance, or these attributes of it; empty if it has just gone or cannot be read."""
    try:
        for instance in catalog.files(*uids, limit=1):
            ds = completed(dcmread(instance.path, stop_before_pixels=True, specific_tags=tags))
            in_little_endian(ds)
            return ds
    except (OSError, *PARSE_ERRORS):
        pass
    return Dataset()
