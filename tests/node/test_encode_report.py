"""The structured report, item by item, as `encode_results` writes it."""

from dataclasses import replace
from pathlib import Path

import highdicom as hd
import pydicom
import pytest
from pydicom.dataset import Dataset

from model import (
    LEVELS,
    Finding,
    SliceWeight,
)
from tests.node.analysed_series import (
    ABSENT,
    FRACTURE,
    LEVEL_CODES,
    PRESENT,
    UNDETERMINED,
    analysis_of,
    check_conformance,
    children,
    encode,
    group_of,
    groups,
    series,
    template,
    value,
)


def test_report_has_the_patient_and_all_seven_levels_negatives_included(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume, seen=LEVELS[:6]), tmp_path / "out")
    report = pydicom.dcmread(made["report.sr"].path)

    assert report.SOPClassUID == pydicom.uid.Comprehensive3DSRStorage
    assert report.ConceptNameCodeSequence[0].CodeValue == "126000"
    assert template(report) == "1500"
    assert list(groups(report)) == ["C1-C7", *LEVELS[:5], "C5 fracture 1", *LEVELS[5:]]
    found = groups(report)
    region = found.pop("C5 fracture 1")
    answers = {name: value(group, FRACTURE) for name, group in found.items()}
    assert answers == {
        **dict.fromkeys(LEVELS, ABSENT),
        "C1-C7": PRESENT,
        "C5": PRESENT,
        "C7": UNDETERMINED,
    }
    assert (value(region, "121071"), value(region, "363698007")) == (FRACTURE, LEVEL_CODES["C5"])
    for name, group in found.items():
        assert value(group, "121071") == FRACTURE
        assert value(group, "363698007") == LEVEL_CODES.get(name, "122494005")
        assert (value(group, "111001"), value(group, "111003")) == ("test-model", "1.2.3")
    assert value(group_of(report, "C1-C7"), "111012") == 87.5
    assert value(group_of(report, "C5"), "111012") == 87.5
    assert value(group_of(report, "C1"), "111012") == 4.0
    assert value(group_of(report, "C3"), "118565006") == 1.0  # cm3, of 1003 mm3
    (certainty,) = children(group_of(report, "C5"), "111012")
    assert certainty.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "%"


def test_report_says_from_where_on_a_level_is_called_fractured(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)
    model = replace(analysis.findings.model, level_operating_points={"C7": 0.25})
    analysis = replace(analysis, findings=replace(analysis.findings, model=model))

    report = pydicom.dcmread(encode(volume, analysis, tmp_path / "out")["report.sr"].path)

    said = [item.TextValue for item in children(group_of(report, "C7"), "111002")]
    assert said == ["called present from a probability of 50 %", "C7: called present from a probability of 25 %"]


def test_a_level_in_view_refers_to_its_segment_and_another_does_not(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume, seen=("C2", "C4")), tmp_path / "out")
    report = pydicom.dcmread(made["report.sr"].path)
    seg = pydicom.dcmread(made["vertebrae.seg"].path)

    for segment in seg.SegmentSequence:
        group = group_of(report, segment.SegmentLabel)
        assert template(group) == "1411"
        (item,) = children(group, "121191")
        (reference,) = item.ReferencedSOPSequence
        assert reference.ReferencedSOPInstanceUID == seg.SOPInstanceUID
        assert reference.ReferencedSegmentNumber == segment.SegmentNumber
        assert value(group, "112040") == segment.TrackingUID
        assert value(group, "121232") == volume.series_instance_uid
    for level in ("C1", "C3", "C5", "C6", "C7"):
        group = group_of(report, level)
        assert template(group) == "1501"
        assert not children(group, "111012")
        assert "field of view" in value(group, "121106")


def test_key_slices_are_those_with_regions_then_the_most_attended(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)
    uids = [item.sop_instance_uid for item in volume.slices]
    weights = (0.1, 0.4, 0.0, 0.3, 0.2)
    levels = analysis.findings.levels | {
        "C1": replace(
            analysis.findings.levels["C1"],
            attention=tuple(SliceWeight(sop_instance_uid=u, weight=w) for u, w in zip(uids, weights, strict=False)),
        )
    }
    analysis = replace(analysis, findings=replace(analysis.findings, levels=levels))
    made = encode(volume, analysis, tmp_path / "out")
    report = pydicom.dcmread(made["report.sr"].path)

    def key_slices(level: str) -> list[str]:
        (certainty,) = children(group_of(report, level), "111012")
        return [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in certainty.ContentSequence]

    assert key_slices("C1") == [uids[1], uids[3], uids[4]]
    assert key_slices("C5")[0] == levels["C5"].regions[0].sop_instance_uid
    assert set(key_slices("C5")) <= {item.sop_instance_uid for item in levels["C5"].attention}


