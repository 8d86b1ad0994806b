"""Completeness: when a Series is analysed, refused or awaited, and what that does to its case."""

import time
from dataclasses import replace

import pytest

from model import SeriesRules, SliceHeader
from node.case import Case, CaseState
from node.complete import Answer, check_cases, judge
from node.config import CompleteConfig
from node.index import Index, StoredSeries

CT = "1.2.840.10008.5.1.4.1.1.2"
RULES = SeriesRules(min_slices=30, max_spacing_mm=5.0)


def headers(num_slices: int = 40, *, spacing_mm: float = 2.0) -> list[SliceHeader]:
    """An axial CT Series."""
    return [
        SliceHeader(
            sop_instance_uid=f"1.2.3.{number}",
            series_instance_uid="1.2.3",
            study_instance_uid="1.2",
            sop_class_uid=CT,
            modality="CT",
            image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
            rows=512,
            columns=512,
            pixel_spacing_mm=(0.5, 0.5),
            position_lps_mm=(-128.0, -128.0, number * spacing_mm),
            orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            instance_number=number + 1,
            rescale_slope=1.0,
            rescale_intercept=-1024.0,
        )
        for number in range(num_slices)
    ]


WHOLE = headers()
GAP = [header for header in WHOLE if header.instance_number not in (20, 21, 22)]  # too wide to bridge
ONE_MISSING = [header for header in WHOLE if header.instance_number != 20]
FEW = headers(5)
LOCALIZERS = [replace(header, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")) for header in WHOLE]
SAGITTAL = [replace(header, orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0)) for header in WHOLE]
MIXED = [*WHOLE[:20], *(replace(header, rows=256) for header in WHOLE[20:])]
COARSE = headers(spacing_mm=8.0)

OPEN, RELEASED, BROKEN = (1, 0, 0), (0, 1, 0), (0, 0, 1)
TWO_RELEASED, ONE_OF_TWO_RELEASED, REPEATED_AFTER_ABORT = (0, 2, 0), (1, 1, 0), (0, 1, 1)


@pytest.mark.parametrize(
    ("what", "associations", "is_quiet", "answer", "reason"),
    [
        # One association that carried everything and was released: no need to wait.
        (WHOLE, RELEASED, False, Answer.ANALYSE, ""),
        (GAP, RELEASED, False, Answer.WAIT, ""),
        (ONE_MISSING, RELEASED, False, Answer.WAIT, ""),
        (FEW, RELEASED, False, Answer.WAIT, ""),
        (LOCALIZERS, RELEASED, False, Answer.REFUSE, "LOCALIZER"),
        (SAGITTAL, RELEASED, False, Answer.REFUSE, "sagittal"),
        (MIXED, RELEASED, False, Answer.REFUSE, "different Rows"),
        # More may come over an association that is open, or over another one.
        (WHOLE, OPEN, False, Answer.WAIT, ""),
        (WHOLE, BROKEN, False, Answer.WAIT, ""),
        (WHOLE, TWO_RELEASED, False, Answer.WAIT, ""),
        (WHOLE, ONE_OF_TWO_RELEASED, False, Answer.WAIT, ""),
        (WHOLE, REPEATED_AFTER_ABORT, False, Answer.WAIT, ""),
        (LOCALIZERS, OPEN, False, Answer.WAIT, ""),
        # After the quiet time an answer is due, whatever the associations did.
        (WHOLE, BROKEN, True, Answer.ANALYSE, ""),
        (WHOLE, TWO_RELEASED, True, Answer.ANALYSE, ""),
        (WHOLE, REPEATED_AFTER_ABORT, True, Answer.ANALYSE, ""),
        (ONE_MISSING, RELEASED, True, Answer.ANALYSE, ""),  # bridged, with a warning
        (GAP, RELEASED, True, Answer.REFUSE, "3 Instances missing"),
        (FEW, BROKEN, True, Answer.REFUSE, "5 slices; at least 30 are needed"),
        (COARSE, RELEASED, True, Answer.REFUSE, "8.00 mm apart"),
        (LOCALIZERS, BROKEN, True, Answer.REFUSE, "LOCALIZER"),
    ],
)
def test_judge(
    what: list[SliceHeader], associations: tuple[int, int, int], is_quiet: bool, answer: Answer, reason: str
) -> None:
    num_open, num_released, num_broken = associations
    stored = StoredSeries(
        headers=[header.to_dict() for header in what],
        num_open=num_open,
        num_released=num_released,
        num_broken=num_broken,
    )
    verdict = judge(stored, RULES, is_quiet=is_quiet)
    assert verdict.answer is answer
    assert reason in verdict.reason
    assert bool(verdict.reason) == (answer is Answer.REFUSE)


# ---- on a real index ----

CONFIG = CompleteConfig(quiet_time_s=0.2)


def arrive(index: Index, slices: list[SliceHeader], association_id: int, quiet_time_s: float = 0.2) -> None:
    for header in slices:
        index.add_instance(
            association_id=association_id,
            calling_ae_title="SCANNER",
            path=index.data_dir / "instances" / header.series_instance_uid / f"{header.sop_instance_uid}.dcm",
            headers=[header.to_dict()],
            quiet_time_s=quiet_time_s,
        )


def the_case(index: Index) -> Case:
    (case,) = index.cases()
    return case


def test_a_whole_series_is_queued_as_soon_as_its_association_is_released(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    arrive(index, WHOLE, association_id, quiet_time_s=60)
    config = CompleteConfig(quiet_time_s=60)
    check_cases(index, config)
    assert the_case(index).state is CaseState.RECEIVING
    index.end_association(association_id, released=True)
    check_cases(index, config)
    assert the_case(index).state is CaseState.QUEUED


def test_a_series_with_a_gap_waits_for_the_quiet_time_and_is_then_refused_with_the_reason(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    arrive(index, GAP, association_id)
    index.end_association(association_id, released=True)
    check_cases(index, CONFIG)
    assert the_case(index).state is CaseState.RECEIVING
    time.sleep(0.25)
    check_cases(index, CONFIG)
    case = the_case(index)
    assert case.state is CaseState.REFUSED
    assert "slice gaps" in case.reason


def test_the_rest_of_a_series_that_waits_makes_it_whole(index: Index) -> None:
    """A Study over several associations: the second brings what was missing."""
    first, second = index.open_association("SCANNER"), index.open_association("SCANNER")
    arrive(index, WHOLE[:25], first)
    index.end_association(first, released=True)
    check_cases(index, CONFIG)
    arrive(index, WHOLE[25:], second)
    index.end_association(second, released=True)
    check_cases(index, CONFIG)
    assert the_case(index).state is CaseState.RECEIVING
    time.sleep(0.25)
    check_cases(index, CONFIG)
    assert the_case(index).state is CaseState.QUEUED


def test_an_instance_that_comes_after_a_refusal_gives_the_series_another_chance(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    arrive(index, GAP, association_id, quiet_time_s=0)
    time.sleep(0.25)
    check_cases(index, CONFIG)
    assert the_case(index).state is CaseState.REFUSED
    arrive(index, [header for header in WHOLE if header not in GAP], association_id)
    assert the_case(index).state is CaseState.RECEIVING
    time.sleep(0.25)
    check_cases(index, CONFIG)
    assert the_case(index).state is CaseState.QUEUED


def test_a_case_that_waits_is_not_judged_at_every_tick(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    arrive(index, GAP, association_id)
    index.end_association(association_id, released=True)
    assert len(index.cases_to_check()) == 1
    check_cases(index, CompleteConfig(quiet_time_s=60))
    assert index.cases_to_check() == []


def test_the_rules_are_those_of_the_configuration(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    arrive(index, headers(28), association_id)
    index.end_association(association_id, released=True)
    check_cases(index, CompleteConfig(min_slices=28))
    assert the_case(index).state is CaseState.QUEUED
