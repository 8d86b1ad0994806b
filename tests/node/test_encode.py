"""SEG and SR: written by `encode_results`, read back by highdicom, pydicom, dicom3tools and dcmtk.

The masks are drawn by a function of the place in the patient, so a test asks of every stored voxel: is this the level
that belongs at these LPS coordinates?
"""

import logging
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from scipy.spatial.transform import Rotation

from model import (
    LEVELS,
    Analysis,
    Finding,
    Findings,
    LevelFinding,
    ModelInfo,
    PatientFinding,
    Region,
    SeriesRules,
    SliceWeight,
    Volume,
    read_series,
)
from node.encode import NodeIdentity, ResultObject, encode_results
from tests.factories import make_ct_series, make_enhanced_ct

NODE = NodeIdentity(ae_title="TESTNODE", software_version="9.9")
MODEL = ModelInfo(name="test-model", version="1.2.3", trained_on="Trained on phantoms only.", operating_point=0.5)
RULES = SeriesRules(min_slices=4, min_extent_mm=5.0)
LEVEL_CODES = dict(
    zip(LEVELS, ("14806007", "39976000", "113205007", "5329002", "36978003", "36054005", "87391001"), strict=True)
)

OBLIQUE = tuple(Rotation.from_euler("xyz", [18, -9, 12], degrees=True).as_matrix().T[:2].ravel().tolist())

SINGLE_FRAME: dict[str, dict[str, Any]] = {
    "axial": {},
    "head to foot": {"reverse": True},
    "oblique": {"orientation": OBLIQUE},
    # Rows run to the patient's right, so the slices are stored head to foot along their normal.
    "flipped in plane": {"orientation": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "origin_lps_mm": (14.0, -7.0, 11.0)},
    "feet first prone": {"orientation": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)},
    "tilted gantry": {"tilt_deg": 15.0},
}


def series(folder: Path, kind: str = "axial", **changes: Any) -> Volume:
    """A small Series of one way to scan, written and read."""
    if kind.startswith("enhanced"):
        order = (3, 0, 4, 1, 9, 2, 8, 5, 7, 6) if kind == "enhanced, frames out of order" else None
        paths = [make_enhanced_ct(folder / "enhanced.dcm", num_frames=10, frame_order=order, **changes)]
    else:
        paths = make_ct_series(folder / "ct", num_slices=10, **SINGLE_FRAME[kind], **changes)
    return read_series(paths, RULES)


