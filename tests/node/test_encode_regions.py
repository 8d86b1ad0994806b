"""Fracture findings: what hangs together is one, and it has a side where that is clear."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from model import read_series
from node.encode.frames import marked_part
from node.encode.regions import FractureRegion, find_regions
from tests.factories import make_ct_series
from tests.model.test_measure import GRID, vertebra
from tests.node.analysed_series import RULES, analysis_of, children, encode, group_of, value


def regions_at(*boxes: tuple[slice, slice, slice]) -> tuple[FractureRegion, ...]:
    """The findings of C5 on a drawn vertebra, marked in these boxes."""
    vertebrae = vertebra().astype(np.uint8) * 5
    fractures = np.zeros_like(vertebrae)
    for box in boxes:
        fractures[box] = 5
    fractured, whole = marked_part(fractures), marked_part(vertebrae)
    assert fractured is not None
    marked, regions = find_regions(fractured, whole, GRID)
    assert set(np.unique(marked.labels)) - {0} == set(range(1, len(regions) + 1))
    return regions


PLANES, ROWS = slice(35, 45), slice(45, 60)


def test_parts_with_a_gap_between_them_are_findings_of_their_own_the_largest_first() -> None:
    small, large = (PLANES, ROWS, slice(30, 33)), (PLANES, ROWS, slice(62, 70))
    first, second = regions_at(small, large)
    assert (first.name, second.name) == ("C5 fracture 1", "C5 fracture 2")
    assert first.volume_mm3 == pytest.approx(10 * 15 * 8 * 0.125)
    assert second.volume_mm3 == pytest.approx(10 * 15 * 3 * 0.125)
    assert set(first.planes) == set(range(35, 45))


def test_dashes_of_one_line_are_one_finding() -> None:
    (region,) = regions_at((PLANES, ROWS, slice(30, 33)), (PLANES, ROWS, slice(36, 40)))
    assert region.volume_mm3 == pytest.approx(10 * 15 * 7 * 0.125)


@pytest.mark.parametrize(
    ("columns", "side"),
    [(slice(62, 72), "Left"), (slice(28, 38), "Right"), (slice(30, 70), None), (slice(48, 56), None)],
    ids=["left", "right", "both", "at the midline"],
)
def test_a_finding_has_a_side_only_where_it_is_clear(columns: slice, side: str | None) -> None:
    (region,) = regions_at((PLANES, ROWS, columns))
    assert (region.laterality.meaning if region.laterality else None) == side


def test_the_report_says_side_and_size_of_a_finding_and_the_heights_of_the_body(tmp_path: Path) -> None:
    """On a Series whose C5 is the drawn vertebra, and fractured on its left."""
    num_slices, rows, columns = GRID.shape
    paths = make_ct_series(
        tmp_path / "ct",
        num_slices=num_slices,
        rows=rows,
        columns=columns,
        spacing_mm=0.5,
        pixel_spacing_mm=(0.5, 0.5),
        origin_lps_mm=GRID.affine[:3, 3],
    )
    volume = read_series(paths, RULES)
    drawn = analysis_of(volume, seen=("C5",), fractured=("C5",))
    vertebrae = vertebra().astype(np.uint8) * 5
    fractures = np.zeros_like(vertebrae)
    fractures[PLANES, ROWS, 62:72] = 5
    analysis = replace(drawn, vertebrae=vertebrae, fractures=fractures)
    report = pydicom.dcmread(encode(volume, analysis, tmp_path / "out")["report.sr"].path)

    region = group_of(report, "C5 fracture 1")
    (site,) = children(region, "363698007")
    assert site.ContentSequence[0].ConceptCodeSequence[0].CodeMeaning == "Left"
    (size,) = children(region, "118565006")
    assert float(size.MeasuredValueSequence[0].NumericValue) == pytest.approx(0.19, abs=0.005)
    key_slices = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in size.ContentSequence]
    assert key_slices == [volume.slices[z].sop_instance_uid for z in (35, 36, 37)]
    level = group_of(report, "C5")
    heights = {
        item.ContentSequence[0].ContentSequence[0].ConceptCodeSequence[0].CodeMeaning: float(
            item.MeasuredValueSequence[0].NumericValue
        )
        for item in children(level, "121207")
    }
    assert heights == pytest.approx({"Anterior": 12.0, "Central": 12.0, "Posterior": 12.0}, abs=0.3)
    assert "no better than it" in str([item.TextValue for item in children(children(report, "C0034375")[0], "121106")])
    assert value(level, "BODY-HT-RATIO") == pytest.approx(1, abs=0.03)
