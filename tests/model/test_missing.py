"""What tells that a stack is not the whole Series, and what does not."""

from dataclasses import replace

import pytest

from model.missing import missing_instances
from model.series import SeriesRules, SliceHeader, check_series
from tests.model.test_series import headers_at

RULES = SeriesRules(min_slices=3, min_extent_mm=1.0)


def numbered(numbers: list[int | None], heights_mm: list[float] | None = None) -> list[SliceHeader]:
    headers = headers_at(heights_mm or [float(i) for i in range(len(numbers))])
    return [replace(header, instance_number=number) for header, number in zip(headers, numbers, strict=True)]


def told(headers: list[SliceHeader], num_at_source: int | None = None, *, is_interrupted: bool = False) -> str:
    stack = check_series(headers, RULES, final=True)
    return missing_instances(headers, stack, num_at_source, is_interrupted=is_interrupted)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (list(range(1, 100, 2)), "Of InstanceNumbers 1 to 99, 49 are not here: Instances may be missing."),
        ([99, 97, 95, 94], "Of InstanceNumbers 94 to 99, 2 are not here: Instances may be missing."),
        ([51, 52, 53, 54], "InstanceNumbers begin at 51: Instances before that may be missing."),
        ([1, 2, 3, 4], ""),
        ([3, 2, 1, 0], ""),
        ([1, 1, 1, 1], ""),  # as some scanners write them
        ([1, 2, 9, 9], ""),
        ([None, 1, 5, 9], ""),
    ],
)
def test_what_instance_numbers_tell(numbers: list[int | None], words: str) -> None:
    assert told(numbered(numbers)) == words


def test_a_bridged_slice_is_told_of_once() -> None:
    assert told(numbered([1, 2, 4, 5], [0, 1, 3, 4])) == ""
    assert "6 are not here" in told(numbered([1, 2, 5, 10], [0, 1, 3, 4]))


def test_a_scout_that_is_numbered_apart_makes_no_gap() -> None:
    slices = numbered([1, 2, 4, 5])
    scout = replace(slices[0], sop_instance_uid="1.9", instance_number=1000, image_type=("LOCALIZER",))
    assert "1 are not here" in told([*slices, scout])
    assert told([*slices, replace(scout, instance_number=3)]) == ""


def test_frames_of_one_instance_have_one_number() -> None:
    frames = [
        replace(header, sop_instance_uid="1.2.0", frame_number=number, instance_number=7)
        for number, header in enumerate(headers_at([0, 1, 2, 3]), start=1)
    ]
    assert told(frames) == ""


def test_the_count_of_the_source_outranks_the_numbers() -> None:
    odd = numbered([1, 3, 5, 7])
    assert told(odd, 4) == ""
    assert told(numbered([1, 2, 3, 4]), 100) == "Its source holds 100 Instances, and 4 came."
    assert "may be missing" in told(odd, 2)  # it knows of fewer than came: it has not got all itself


def test_a_sender_that_broke_off_may_not_have_sent_all() -> None:
    assert told(numbered([1, 2, 3, 4]), is_interrupted=True).startswith("Its sender broke off, or Instances were ref")
    assert told(numbered([1, 2, 3, 4]), num_at_source=4, is_interrupted=True) == ""
    assert "begin at 51" in told(numbered([51, 52, 53, 54]), is_interrupted=True)
