"""The Identifier of a C-FIND, C-GET or C-MOVE request: what it asks of the catalog, and the answers to it.

Matching is that of `node/web/matching.py`. Keys of the level asked about and of those above are matched, whether
required, unique or optional; what the catalog does not keep is answered from the first Instance, and not matched.

Reference: PS3.4 C.2.2.2 (matching), C.6 (information models and their keys).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.datadict import keyword_for_tag
from pydicom.multival import MultiValue

from node.web.catalog import Catalog
from node.web.levels import Level
from node.web.matching import Condition, QueryError
from node.web.qido import MATCHED, read_attributes, uid_of

MAX_MATCHES = 10_000
_LEVELS = {"PATIENT": Level.STUDY, "STUDY": Level.STUDY, "SERIES": Level.SERIES, "IMAGE": Level.INSTANCE}
PATIENT_KEYS = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_COUNTS = {"00201202": "00201206", "00201204": "00201208"}  # of Series and Instances: of a patient, of a Study
ABOUT_THE_QUERY = ("QueryRetrieveLevel", "SpecificCharacterSet", "TimezoneOffsetFromUTC", "QueryRetrieveView")


class TooManyError(Exception):
    """More matches than are given."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A C-FIND Identifier, understood. is_whole: whether every key that asks something is matched."""

    name: str  # of the level
    conditions: tuple[Condition, ...]
    wanted: tuple[DataElement, ...]
    is_whole: bool

    @property
    def level(self) -> Level:
        return _LEVELS[self.name]


def parse_query(identifier: Dataset, levels: tuple[str, ...]) -> Query:
    """Understands a C-FIND Identifier. levels: those of its information model.

    Raises:
        QueryError: there is no such level.
    """
    name = _level(identifier, levels)
    can_match = set(PATIENT_KEYS)
    if name != "PATIENT":
        can_match = {keyword for upper in MATCHED[_LEVELS[name]] for keyword in upper.keywords} | {"ModalitiesInStudy"}
    conditions, is_whole = [], True
    wanted = [element for element in identifier if element.keyword not in ABOUT_THE_QUERY]
    for element in wanted:
        if not _asks(element):
            continue
        if element.keyword in can_match:
            conditions.append(Condition(element.keyword, _text(element)))
        else:
            is_whole = False
    return Query(name=name, conditions=tuple(conditions), wanted=tuple(wanted), is_whole=is_whole)


def parse_retrieval(identifier: Dataset, levels: tuple[str, ...]) -> list[Condition]:
    """What a C-GET or C-MOVE Identifier names: a value, or several UIDs, of the unique key of its level.

    Those of the levels above, which the Standard requires, must fit where they are given.

    Raises:
        QueryError: the level is none, or its unique key is missing or a pattern.
    """
    name = _level(identifier, levels)
    key = "PatientID" if name == "PATIENT" else _LEVELS[name].uid_keyword
    keys = ("PatientID", *(level.uid_keyword for level in MATCHED[_LEVELS[name]]))
    conditions = [Condition(k, _text(identifier[k])) for k in keys if k in identifier and _text(identifier[k])]
    if not any(condition.keyword == key for condition in conditions):
        raise QueryError(f"{key} is missing")
    if any(character in condition.value for condition in conditions for character in "*?"):
        raise QueryError("unique keys are no patterns here")
    return conditions


def _level(identifier: Dataset, levels: tuple[str, ...]) -> str:
    name = str(identifier.get("QueryRetrieveLevel", "")).strip()
    if name not in levels:
        raise QueryError(f"level is not {', '.join(levels)}")
    return name


def _asks(element: DataElement) -> bool:
    """Whether anything is asked of the attribute, or of one in its items; any number of anything asks nothing."""
    if element.VR == "SQ":
        return any(_asks(inner) for item in element.value for inner in item)
    return bool(_text(element).strip("*"))


def _text(element: DataElement) -> str:
    value = element.value
    if isinstance(value, MultiValue):
        return "\\".join(map(str, value))
    return "" if value is None else str(value).strip()


def answers(catalog: Catalog, query: Query, ae_title: str) -> Iterator[Dataset]:
    """The matches, each with what was asked for; what there is not is empty.

    Raises:
        QueryError: a range is none.
        TooManyError: there are more than `MAX_MATCHES`.
    """
    found = catalog.find(query.level, query.conditions, limit=MAX_MATCHES + 1, offset=0)
    if len(found) > MAX_MATCHES:
        raise TooManyError(f"more than {MAX_MATCHES} match; ask for less")
    if query.name == "PATIENT":
        found = list(_patients(found))
    for answer in found:
        yield _answer(catalog, query, answer, ae_title)


def _patients(studies: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each patient once, as in the first of the Studies, with how much there is of the patient."""
    of_patient: dict[str, list[dict[str, Any]]] = {}
    for study in studies:
        of_patient.setdefault(_patient_id(study), []).append(study)
    for its in of_patient.values():
        counts = {"00201200": len(its)}
        counts |= {of_all: sum(study[of_one]["Value"][0] for study in its) for of_all, of_one in _COUNTS.items()}
        yield its[0] | {tag: {"vr": "IS", "Value": [count]} for tag, count in counts.items()}


def _patient_id(answer: dict[str, Any]) -> str:
    return str(answer.get("00100020", {}).get("Value", [""])[0])


def _answer(catalog: Catalog, query: Query, found: dict[str, Any], ae_title: str) -> Dataset:
    missing = [e.keyword for e in query.wanted if f"{e.tag:08X}" not in found and keyword_for_tag(e.tag)]
    if missing:
        found = found | read_attributes(catalog, [uid_of(found, level) for level in MATCHED[query.level]], missing)
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.QueryRetrieveLevel = query.name
    ds.RetrieveAETitle = ae_title
    for element in query.wanted:
        known = found.get(f"{element.tag:08X}")
        if element.keyword != "RetrieveAETitle":
            ds.update(Dataset.from_json({f"{element.tag:08X}": known or {"vr": element.VR}}))
    return ds


def identified(sop_instance_uid: str) -> Dataset:
    """A dataset that names an Instance and is none."""
    ds = Dataset()
    ds.SOPInstanceUID = sop_instance_uid
    return ds
