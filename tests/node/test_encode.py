"""SEG and SR as files: where their voxels lie, what they are called, and what becomes of odd headers.

Read back by highdicom, by pydicom alone, and by dicom3tools.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from model import LEVELS, read_series
from node.encode import NodeIdentity, ResultObject
from tests.factories import make_ct_series
from tests.node.analysed_series import (
    LEVEL_CODES,
    MODEL,
    NODE,
    RULES,
    SINGLE_FRAME,
    analysis_of,
    check_conformance,
    children,
    code_of,
    encode,
    frames,
    group_of,
    level_at,
    middle,
    series,
    value,
)

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


@pytest.mark.parametrize(
    "kind", ["axial", "head to foot", "enhanced, frames out of order", "enhanced, legacy converted"]
)
def test_each_frame_names_the_slice_it_lies_on(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
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

    assert [segment.SegmentLabel for segment in ds.SegmentSequence] == ["C2 fracture 1", "C5 fracture 1"]
    for segment, level in zip(ds.SegmentSequence, ("C2", "C5"), strict=True):
        assert code_of(segment.SegmentedPropertyCategoryCodeSequence) == ("49755003", "SCT")
        assert code_of(segment.SegmentedPropertyTypeCodeSequence) == ("72704001", "SCT")
        assert code_of(segment.AnatomicRegionSequence) == (LEVEL_CODES[level], "SCT")
        group = group_of(report, segment.SegmentLabel)
        assert segment.TrackingUID == value(group, "112040")
        assert value(group, "363698007") == LEVEL_CODES[level]
        (reference,) = children(group, "121191")[0].ReferencedSOPSequence
        assert (reference.ReferencedSOPInstanceUID, reference.ReferencedSegmentNumber) == (
            ds.SOPInstanceUID,
            segment.SegmentNumber,
        )
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


# --- UIDs and repeats --------------------------------------------------------------------------------------------


DATES = {
    "InstanceCreationDate",
    "InstanceCreationTime",
    "ContentDate",
    "ContentTime",
    "ContributionDateTime",
    "DateOfSecondaryCapture",
    "TimeOfSecondaryCapture",
}


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


def _put(ds: Dataset, *values: tuple[str, bytes]) -> None:
    for keyword, text in values:
        tag = Tag(keyword)
        ds[tag] = pydicom.dataelem.RawDataElement(
            tag, pydicom.datadict.dictionary_VR(tag), len(text), text, 0, False, True
        )


def _odd_values(ds: Dataset) -> None:
    _put(
        ds,
        ("PatientSex", b"X "),
        ("PatientBirthDate", b"19??"),
        ("StudyDate", b"01/02/2026"),
        ("StudyTime", b"noon"),
        ("SliceThickness", b""),
        ("PatientAge", b"45"),
        ("PatientSize", b"1,80"),
    )


def _unreadable_values(ds: Dataset) -> None:
    """Text where binary numbers belong, as scanners write in Implicit VR, and a sequence that breaks off."""
    patient = b"\x10\0\x20\0LO\x02\x002 \x10\0\x22\0CS\x04\x00TEXT"
    item = b"\xfe\xff\x00\xe0\x22\0\0\0" + patient + b"\x18\x00\x24\x93FD\x04\x0012.5"
    _put(
        ds,
        ("CTDIvol", b"12.5"),
        ("ReferencedStudySequence", b"\1\2\3\4\5\6"),
        ("OtherPatientIDsSequence", item),
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
        pytest.param(
            lambda ds: _put(ds, ("StudyDate", b"20240101-20240102 "), ("StudyTime", b"0800-0900 ")),
            id="ranges, as in a query",
        ),
        pytest.param(_drop("FrameOfReferenceUID"), id="FrameOfReferenceUID missing"),
        pytest.param(_drop("SliceThickness", "PositionReferenceIndicator"), id="thickness missing"),
        pytest.param(_odd_values, id="invalid values"),
        pytest.param(_unreadable_values, id="unreadable values"),
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
    ("character_set", "name", "place"),
    [
        (None, "Plain", "Zurich"),
        ("ISO_IR 100", "Müller^Jörg", "Zürich"),
        ("ISO_IR 192", "Ὀδυσσεύς^Ιθάκη", "Ἰθάκη"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", "東京"),
    ],
)
def test_names_survive_in_any_character_set_and_reach_no_log(
    character_set: Any,
    name: str,
    place: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def edit(_: int, ds: Dataset) -> None:
        if character_set:
            ds.SpecificCharacterSet = character_set
        ds.PatientName, ds.StudyDescription = name, place
        other = Dataset()
        other.PatientID, other.IssuerOfPatientID = "2", place
        ds.OtherPatientIDsSequence = [other]

    volume = series(tmp_path, edit=edit)
    recwarn.clear()
    with caplog.at_level(logging.DEBUG):
        made = encode(volume, analysis_of(volume), tmp_path / "out")

    for item in made.values():
        ds = pydicom.dcmread(item.path)
        assert str(ds.PatientName) == name
        assert ds.PatientID == "TEST"
        assert ds.StudyDescription == place
        assert ds.OtherPatientIDsSequence[0].IssuerOfPatientID == place
        assert ds.SpecificCharacterSet == ("ISO_IR 100" if character_set == "ISO_IR 100" else "ISO_IR 192")
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


@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced, frames out of order"])
def test_results_of_every_acquisition_conform(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out")

    assert len(made) == 3
    for item in made.values():
        check_conformance(item.path)