def test_report_says_its_limits_its_training_data_and_its_warnings(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume, seen=LEVELS[:6]), tmp_path / "out")
    report = pydicom.dcmread(made["report.sr"].path)

    (evaluations,) = children(report, "C0034375")
    assert value(evaluations, "121077") == "Fracture suspected: C5 (87.5 %). Not judged: C7."
    comments = [item.TextValue for item in children(evaluations, "121106")]
    assert "Research use only, not a medical device." in comments[0]
    assert comments[1:] == ["Model test-model 1.2.3: Trained on phantoms only.", "Slices are 1.0 mm apart."]
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "COMPLETE",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    assert "not a medical device" in value(report, "121013")


def test_a_warning_beyond_the_sources_character_set_is_kept(tmp_path: Path) -> None:
    def edit(_: int, ds: Dataset) -> None:
        ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Müller^Jörg"

    volume = series(tmp_path, edit=edit)
    analysis = analysis_of(volume)
    analysis = replace(analysis, findings=replace(analysis.findings, warnings=("Spacing ≥ 1 mm.",)))
    report = pydicom.dcmread(encode(volume, analysis, tmp_path / "out")["report.sr"].path)

    (evaluations,) = children(report, "C0034375")
    assert children(evaluations, "121106")[-1].TextValue == "Spacing ≥ 1 mm."
    assert report.PatientName == "Müller^Jörg"


@pytest.mark.parametrize("kind", ["axial", "enhanced"])
def test_evidence_is_every_source_instance_and_the_segmentations(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out")
    report = pydicom.dcmread(made["report.sr"].path)

    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    named = {
        series_item.SeriesInstanceUID: [item.ReferencedSOPInstanceUID for item in series_item.ReferencedSOPSequence]
        for series_item in study.ReferencedSeriesSequence
    }

    assert sorted(named.pop(volume.series_instance_uid)) == sorted({s.sop_instance_uid for s in volume.slices})
    assert named == {
        made[kind].series_instance_uid: [made[kind].sop_instance_uid] for kind in ("vertebrae.seg", "fractures.seg")
    }


def test_nothing_found_gives_a_report_without_segmentations(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume, seen=(), fractured=()), tmp_path / "out")

    assert list(made) == ["report.sr"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.sr.dcm"]
    report = pydicom.dcmread(made["report.sr"].path)
    assert {value(group, FRACTURE) for group in groups(report).values()} == {UNDETERMINED}
    assert {template(group) for group in groups(report).values()} == {"1501"}
    (evaluations,) = children(report, "C0034375")
    assert value(evaluations, "121077") == "Undetermined: no level could be judged."
    check_conformance(made["report.sr"].path)


def test_a_single_level_gives_one_segment(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume, seen=("C4",), fractured=("C4",)), tmp_path / "out")

    for kind in ("vertebrae.seg", "fractures.seg"):
        seg = hd.seg.segread(made[kind].path)
        assert seg.number_of_segments == 1
        assert seg.get_pixels_by_source_instance(
            [made_slice.sop_instance_uid for made_slice in volume.slices],
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        ).any()
        check_conformance(made[kind].path)


def test_a_level_that_is_not_judged_says_why(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume, seen=LEVELS[:6], fractured=())
    reason = "Metal in or at the vertebra"
    metal = replace(
        analysis.findings.levels["C6"], probability=None, finding=Finding.UNDETERMINED, reason=reason, attention=()
    )
    findings = replace(analysis.findings, levels=analysis.findings.levels | {"C6": metal})
    report = pydicom.dcmread(encode(volume, replace(analysis, findings=findings), tmp_path / "out")["report.sr"].path)

    assert value(group_of(report, "C6"), "121106") == f"{reason}."
    assert value(group_of(report, "C7"), "121106") == "Not found in the field of view."
    assert not children(group_of(report, "C5"), "121106")