def level_at(points_lps_mm: NDArray[np.float64], middle_lps_mm: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Label at LPS points: seven slabs from head to foot, each narrower to the left and the front than the last."""
    x, y, z = np.moveaxis(points_lps_mm - middle_lps_mm, -1, 0)
    label = np.clip(np.floor(4.03 - z / 1.1), 1, 7)
    inside = (x > -4.6) & (x < 5.3 - 0.7 * label) & (y > -3.4 + 0.4 * label) & (y < 3.7) & (np.abs(z) < 3.9)
    return np.where(inside, label, 0).astype(np.uint8)


def grid_points(volume: Volume) -> NDArray[np.float64]:
    """LPS mm `(Z, Y, X, 3)` of every voxel."""
    return volume.grid.to_lps_mm(np.stack(np.indices(volume.grid.shape), axis=-1).astype(float))


def middle(volume: Volume) -> NDArray[np.float64]:
    """LPS mm of the centre of a volume."""
    return volume.grid.to_lps_mm((np.array(volume.grid.shape) - 1) / 2)


def analysis_of(volume: Volume, *, seen: tuple[str, ...] = LEVELS, fractured: tuple[str, ...] = ("C5",)) -> Analysis:
    """An analysis with these levels in view and these of them fractured, the masks drawn by `level_at`."""
    vertebrae = level_at(grid_points(volume), middle(volume))
    wanted = np.array([0] + [label if name in seen else 0 for label, name in enumerate(LEVELS, 1)], np.uint8)
    vertebrae = wanted[vertebrae]
    fractures = np.zeros_like(vertebrae)
    unseen = LevelFinding(in_field_of_view=False, probability=None, finding=Finding.UNDETERMINED)
    levels = dict.fromkeys(LEVELS, unseen)
    for label, name in enumerate(LEVELS, start=1):
        if name not in seen:
            continue
        places = np.argwhere(vertebrae == label)
        slices = [volume.slices[z].sop_instance_uid for z in np.unique(places[:, 0])]
        is_fractured = name in fractured
        if is_fractured:
            fractures[tuple(places[: len(places) // 2].T)] = label
        levels[name] = LevelFinding(
            in_field_of_view=True,
            probability=0.875 if is_fractured else 0.04,
            finding=Finding.PRESENT if is_fractured else Finding.ABSENT,
            centroid_lps_mm=(0.0, 0.0, 0.0),
            volume_mm3=1000.0 + label,
            attention=tuple(SliceWeight(sop_instance_uid=uid, weight=1 / len(slices)) for uid in slices),
            regions=(Region(sop_instance_uid=slices[-1], x=1, y=2, width=3, height=4),) if is_fractured else (),
        )
    judged = [level.probability for level in levels.values() if level.probability is not None]
    overall = PatientFinding(
        probability=max(judged) if judged else None,
        finding=Finding.UNDETERMINED if not judged else Finding.PRESENT if max(judged) >= 0.5 else Finding.ABSENT,
    )
    findings = Findings(
        study_instance_uid=volume.study_instance_uid,
        series_instance_uid=volume.series_instance_uid,
        model=MODEL,
        patient_overall=overall,
        levels=levels,
        warnings=("Slices are 1.0 mm apart.",),
    )
    return Analysis(findings=findings, vertebrae=vertebrae, fractures=fractures)


def encode(volume: Volume, analysis: Analysis, folder: Path) -> dict[str, ResultObject]:
    """What was written, by kind."""
    folder.mkdir(exist_ok=True)
    return {made.kind: made for made in encode_results(analysis, volume.slices, volume.grid, folder, node=NODE)}


def code_of(sequence: Any) -> tuple[str, str]:
    """(code, scheme) of a single-item code sequence."""
    (item,) = sequence
    return item.CodeValue, item.CodingSchemeDesignator


# --- Segmentations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced", "enhanced, frames out of order"])
def test_every_voxel_lies_where_its_vertebra_lies_in_the_patient(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    analysis = analysis_of(volume)
    assert set(np.unique(analysis.vertebrae)) == set(range(8))
    made = encode(volume, analysis, tmp_path / "out")
    centre = middle(volume)

    # With pydicom alone, frame by frame.
    ds = pydicom.dcmread(made["vertebrae.seg"].path)
    labels = {segment.SegmentNumber: LEVELS.index(segment.SegmentLabel) + 1 for segment in ds.SegmentSequence}
    num_voxels = 0
    for frame, points, number in frames(ds):
        expected = level_at(points, centre) == labels[number]
        assert np.array_equal(frame, expected)
        num_voxels += int(frame.sum())
    assert num_voxels == np.count_nonzero(analysis.vertebrae)

    # With highdicom, as a volume; its volumes know no shear.
    if kind != "tilted gantry":
        found = hd.seg.segread(made["vertebrae.seg"].path).get_volume(combine_segments=True)
        indices = np.stack(np.indices(found.array.shape), axis=-1).reshape(-1, 3)
        points = found.map_indices_to_reference(indices).reshape(*found.array.shape, 3)
        assert np.array_equal(found.array, level_at(points, centre))


def frames(ds: Dataset) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float64], int]]:
    """Pixels, LPS mm `(Y, X, 3)` and segment number of each frame of a SEG, by PS3.3 C.7.6.2.1.1."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    row_mm, column_mm = (float(value) for value in shared.PixelMeasuresSequence[0].PixelSpacing)
    j, i = np.meshgrid(np.arange(ds.Rows), np.arange(ds.Columns), indexing="ij")
    in_plane = row * column_mm * i[..., None] + column * row_mm * j[..., None]
    pixels = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    for frame, item in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
        groups = item if "SegmentIdentificationSequence" in item else shared
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        yield frame.astype(bool), position + in_plane, number


@pytest.mark.parametrize("kind", ["axial", "head to foot", "enhanced, frames out of order"])
def test_each_frame_names_the_slice_it_lies_on(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out")
    ds = pydicom.dcmread(made["vertebrae.seg"].path)
    sources = {path: pydicom.dcmread(path) for path in {item.path for item in volume.slices}}
    by_uid = {source.SOPInstanceUID: source for source in sources.values()}

    for item in ds.PerFrameFunctionalGroupsSequence:
        reference = item.DerivationImageSequence[0].SourceImageSequence[0]
        source = by_uid[reference.ReferencedSOPInstanceUID]
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
        if kind.startswith("enhanced"):
            frame = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
            position = frame.PlanePositionSequence[0].ImagePositionPatient
        else:
            position = source.ImagePositionPatient
        assert item.PlanePositionSequence[0].ImagePositionPatient == position
    named = [item.ReferencedSOPInstanceUID for item in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    assert len(named) == len(set(named))
    assert set(named) <= set(by_uid)
    assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == volume.series_instance_uid
    assert ds.FrameOfReferenceUID == next(iter(sources.values())).FrameOfReferenceUID


def test_highdicom_finds_the_mask_by_source_instance(tmp_path: Path) -> None:
    volume = series(tmp_path, "head to foot")
    analysis = analysis_of(volume)
    made = encode(volume, analysis, tmp_path / "out")

    seg = hd.seg.segread(made["vertebrae.seg"].path)
    pixels = seg.get_pixels_by_source_instance(
        [item.sop_instance_uid for item in volume.slices],
        combine_segments=True,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )

    assert np.array_equal(pixels, analysis.vertebrae)


def test_segments_say_what_they_are_and_who_found_them(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out")
    ds = pydicom.dcmread(made["vertebrae.seg"].path)

    assert ds.SegmentationType == "BINARY"
    assert ds.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert [segment.SegmentLabel for segment in ds.SegmentSequence] == list(LEVELS)
    assert [segment.SegmentNumber for segment in ds.SegmentSequence] == list(range(1, 8))
    for segment in ds.SegmentSequence:
        assert code_of(segment.SegmentedPropertyCategoryCodeSequence) == ("91723000", "SCT")
        assert code_of(segment.SegmentedPropertyTypeCodeSequence) == (LEVEL_CODES[segment.SegmentLabel], "SCT")
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("test-model", "1.2.3")
        assert code_of(algorithm.AlgorithmFamilyCodeSequence) == ("123110", "DCM")
        assert segment.TrackingID == segment.SegmentLabel
    assert len({tuple(segment.RecommendedDisplayCIELabValue) for segment in ds.SegmentSequence}) == 7
    assert len({segment.TrackingUID for segment in ds.SegmentSequence}) == 7
    (node,) = (item for item in ds.ContributingEquipmentSequence if item.get("DeviceUID"))
    assert code_of(node.PurposeOfReferenceCodeSequence) == ("109102", "DCM")
    assert (node.Manufacturer, node.SoftwareVersions, node.DeviceUID) == ("C-Spine Node", "9.9", NODE.device_uid)


def test_a_missing_level_shifts_segment_numbers_but_not_labels(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume, seen=("C3", "C6"), fractured=())
    made = encode(volume, analysis, tmp_path / "out")
    seg = hd.seg.segread(made["vertebrae.seg"].path)

    assert [
        (segment.segment_number, segment.segment_label)
        for segment in map(seg.get_segment_description, seg.segment_numbers)
    ] == [
        (1, "C3"),
        (2, "C6"),
    ]
    volume_of = seg.get_volume(combine_segments=True).array
    assert np.count_nonzero(volume_of == 1) == np.count_nonzero(analysis.vertebrae == 3)
    assert np.count_nonzero(volume_of == 2) == np.count_nonzero(analysis.vertebrae == 6)


def test_empty_frames_are_left_out(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)
    made = encode(volume, analysis, tmp_path / "out")

    ds = pydicom.dcmread(made["vertebrae.seg"].path)

    num_marked = sum(bool((plane == label).any()) for plane in analysis.vertebrae for label in range(1, 8))
    assert ds.NumberOfFrames == num_marked
    assert ds.pixel_array.any(axis=(1, 2)).all()


def test_a_fracture_segment_is_bound_to_its_level_by_code_and_tracking_uid(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume, fractured=("C2", "C5"))
    made = encode(volume, analysis, tmp_path / "out")
    ds = pydicom.dcmread(made["fractures.seg"].path)
    report = pydicom.dcmread(made["report.sr"].path)

    assert [segment.SegmentLabel for segment in ds.SegmentSequence] == ["C2 fracture", "C5 fracture"]
    for segment, level in zip(ds.SegmentSequence, ("C2", "C5"), strict=True):
        assert code_of(segment.SegmentedPropertyCategoryCodeSequence) == ("49755003", "SCT")
        assert code_of(segment.SegmentedPropertyTypeCodeSequence) == ("72704001", "SCT")
        assert code_of(segment.AnatomicRegionSequence) == (LEVEL_CODES[level], "SCT")
        assert segment.TrackingUID == value(group_of(report, level), "112040")
    assert sum(int(frame.sum()) for frame, _, _ in frames(ds)) == np.count_nonzero(analysis.fractures)


def test_an_interpolated_slice_gets_no_frame(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=10)
    volume = read_series([*paths[:4], *paths[5:]], RULES)
    (lost,) = (z for z, item in enumerate(volume.slices) if item.is_interpolated)
    analysis = analysis_of(volume)
    assert analysis.vertebrae[lost].any()

    made = encode(volume, analysis, tmp_path / "out")

    ds = pydicom.dcmread(made["vertebrae.seg"].path)
    rest = np.delete(analysis.vertebrae, lost, axis=0)
    assert sum(int(frame.sum()) for frame, _, _ in frames(ds)) == np.count_nonzero(rest)
    labels = {segment.SegmentNumber: LEVELS.index(segment.SegmentLabel) + 1 for segment in ds.SegmentSequence}
    for frame, points, number in frames(ds):
        assert np.array_equal(frame, level_at(points, middle(volume)) == labels[number])


# --- Report ------------------------------------------------------------------------------------------------------


def children(item: Dataset, code: str) -> list[Dataset]:
    """Content items directly below `item` with this concept name."""
    return [child for child in item.ContentSequence if child.ConceptNameCodeSequence[0].CodeValue == code]


def value(item: Dataset, code: str) -> Any:
    """Value of the one child with this concept name: text, UID, code or number."""
    (child,) = children(item, code)
    if child.ValueType == "CODE":
        return child.ConceptCodeSequence[0].CodeValue
    if child.ValueType == "NUM":
        return float(child.MeasuredValueSequence[0].NumericValue)
    return child.UID if child.ValueType == "UIDREF" else child.TextValue


def groups(report: Dataset) -> dict[str, Dataset]:
    """Measurement groups by tracking identifier."""
    (measurements,) = children(report, "126010")
    return {value(group, "112039"): group for group in children(measurements, "125007")}


def group_of(report: Dataset, level: str) -> Dataset:
    return groups(report)[level]


def template(group: Dataset) -> str:
    return str(group.ContentTemplateSequence[0].TemplateIdentifier)


FRACTURE, PRESENT, ABSENT, UNDETERMINED = "72704001", "52101004", "272519000", "373068000"


def test_report_has_the_patient_and_all_seven_levels_negatives_included(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume, seen=LEVELS[:6]), tmp_path / "out")
    report = pydicom.dcmread(made["report.sr"].path)

    assert report.SOPClassUID == pydicom.uid.Comprehensive3DSRStorage
    assert report.ConceptNameCodeSequence[0].CodeValue == "126000"
    assert template(report) == "1500"
    assert list(groups(report)) == ["C1-C7", *LEVELS]
    answers = {name: value(group, FRACTURE) for name, group in groups(report).items()}
    assert answers == {
        **dict.fromkeys(LEVELS, ABSENT),
        "C1-C7": PRESENT,
        "C5": PRESENT,
        "C7": UNDETERMINED,
    }
    for name, group in groups(report).items():
        assert value(group, "121071") == FRACTURE
        assert value(group, "363698007") == LEVEL_CODES.get(name, "122494005")
        assert (value(group, "111001"), value(group, "111003")) == ("test-model", "1.2.3")
    assert value(group_of(report, "C1-C7"), "111012") == 87.5
    assert value(group_of(report, "C5"), "111012") == 87.5
    assert value(group_of(report, "C1"), "111012") == 4.0
    assert value(group_of(report, "C3"), "118565006") == 1.0  # cm3, of 1003 mm3
    (certainty,) = children(group_of(report, "C5"), "111012")
    assert certainty.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "%"


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


def test_key_slices_are_those_with_regions_or_else_the_most_attended(tmp_path: Path) -> None:
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
    assert key_slices("C5") == [levels["C5"].regions[0].sop_instance_uid]


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


# --- UIDs and repeats --------------------------------------------------------------------------------------------


DATES = {"InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime", "ContributionDateTime"}


def without_dates(path: Path) -> bytes:
    """The file's bytes with every date and time of its making emptied."""

    def empty(ds: Dataset, element: pydicom.DataElement) -> None:
        if element.keyword in DATES:
            element.value = ""

    ds = pydicom.dcmread(path)
    ds.walk(empty)
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_a_repeat_gives_the_same_bytes_dates_aside(tmp_path: Path) -> None:
    volume = series(tmp_path)
    first = encode(volume, analysis_of(volume), tmp_path / "first")
    second = encode(volume, analysis_of(volume), tmp_path / "second")

    assert list(first) == ["vertebrae.seg", "fractures.seg", "report.sr"]
    for kind in first:
        assert without_dates(first[kind].path) == without_dates(second[kind].path)


def uids_of(made: dict[str, ResultObject]) -> list[str]:
    return [uid for item in made.values() for uid in (item.sop_instance_uid, item.series_instance_uid)]


def test_uids_follow_the_instances_and_the_model_version(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)
    uids = uids_of(encode(volume, analysis, tmp_path / "out"))
    newer = replace(analysis, findings=replace(analysis.findings, model=replace(MODEL, version="1.2.4")))
    other = series(tmp_path / "other")

    assert len(set(uids)) == 6
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)
    assert not set(uids) & set(uids_of(encode(volume, newer, tmp_path / "newer")))
    assert not set(uids) & set(uids_of(encode(other, analysis_of(other), tmp_path / "other out")))


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out")

    for item in made.values():
        ds = pydicom.dcmread(item.path)
        assert (item.sop_class_uid, item.sop_instance_uid) == (ds.SOPClassUID, ds.SOPInstanceUID)
        assert item.series_instance_uid == ds.SeriesInstanceUID
        assert ds.StudyInstanceUID == volume.study_instance_uid
    numbers = [pydicom.dcmread(item.path).SeriesNumber for item in made.values()]
    assert numbers == [9001, 9002, 9003]


def test_nodes_differ_in_their_device_uid() -> None:
    assert NodeIdentity(ae_title="A").device_uid != NodeIdentity(ae_title="B").device_uid
    assert NodeIdentity(ae_title="A").device_uid == NodeIdentity(ae_title="A", software_version="0").device_uid


def test_masks_of_another_grid_are_refused(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)

    with pytest.raises(ValueError, match="Masks, grid and slices differ"):
        encode(volume, replace(analysis, fractures=analysis.fractures[1:]), tmp_path / "out")


# --- Headers as they come ----------------------------------------------------------------------------------------


def rewrite(paths: list[Path], change: Callable[[Dataset], None]) -> None:
    """Changes stored Instances, also in ways pydicom would not write by itself."""
    for path in paths:
        ds = pydicom.dcmread(path)
        change(ds)
        ds.save_as(path, enforce_file_format=False)


def _drop(*keywords: str) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for keyword in keywords:
            del ds[keyword]

    return change


def _odd_values(ds: Dataset) -> None:
    for keyword, text in (
        ("PatientSex", b"X "),
        ("PatientBirthDate", b"19??"),
        ("StudyDate", b"01/02/2026"),
        ("StudyTime", b"noon"),
        ("SliceThickness", b""),
    ):
        tag = Tag(keyword)
        ds[tag] = pydicom.dataelem.RawDataElement(
            tag, pydicom.datadict.dictionary_VR(tag), len(text), text, 0, False, True
        )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            _drop("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"),
            id="type 2 attributes missing",
        ),
        pytest.param(_drop("StudyDate", "StudyTime", "ReferringPhysicianName"), id="study attributes missing"),
        pytest.param(_drop("SOPClassUID", "Modality"), id="SOPClassUID and Modality missing"),
        pytest.param(_drop("FrameOfReferenceUID"), id="FrameOfReferenceUID missing"),
        pytest.param(_drop("SliceThickness", "PositionReferenceIndicator"), id="thickness missing"),
        pytest.param(_odd_values, id="invalid values"),
    ],
)
def test_headers_that_break_the_standard_still_give_valid_results(
    change: Callable[[Dataset], None], tmp_path: Path
) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rewrite(paths, change)
    volume = read_series(paths, RULES)

    made = encode(volume, analysis_of(volume), tmp_path / "out")

    for item in made.values():
        check_conformance(item.path)


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (None, "Plain"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Ὀδυσσεύς^Ιθάκη"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
    ],
)
def test_names_survive_in_any_character_set_and_reach_no_log(
    character_set: Any, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    def edit(_: int, ds: Dataset) -> None:
        if character_set:
            ds.SpecificCharacterSet = character_set
        ds.PatientName = name
        ds.StudyDescription = "Halswirbelsäule" if character_set == "ISO_IR 100" else "Neck"

    volume = series(tmp_path, edit=edit)
    recwarn.clear()
    with caplog.at_level(logging.DEBUG):
        made = encode(volume, analysis_of(volume), tmp_path / "out")

    for item in made.values():
        ds = pydicom.dcmread(item.path)
        assert str(ds.PatientName) == name
        assert ds.PatientID == "TEST"
        assert ds.StudyDescription == ("Halswirbelsäule" if character_set == "ISO_IR 100" else "Neck")
    assert name.split("^")[0] not in caplog.text
    assert not recwarn.list


def test_the_thickness_and_spacing_of_the_source_are_kept(tmp_path: Path) -> None:
    volume = series(tmp_path, "tilted gantry")
    made = encode(volume, analysis_of(volume), tmp_path / "out")

    (measures,) = pydicom.dcmread(made["vertebrae.seg"].path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence

    assert [float(v) for v in measures.PixelSpacing] == [0.75, 1.0]
    assert float(measures.SliceThickness) == 1.0
    assert float(measures.SpacingBetweenSlices) == pytest.approx(1.0)  # along the normal, not along the gantry's tilt


# --- Conformance -------------------------------------------------------------------------------------------------


def check_conformance(path: Path) -> None:
    """No error by dicom3tools' dciodvfy; dcmtk's dsrdump reads a report to its end."""
    tools = {name: shutil.which(name) for name in ("dciodvfy", "dsrdump")}
    missing = [name for name, found in tools.items() if found is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: dicom3tools, dcmtk)")
    checked = subprocess.run([str(tools["dciodvfy"]), str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in checked.stderr.splitlines() if line.startswith("Error")]
    assert not errors
    if path.name == "report.sr.dcm":
        dumped = subprocess.run([str(tools["dsrdump"]), "-Ec", str(path)], capture_output=True, check=False)
        assert dumped.returncode == 0, dumped.stderr
        assert dumped.stdout.count(b'"Measurement Group"') == 8


@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced, frames out of order"])
def test_results_of_every_acquisition_conform(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out")

    assert len(made) == 3
    for item in made.values():
        check_conformance(item.path)
