"""Reports that a Series was not analysed, and reports that supersede others."""

from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from model import LEVELS, read_series
from node.encode import ResultObject, encode_refusal
from node.profiles import PRESETS, Profile, files_for
from tests.factories import make_ct_series, make_enhanced_ct
from tests.node.analysed_series import (
    FRACTURE,
    MODEL,
    NODE,
    RULES,
    UNDETERMINED,
    analysis_of,
    check_conformance,
    children,
    encode,
    groups,
    series,
    value,
)
from tests.node.test_encode import without_dates

REASON = "Series 1.2.3 has slice gaps of 1.0 mm and 3.0 mm; uniform spacing is needed."


def refuse(paths: list[Path], folder: Path, *profiles: Profile, reason: str = REASON) -> dict[str, ResultObject]:
    folder.mkdir()
    made = encode_refusal(reason, paths, folder, model=MODEL, node=NODE, profiles=profiles or (Profile(),))
    return {item.kind: item for item in made}


@pytest.mark.parametrize("is_enhanced", [False, True], ids=["CT", "Enhanced CT"])
def test_a_refused_series_gets_a_report_that_says_so_coded_and_in_words(is_enhanced: bool, tmp_path: Path) -> None:
    if is_enhanced:
        paths = [make_enhanced_ct(tmp_path / "enhanced.dcm", num_frames=4)]
    else:
        paths = make_ct_series(tmp_path / "ct", num_slices=3)
    made = refuse(paths, tmp_path / "out", Profile(), PRESETS["plain-pacs"])
    assert [item.path.name for item in made.values()] == ["report.sr.dcm", "report.comprehensive.no-seg.sr.dcm"]
    source = pydicom.dcmread(paths[0])

    for item in made.values():
        check_conformance(item.path)
        report = pydicom.dcmread(item.path)
        assert (report.PatientID, report.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
        (evaluations,) = children(report, "C0034375")
        assert value(evaluations, "111017") == "111245"  # no algorithms succeeded
        assert value(evaluations, "121077") == f"Not analysed: {REASON}"
        assert "Research use only" in children(evaluations, "121106")[0].TextValue
        found = groups(report)
        assert list(found) == ["C1-C7", *LEVELS]
        assert {value(group, FRACTURE) for group in found.values()} == {UNDETERMINED}
        (study,) = report.CurrentRequestedProcedureEvidenceSequence
        evidence = [ref.ReferencedSOPInstanceUID for ref in study.ReferencedSeriesSequence[0].ReferencedSOPSequence]
        assert sorted(evidence) == sorted(pydicom.dcmread(path).SOPInstanceUID for path in paths)


def test_a_refusal_made_again_has_the_same_bytes_and_another_reason_other_uids(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=3)
    first = refuse(paths, tmp_path / "first")["report.sr"]
    again = refuse(paths[::-1], tmp_path / "again")["report.sr"]
    other = refuse(paths, tmp_path / "other", reason="Too few slices.")["report.sr"]

    assert without_dates(first.path) == without_dates(again.path)
    assert first.sop_instance_uid != other.sop_instance_uid


def predecessors(report: Dataset) -> list[tuple[str, str]]:
    """(Series, SOP Instance UID) of each predecessor."""
    return [
        (series_item.SeriesInstanceUID, item.ReferencedSOPInstanceUID)
        for study in report.get("PredecessorDocumentsSequence", [])
        for series_item in study.ReferencedSeriesSequence
        for item in series_item.ReferencedSOPSequence
    ]


def test_a_report_names_the_one_it_supersedes_and_keeps_it_when_made_again(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=10)
    refused = refuse(paths[:3], tmp_path / "refused")["report.sr"]
    early = read_series(paths[:9], RULES)
    volume = read_series(paths, RULES)

    first = encode(early, analysis_of(early), tmp_path / "first", previous_dir=tmp_path / "refused")
    second = encode(volume, analysis_of(volume), tmp_path / "second", previous_dir=tmp_path / "first")
    again = encode(volume, analysis_of(volume), tmp_path / "again", previous_dir=tmp_path / "second")

    reports = [pydicom.dcmread(made["report.sr"].path) for made in (first, second)]
    assert predecessors(reports[0]) == [(refused.series_instance_uid, refused.sop_instance_uid)]
    earlier = first["report.sr"]
    assert predecessors(reports[1]) == [(earlier.series_instance_uid, earlier.sop_instance_uid)]
    assert without_dates(again["report.sr"].path) == without_dates(second["report.sr"].path)
    check_conformance(second["report.sr"].path)


def test_a_first_report_has_no_predecessor(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out")
    assert "PredecessorDocumentsSequence" not in pydicom.dcmread(made["report.sr"].path)


def test_what_is_sent_of_a_refusal_is_the_report(tmp_path: Path) -> None:
    made = refuse(make_ct_series(tmp_path / "ct", num_slices=3), tmp_path / "out", Profile(max_frames=400))
    assert files_for(Profile(max_frames=400), [item.path.name for item in made.values()]) == ("report.sr.dcm",)
