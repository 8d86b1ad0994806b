"""Completeness: the evidence and what follows from it, as a table; how long a sender's next association is awaited."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from model import SeriesRules, SliceHeader
from node.case import Carrier
from node.complete.judge import (
    Answer,
    Evidence,
    are_numbers_whole,
    habit_s,
    judge,
    pauses_s,
    settling_s,
    was_interrupted,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
RULES = SeriesRules(min_slices=30, max_spacing_mm=5.0)
QUIET_S = 30.0
ANALYSE, REFUSE, WAIT = Answer.ANALYSE, Answer.REFUSE, Answer.WAIT


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
# What is here looks even, and the numbers tell that it is a part.
LONG = headers(120, spacing_mm=1.0)
EVERY_SECOND, SECOND_HALF, FIRST_HALF = LONG[::2], LONG[60:], LONG[:60]
TWICE = [*WHOLE, *(replace(header, sop_instance_uid=f"1.2.9.{i}") for i, header in enumerate(WHOLE))]
ALL_NUMBERED_1 = [replace(header, instance_number=1) for header in WHOLE]
UNNUMBERED = [replace(header, instance_number=None) for header in WHOLE]


def sent(*times: float, released: bool = True) -> Carrier:
    """An association that was open from the first time to the second, or is still open."""
    return Carrier(opened_at=times[0], ended_at=times[1] if len(times) > 1 else None, released=released)


def broken(opened_at: float, ended_at: float) -> Carrier:
    return sent(opened_at, ended_at, released=False)


# The last Instance came at 100 s.
OPEN, RELEASED, BROKEN = [sent(90.0)], [sent(90.0, 100.1)], [broken(90.0, 100.0)]
PARALLEL = [sent(90.0, 99.8), sent(90.1, 100.1), sent(90.2, 99.9), sent(90.2, 100.0)]
ONE_OF_TWO_OPEN = [sent(90.0, 99.0), sent(90.1)]
IN_SEQUENCE = [sent(80.0, 85.0), sent(86.0, 92.0), sent(93.0, 100.1)]  # two pauses are too few to go by
ONE_PER_IMAGE = [sent(95 + 0.1 * i, 95.05 + 0.1 * i) for i in range(51)]  # pauses of 0.05 s, the last ends at 100.05
SLOW = [sent(60 + i, 60.1 + i) for i in range(40)]  # pauses of 0.9 s, the last ends at 99.1
FOUR_AT_A_TIME = [sent(95 + 0.025 * i, 95.1 + 0.025 * i) for i in range(200)]
BROKEN_THEN_RESENT = [broken(80.0, 85.0), sent(90.0, 100.1)]
RESENT_AND_BROKEN = [sent(80.0, 85.0), broken(90.0, 100.0)]
ONE_OF_PARALLEL_BROKEN = [broken(90.0, 99.0), sent(90.1, 100.1), sent(90.2, 100.0)]
LATE_SLICE_A_DAY_LATER = [sent(-86400.0, -86390.0), sent(99.9, 100.1)]


@pytest.mark.parametrize(
    ("carriers", "at", "answer"),
    [
        # One association: whole as soon as it is released.
        (OPEN, 100.3, WAIT),
        (RELEASED, 100.3, ANALYSE),
        (BROKEN, 100.3, WAIT),
        (BROKEN, 129.9, WAIT),
        # An association that is open may be a pause, or other Series of the Study: the quiet time bounds it.
        (OPEN, 129.9, WAIT),
        (OPEN, 130.0, ANALYSE),
        # Several that were all open together are a sender with a fixed set of them.
        (PARALLEL, 100.3, ANALYSE),
        (ONE_OF_TWO_OPEN, 100.3, WAIT),
        (ONE_OF_PARALLEL_BROKEN, 100.3, WAIT),
        # Several in sequence: there may be one more.
        (IN_SEQUENCE, 100.3, WAIT),
        (IN_SEQUENCE, 129.9, WAIT),
        (IN_SEQUENCE, 130.0, ANALYSE),
        # An association for each image: awaited for four times the longest pause, at least 2 s.
        (ONE_PER_IMAGE, 100.3, WAIT),
        (ONE_PER_IMAGE, 102.0, WAIT),
        (ONE_PER_IMAGE, 102.1, ANALYSE),
        (SLOW, 102.6, WAIT),
        (SLOW, 102.8, ANALYSE),
        (FOUR_AT_A_TIME, 101.0, WAIT),
        (FOUR_AT_A_TIME, 102.1, ANALYSE),
        # A break is mended by a later association that is released, and by nothing else but the quiet time.
        (BROKEN_THEN_RESENT, 100.3, ANALYSE),
        (RESENT_AND_BROKEN, 100.3, WAIT),
        (RESENT_AND_BROKEN, 130.0, ANALYSE),
        # What came after a longer pause than the quiet time is a sending of its own.
        (LATE_SLICE_A_DAY_LATER, 100.3, ANALYSE),
    ],
)
def test_a_series_without_a_gap_is_whole(carriers: list[Carrier], at: float, answer: Answer) -> None:
    evidence = Evidence(headers=WHOLE, carriers=carriers, last_received_at=100.0, num_instances=40)
    verdict = judge(evidence, RULES, quiet_time_s=QUIET_S, now=at)
    assert verdict.answer is answer
    if answer is WAIT:
        assert at < verdict.until <= 130.0  # it will be judged again


@pytest.mark.parametrize("headers_here", [WHOLE, FEW])
def test_who_was_sending_when_the_node_was_killed_has_the_quiet_time_to_go_on(headers_here: list[SliceHeader]) -> None:
    """The break is noted when the node starts again, here at 500 s."""
    evidence = Evidence(headers=headers_here, carriers=[broken(90.0, 500.0)], last_received_at=100.0, num_instances=40)
    verdict = judge(evidence, RULES, quiet_time_s=QUIET_S, now=505.0)
    assert (verdict.answer, verdict.until) == (WAIT, 530.0)
    assert judge(evidence, RULES, quiet_time_s=QUIET_S, now=530.0).answer is not WAIT


@pytest.mark.parametrize(
    ("what", "carriers", "at", "answer", "reason"),
    [
        # Gaps, and too few: more may come. After the quiet time it is bridged, or refused with the reason.
        (GAP, RELEASED, 100.3, WAIT, ""),
        (GAP, RELEASED, 130.0, REFUSE, "3 Instances missing"),
        (ONE_MISSING, RELEASED, 100.3, WAIT, ""),
        (ONE_MISSING, RELEASED, 130.0, ANALYSE, ""),
        (FEW, RELEASED, 100.3, WAIT, ""),
        (FEW, BROKEN, 130.0, REFUSE, "5 slices; at least 30 are needed"),
        (COARSE, RELEASED, 130.0, REFUSE, "8.00 mm apart"),
        # What more Instances cannot mend is said as soon as the sender is done.
        (LOCALIZERS, RELEASED, 100.3, REFUSE, "LOCALIZER"),
        (LOCALIZERS, OPEN, 100.3, WAIT, ""),
        (LOCALIZERS, BROKEN, 130.0, REFUSE, "LOCALIZER"),
        (SAGITTAL, RELEASED, 100.3, REFUSE, "sagittal"),
        (MIXED, RELEASED, 100.3, REFUSE, "different Rows"),
        # Even, but the numbers say that it is a part.
        (EVERY_SECOND, RELEASED, 100.3, WAIT, ""),
        (EVERY_SECOND, RELEASED, 130.0, ANALYSE, ""),
        (SECOND_HALF, RELEASED, 100.3, WAIT, ""),
        (SECOND_HALF, RELEASED, 130.0, ANALYSE, ""),
        (FIRST_HALF, RELEASED, 100.3, ANALYSE, ""),  # nothing tells it from a whole
        # Numbers that tell nothing.
        (ALL_NUMBERED_1, RELEASED, 100.3, ANALYSE, ""),
        (UNNUMBERED, RELEASED, 100.3, ANALYSE, ""),
        (TWICE, RELEASED, 100.3, ANALYSE, ""),
    ],
)
def test_what_is_here_counts(
    what: list[SliceHeader], carriers: list[Carrier], at: float, answer: Answer, reason: str
) -> None:
    evidence = Evidence(headers=what, carriers=carriers, last_received_at=100.0, num_instances=len(what))
    verdict = judge(evidence, RULES, quiet_time_s=QUIET_S, now=at)
    assert verdict.answer is answer
    assert reason in verdict.reason
    assert bool(verdict.reason) == (answer is REFUSE)


@pytest.mark.parametrize(
    ("what", "carriers", "num_at_source", "at", "answer"),
    [
        (FIRST_HALF, RELEASED, 120, 100.3, WAIT),  # it holds more
        (FIRST_HALF, RELEASED, 120, 130.0, ANALYSE),  # and does not send it
        (WHOLE, IN_SEQUENCE, 40, 100.3, ANALYSE),  # all are here
        (WHOLE, BROKEN, 40, 100.3, ANALYSE),
        (SECOND_HALF, RELEASED, 60, 100.3, ANALYSE),  # numbered from 61
        (WHOLE, OPEN, 40, 100.3, WAIT),
        (GAP, RELEASED, 37, 100.3, WAIT),  # the source lacks them, too; another may have them
        (WHOLE, RELEASED, 39, 100.3, ANALYSE),  # fewer: it counts otherwise, and tells nothing
        (WHOLE, IN_SEQUENCE, 39, 100.3, WAIT),
    ],
)
def test_the_source_is_believed(
    what: list[SliceHeader], carriers: list[Carrier], num_at_source: int, at: float, answer: Answer
) -> None:
    evidence = Evidence(headers=what, carriers=carriers, last_received_at=100.0, num_instances=len(what))
    counted = replace(evidence, num_at_source=num_at_source)
    assert judge(counted, RULES, quiet_time_s=QUIET_S, now=at).answer is answer
    asked = judge(replace(evidence, is_source_asked=True), RULES, quiet_time_s=QUIET_S, now=at).answer
    assert asked is (WAIT if at < 130.0 else answer)


@pytest.mark.parametrize(
    ("numbers", "whole"),
    [
        ([1, 2, 3], True),
        ([0, 1, 2], True),
        ([3, 1, 2], True),
        ([2, 3, 4], False),
        ([1, 2, 4], False),
        ([1, 1, 1], True),
        ([1, 2, None], True),
        ([], True),
        ([1], True),
    ],
)
def test_instance_numbers(numbers: list[int | None], whole: bool) -> None:
    slices = [replace(header, instance_number=number) for header, number in zip(WHOLE, numbers, strict=False)]
    assert are_numbers_whole(slices) is whole


def test_frames_of_one_instance_share_its_number() -> None:
    frames = [replace(WHOLE[0], frame_number=number, instance_number=7) for number in range(1, 40)]
    assert are_numbers_whole(frames)


# ---- how long the next association is awaited ----


@pytest.mark.parametrize(
    ("pauses", "wait_s"),
    [
        ([], QUIET_S),
        ([0.1, 0.1], QUIET_S),  # too few to go by
        ([0.1, 0.1, 0.1], 2.0),
        ([0.0] * 100, 2.0),
        ([0.1, 3.0, 0.1], 12.0),
        ([0.1, 9.0, 0.1], QUIET_S),  # never longer
    ],
)
def test_settling(pauses: list[float], wait_s: float) -> None:
    assert settling_s(pauses, QUIET_S) == wait_s


def test_pauses_are_when_nothing_was_open() -> None:
    assert pauses_s([sent(5.0, 9.0), sent(0.0, 2.0), sent(8.0, 8.5), sent(10.0)]) == [3.0, 0.0, 1.0]


@pytest.mark.parametrize("num_pauses", [3, 29])
def test_the_chance_of_a_false_start_is_what_the_docstring_says(num_pauses: int) -> None:
    """With exponential pauses; the mean does not matter while the floor is out of play."""
    draw = random.Random(7)
    num_trials = 40_000
    too_early = 0
    for _ in range(num_trials):
        pauses = [draw.expovariate(1 / 100) for _ in range(num_pauses)]
        too_early += draw.expovariate(1 / 100) > settling_s(pauses, 1e9)
    assert too_early / num_trials == pytest.approx(1 / math.comb(num_pauses + 4, 4), abs=3e-3)


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ([], []),
        ([[sent(0.0, 5.0), sent(6.0, 9.0)]] * 2, []),  # too few to call it a habit
        ([[sent(0.0, 5.0), sent(6.0, 9.0)]] * 3, [1.0, 1.0, 1.0]),
        ([[sent(0.0, 5.0), sent(6.0, 9.0)]] * 4 + [[sent(0.0, 5.0)]], []),  # not always
        ([[sent(0.0, 5.0), sent(500.0, 509.0)]] * 3, []),  # late slices are no habit
    ],
)
def test_the_habit_of_a_sender(earlier: Sequence[Sequence[Carrier]], expected: list[float]) -> None:
    assert habit_s(earlier, QUIET_S) == expected


def test_a_sender_that_always_splits_is_awaited_after_its_first_part() -> None:
    habit = habit_s([[sent(0.0, 5.0), sent(6.0, 9.0)]] * 3, QUIET_S)
    evidence = Evidence(headers=WHOLE, carriers=RELEASED, last_received_at=100.0, num_instances=40, habit_s=habit)
    assert judge(evidence, RULES, quiet_time_s=QUIET_S, now=104.0).answer is WAIT
    assert judge(evidence, RULES, quiet_time_s=QUIET_S, now=104.2).answer is ANALYSE


@pytest.mark.parametrize(
    ("carriers", "is_interrupted"),
    [
        ([], False),
        ([Carrier(opened_at=1, ended_at=2, released=True)], False),
        ([Carrier(opened_at=1, ended_at=2)], True),
        ([Carrier(opened_at=1, ended_at=2), Carrier(opened_at=3, ended_at=4, released=True)], False),
        ([Carrier(opened_at=1, ended_at=2, released=True), Carrier(opened_at=1, ended_at=4)], True),
        ([Carrier(opened_at=1, ended_at=2), Carrier(opened_at=3)], True),
    ],
)
def test_a_sender_that_broke_off_and_did_not_come_back_interrupted_it(
    carriers: list[Carrier], is_interrupted: bool
) -> None:
    assert was_interrupted(carriers) is is_interrupted
