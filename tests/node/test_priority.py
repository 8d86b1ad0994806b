"""Which case is next: STAT by rule, then arrival, and nobody starves."""

from typing import Any

import pytest

from node.case import Case
from node.config import PriorityConfig
from node.index import Index
from node.priority import Priority, priority_of, rank
from tests.node.test_index import new

NOW = 1_000_000.0
RULES = PriorityConfig(
    stat_ae_titles=("CT_ER",), stat_departments=("emerg*", "Trauma"), stat_stations=("CT?",), stat_locations=("ER *",)
)


def make_case(calling_ae_title: str = "SCANNER", queued_at: float = NOW, **attributes: Any) -> Case:
    unknown: dict[str, Any] = dict.fromkeys(Case.__dataclass_fields__)
    known = {"calling_ae_title": calling_ae_title, "queued_at": queued_at, "attributes": attributes}
    return Case(**unknown | known)


@pytest.mark.parametrize(
    "case",
    [
        make_case("CT_ER"),
        make_case(RequestedProcedurePriority="STAT"),
        make_case(RequestedProcedurePriority="high"),
        make_case(InstitutionalDepartmentName="Emergency Radiology"),
        make_case(InstitutionalDepartmentName=["Radiology", "TRAUMA"]),
        make_case(StationName="CT1"),
        make_case(CurrentPatientLocation="ER bay 4"),
    ],
)
def test_stat_by_each_rule(case: Case) -> None:
    assert priority_of(case, RULES) is Priority.STAT


@pytest.mark.parametrize(
    "case",
    [
        make_case(),
        make_case("ct_er"),  # AE titles are exact
        make_case(RequestedProcedurePriority="ROUTINE", StationName="CT12", CurrentPatientLocation=""),
        make_case(SeriesDescription="STAT"),
        make_case(InstitutionalDepartmentName=7),
    ],
)
def test_all_else_is_routine(case: Case) -> None:
    assert priority_of(case, RULES) is Priority.ROUTINE


def queue(index: Index, series_uid: str, calling_ae_title: str, at: float) -> None:
    index.now = lambda: at
    index.add_instances([new(index, 1, series_uid, calling_ae_title=calling_ae_title)], quiet_time_s=0)
    case = index.case(series_uid)
    assert case is not None
    assert index.queue(case)


def claim(index: Index, rules: PriorityConfig, at: float) -> str:
    case = index.claim_next(lambda case: rank(case, rules, at))
    assert case is not None
    return case.series_instance_uid


def test_stat_goes_first_and_equals_in_order_of_arrival(index: Index) -> None:
    for number, (uid, caller) in enumerate([("1.1", "A"), ("1.2", "A"), ("1.3", "CT_ER"), ("1.4", "CT_ER")]):
        queue(index, uid, caller, NOW + number)
    assert [claim(index, RULES, NOW + 10) for _ in range(4)] == ["1.3", "1.4", "1.1", "1.2"]


def test_stat_without_end_does_not_starve_what_is_routine(index: Index) -> None:
    """A STAT case comes with every claim; a routine one is through as soon as it has waited its time, and once only."""
    rules = RULES.model_copy(update={"max_routine_wait_s": 600.0})
    queue(index, "1.1", "A", NOW)
    claimed = []
    for minute in range(1, 14):
        queue(index, f"2.{minute}", "CT_ER", NOW + 60 * minute)
        claimed.append(claim(index, rules, NOW + 60 * minute))
    assert claimed.index("1.1") == 9  # at the tenth minute
    assert claimed[-1] == "2.12"


def test_a_case_that_was_put_back_keeps_its_place_and_one_that_broke_goes_behind(index: Index) -> None:
    for uid in ("1.1", "1.2"):
        queue(index, uid, "A", NOW)
    assert claim(index, RULES, NOW) == "1.1"
    index.put_back()
    assert claim(index, RULES, NOW) == "1.1"
    held = index.case("1.1")
    assert held is not None
    index.now = lambda: NOW + 1
    index.fail_attempt(held, "it broke", max_attempts=3)
    assert claim(index, RULES, NOW) == "1.2"
