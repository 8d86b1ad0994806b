"""Reading a CT Series: what makes a volume, where its voxels lie, and what is refused with which reason."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

from model.geometry import Grid
from model.series import (
    HEADER_TAGS,
    IncompleteSeries,
    SeriesError,
    SeriesRules,
    SliceHeader,
    check_series,
    read_series,
    slice_headers,
)
from model.volume import Volume
from tests.factories import (
    AXIAL,
    CORONAL,
    SAGITTAL,
    hu_at,
    make_ct_series,
    make_enhanced_ct,
    make_localizer,
    make_report,
    make_screen_save,
    slice_positions,
)

SMALL = SeriesRules(min_slices=3, min_extent_mm=1.0)
OBLIQUE = (0.96, 0.28, 0.0, -0.21, 0.72, -0.661438)  # 41 degrees from axial
REAL_CT = Path(__file__).parents[2].parent / "shared" / "data" / "ct"


def headers_of(paths: list[Path]) -> list[SliceHeader]:
    """Headers as the receiver makes them."""
    return [
        header
        for path in paths
        for header in slice_headers(pydicom.dcmread(path, specific_tags=HEADER_TAGS, stop_before_pixels=True))
    ]


def voxel_places(grid: Grid) -> np.ndarray:
    return grid.to_lps_mm(np.stack(np.indices(grid.shape), axis=-1).astype(float))


def assert_every_voxel_is_in_its_place(volume: Volume) -> None:
    np.testing.assert_array_equal(volume.voxels_hu, hu_at(voxel_places(volume.grid)))


# Order and geometry


@pytest.mark.parametrize(
    "acquisition",
    [
        pytest.param({}, id="axial"),
        pytest.param({"reverse": True}, id="head first to last, numbered downwards"),
        pytest.param({"orientation": (-1, 0, 0, 0, -1, 0), "origin_lps_mm": (9, 7, 0)}, id="prone"),
        pytest.param({"orientation": (-1, 0, 0, 0, 1, 0), "origin_lps_mm": (9, -7, 0)}, id="normal points to the feet"),
        pytest.param({"orientation": (0, 1, 0, 1, 0, 0)}, id="rows and columns exchanged"),
        pytest.param({"orientation": OBLIQUE}, id="oblique"),
        pytest.param({"orientation": OBLIQUE, "reverse": True, "tilt_deg": -15}, id="oblique and tilted"),
        pytest.param({"tilt_deg": 25}, id="tilted gantry"),
        pytest.param({"pixel_spacing_mm": (0.4, 1.3), "rows": 31, "columns": 17}, id="pixels that are not square"),
        pytest.param({"signed": True}, id="signed pixels"),
        pytest.param({"spacing_mm": 4.9}, id="thick slices"),
    ],
)
def test_every_voxel_lies_where_its_slice_says(tmp_path: Path, acquisition: dict[str, object]) -> None:
    paths = make_ct_series(tmp_path, **acquisition)
    random.Random(7).shuffle(paths)

    volume = read_series(paths, SMALL)

    for z, source in enumerate(volume.slices):
        ds = pydicom.dcmread(source.path)
        assert ds.SOPInstanceUID == source.sop_instance_uid
        np.testing.assert_allclose(volume.grid.to_lps_mm(np.array([z, 0, 0])), ds.ImagePositionPatient, atol=1e-4)
        np.testing.assert_array_equal(volume.voxels_hu[z], ds.pixel_array.astype(int) + int(ds.RescaleIntercept))
    places = voxel_places(volume.grid)
    assert np.abs(volume.voxels_hu - hu_at(places))[np.abs(places[..., 0] + 4) > 1e-3].max() <= 1  # rounding
    assert places[-1, 0, 0, 2] > places[0, 0, 0, 2], "Z runs foot to head"
    assert volume.warnings == ()


def test_order_comes_from_positions_not_from_instance_numbers(tmp_path: Path) -> None:
    def always_one(_: int, ds: Dataset) -> None:
        ds.InstanceNumber = 1

    assert_every_voxel_is_in_its_place(read_series(make_ct_series(tmp_path, edit=always_one), SMALL))


@pytest.mark.parametrize("spacing_mm", [0.31, 0.625, 1.25])
def test_positions_rounded_to_a_tenth_of_a_mm_are_uniform(tmp_path: Path, spacing_mm: float) -> None:
    positions = slice_positions(num_slices=200, spacing_mm=spacing_mm, orientation=AXIAL).round(1)

    grid = check_series(headers_of(make_ct_series(tmp_path, positions_lps_mm=positions, rows=2, columns=2))).grid

    assert grid.spacing_mm[0] == pytest.approx(spacing_mm, abs=1e-3)


@pytest.mark.parametrize(
    ("orientation", "reason"),
    [
        (CORONAL, "is coronal, 90 degrees from axial"),
        (SAGITTAL, "is sagittal, 90 degrees from axial"),
        ((1, 0, 0, 0, 0.6, -0.8), "is coronal, 53 degrees from axial"),
        ((1, 0, 0, 0.5, 1, 0), "not two perpendicular unit vectors"),
    ],
)
def test_planes_far_from_axial_are_refused_by_name(tmp_path: Path, orientation: tuple[float, ...], reason: str) -> None:
    with pytest.raises(SeriesError, match=reason) as refusal:
        check_series(headers_of(make_ct_series(tmp_path, orientation=orientation)), SMALL)
    assert not isinstance(refusal.value, IncompleteSeries)


# Gaps and duplicates


def headers_at(heights_mm: list[float]) -> list[SliceHeader]:
    """Axial headers at these heights, without files."""
    return [
        SliceHeader(
            sop_instance_uid=f"1.2.{i}",
            series_instance_uid="1.2.3",
            study_instance_uid="1.2",
            sop_class_uid=pydicom.uid.CTImageStorage,
            modality="CT",
            rows=4,
            columns=4,
            pixel_spacing_mm=(0.5, 0.5),
            position_lps_mm=(0.0, 0.0, height_mm),
            orientation=AXIAL,
        )
        for i, height_mm in enumerate(heights_mm)
    ]


@pytest.mark.parametrize(
    ("heights_mm", "reason"),
    [
        ([0, 1, 2, 5, 6, 7], r"3\.00 mm at z = 2\.0, expected 1\.00 mm \(2 Instances missing\)"),
        ([0, 3, 6, 9, 11, 14], r"2\.00 mm at z = 9\.0, expected 3\.00 mm\. Uniform"),
        ([0, 1, 2, 4, 6, 8, 10], r"2\.00 mm at z = 2\.0, .* and at 1 more places, expected 1\.00 mm \(4 Inst"),
        ([0, 6, 12, 18], r"slices 6\.00 mm apart; up to 5\.00 mm"),
        ([0, 1], r"has 2 slices; at least 3"),
        ([0, 0.2, 0.4], r"covers 0 mm along the body; at least 1 mm"),
        ([], r"no DICOM Instances"),
    ],
)
def test_what_more_instances_could_mend_is_incomplete(heights_mm: list[float], reason: str) -> None:
    with pytest.raises(IncompleteSeries, match=reason):
        check_series(headers_at(heights_mm), SMALL)


def test_a_single_missing_slice_is_awaited_first_and_bridged_in_the_end(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, num_slices=9)
    whole = read_series(paths, SMALL)
    del paths[3]

    with pytest.raises(IncompleteSeries, match=r"1 Instances missing"):
        check_series(headers_of(paths), SMALL)
    volume = read_series(paths, SMALL)

    assert volume.grid.shape == whole.grid.shape
    np.testing.assert_allclose(volume.grid.affine, whole.grid.affine, atol=1e-6)
    assert np.abs(volume.voxels_hu - whole.voxels_hu).max() <= 1  # hu_at is linear along z
    assert [source.is_interpolated for source in volume.slices] == [z == 3 for z in range(9)]
    assert volume.slices[3].sop_instance_uid == volume.slices[2].sop_instance_uid
    (warning,) = volume.warnings
    assert "between z = -18.0 and -16.0 mm is missing and was interpolated" in warning


@pytest.mark.parametrize(
    ("heights_mm", "bridged"),
    [
        ([0, 1, 3, 4, 5], True),
        ([0, 1, 3, 4, 6, 7], True),
        ([0, 1, 3, 4, 6, 7, 9, 10], False),  # three gaps
        ([0, 1, 4, 5, 6], False),  # two slices in a row
        ([0, 1, 3, 5, 6, 7], False),  # two gaps around one slice
    ],
)
def test_only_few_and_single_gaps_are_bridged(heights_mm: list[float], bridged: bool) -> None:
    if bridged:
        stack = check_series(headers_at(heights_mm), SMALL, final=True)
        assert stack.z_indices == tuple(heights_mm)
    else:
        with pytest.raises(IncompleteSeries, match="slice gaps"):
            check_series(headers_at(heights_mm), SMALL, final=True)


def test_slices_that_leave_the_line_are_refused() -> None:
    headers = headers_at([0, 1, 2, 3, 4, 5])
    headers[3] = replace(headers[3], position_lps_mm=(8.0, 0.0, 3.0))

    with pytest.raises(SeriesError, match=r"do not lie on one line: the one at z = 3\.0 mm is 8\.0 mm off"):
        check_series(headers, SMALL)


def test_slices_that_slide_sideways_are_refused() -> None:
    headers = [replace(h, position_lps_mm=(0.0, 2.0 * i, float(i))) for i, h in enumerate(headers_at([0, 1, 2, 3]))]

    with pytest.raises(SeriesError, match=r"shift sideways by 63 degrees"):
        check_series(headers, SMALL)


def test_a_slice_sent_twice_counts_once(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path)
    copy = pydicom.dcmread(paths[2])
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    copy.save_as(tmp_path / "copy.dcm")

    for order in ([*paths, tmp_path / "copy.dcm"], [tmp_path / "copy.dcm", *paths]):
        volume = read_series(order, SMALL)
        assert_every_voxel_is_in_its_place(volume)
        assert volume.warnings == ("Left out 1 x copy of a slice at the same position.",)
        assert volume.slices[2].sop_instance_uid == min(
            pydicom.dcmread(paths[2]).SOPInstanceUID, copy.SOPInstanceUID
        ), "the choice does not hang on the order of the files"


def test_two_acquisitions_in_one_series_are_refused(tmp_path: Path) -> None:
    def brighter(_: int, ds: Dataset) -> None:
        ds.RescaleIntercept = -1000

    first = make_ct_series(tmp_path / "1", series_instance_uid="1.2.3")
    frame_of_reference = pydicom.dcmread(first[0]).FrameOfReferenceUID

    def second_pass(i: int, ds: Dataset) -> None:
        brighter(i, ds)
        ds.FrameOfReferenceUID = frame_of_reference

    second = make_ct_series(tmp_path / "2", series_instance_uid="1.2.3", edit=second_pass)
    check_series(headers_of(first + second), SMALL)  # the headers cannot tell
    with pytest.raises(SeriesError, match=r"Series 1\.2\.3 has two different slices at z = -\d+\.0 mm"):
        read_series(first + second, SMALL)


# What is no slice, or does not fit


def test_localizers_and_screen_saves_are_left_out_with_a_warning(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path)
    extras = [make_localizer(tmp_path / "l.dcm", like=paths[0]), make_screen_save(tmp_path / "s.dcm", like=paths[0])]

    volume = read_series([extras[0], *paths, extras[1]], SMALL)

    assert_every_voxel_is_in_its_place(volume)
    assert volume.warnings == (
        "Left out 1 x ImageType LOCALIZER, found among the slices.",
        "Left out 1 x ImageType SCREEN SAVE, found among the slices.",
    )


def test_a_series_of_localizers_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match=r"no CT slices, only 1 x ImageType LOCALIZER"):
        read_series([make_localizer(tmp_path / "l.dcm")], SMALL)


def test_what_is_not_ct_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match=r"has Modality SR; only CT"):
        read_series([make_report(tmp_path / "r.dcm")], SMALL)


def test_several_series_are_refused_and_listed(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "a", series_instance_uid="1.2.3")
    paths += make_ct_series(tmp_path / "b", series_instance_uid="1.2.4")

    with pytest.raises(SeriesError, match=r"belong to 2 Series: 1\.2\.3, 1\.2\.4"):
        read_series(paths, SMALL)


def test_a_series_of_two_patients_is_refused_without_naming_them(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "a", series_instance_uid="1.2.3")
    for patient_id, path in zip(("P-1", " P-1 ", ""), paths, strict=False):
        ds = pydicom.dcmread(path)
        ds.PatientID = patient_id
        ds.save_as(path)
    others = pydicom.dcmread(paths[-1]).PatientID
    ds = pydicom.dcmread(paths[-1])
    ds.PatientID = "P-2"
    ds.save_as(paths[-1])

    with pytest.raises(SeriesError, match=r"1\.2\.3 comes with [23] PatientIDs: two patients may be mixed") as caught:
        read_series(paths, SMALL)
    assert not any(name in str(caught.value) for name in ("P-1", "P-2", str(others)))


def test_a_series_that_comes_in_two_studies_is_refused(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "a", series_instance_uid="1.2.3")
    for path in paths[len(paths) // 2 :]:
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID = "1.2.99"
        ds.save_as(path)

    with pytest.raises(SeriesError, match=r"comes in 2 Studies: .*1\.2\.99.*two patients may be mixed"):
        read_series(paths, SMALL)


def test_files_that_are_not_dicom_are_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not DICOM" * 100)

    volume = read_series([*make_ct_series(tmp_path / "ct"), tmp_path / "notes.txt"], SMALL)

    assert volume.warnings == ("1 files are not DICOM and were left out.",)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("Rows", 19, r"different Rows: 20 \(7 slices\), 19 \(1 slices\)"),
        ("PixelSpacing", [0.75, 1.1], r"different PixelSpacing: \(0\.75, 1\.0\) \(7 slices\), \(0\.75, 1\.1\)"),
        ("ImageOrientationPatient", [1, 0, 0, 0, 0.999, 0.0447], r"different ImageOrientationPatient"),
        ("FrameOfReferenceUID", "1.2.9", r"mixes frames of reference: .*1\.2\.9 \(1 slices\)"),
        ("ImagePositionPatient", None, r"1 of 8 slices without a usable ImagePositionPatient, the first is Instance"),
        ("ImageOrientationPatient", [1, 0, 0], r"without a usable ImageOrientationPatient"),
        ("PixelSpacing", None, r"without a usable PixelSpacing"),
        ("PixelSpacing", [0, 1], r"without a usable PixelSpacing"),
        ("Columns", None, r"without a usable Columns"),
        ("RescaleType", "MGML", r"holds values in MGML \(RescaleType\), not Hounsfield"),
        ("Modality", "MR", r"has Modality MR; only CT"),
    ],
)
def test_slices_that_do_not_fit_are_refused_by_name(tmp_path: Path, keyword: str, value: object, reason: str) -> None:
    def odd_one(i: int, ds: Dataset) -> None:
        if i == 5:
            setattr(ds, keyword, value)

    with pytest.raises(SeriesError, match=reason) as refusal:
        check_series(headers_of(make_ct_series(tmp_path, edit=odd_one)), SMALL)
    assert not isinstance(refusal.value, IncompleteSeries)


def test_a_field_of_view_that_no_scanner_has_is_refused(tmp_path: Path) -> None:
    def coarser(_: int, ds: Dataset) -> None:
        ds.PixelSpacing = [0.75, 1300 / ds.Columns]

    with pytest.raises(SeriesError, match=r"has slices of 1300 mm .*PixelSpacing .*original CT"):
        check_series(headers_of(make_ct_series(tmp_path, edit=coarser)), SMALL)


@pytest.mark.parametrize("lacking", [["Modality"], ["SOPClassUID"], ["Modality", "SOPClassUID"]])
def test_modality_and_sop_class_may_be_missing_from_the_dataset(tmp_path: Path, lacking: list[str]) -> None:
    paths = make_ct_series(tmp_path)
    for path in paths:  # as in RSNA 2022: only the file meta information says what it is
        ds = pydicom.dcmread(path)
        for keyword in lacking:
            delattr(ds, keyword)
        ds.save_as(path)

    assert_every_voxel_is_in_its_place(read_series(paths, SMALL))


def test_what_says_nowhere_that_it_is_ct_is_taken_for_ct_only_if_the_rules_say_so() -> None:
    headers = [replace(header, modality="", sop_class_uid="") for header in headers_at([0, 1, 2])]

    with pytest.raises(SeriesError, match=r"holds no CT slices, only 3 x SOP Class \(missing\)"):
        check_series(headers, SMALL)
    assert check_series(headers, replace(SMALL, assume_ct=True)).order == (0, 1, 2)
    others = [replace(headers[0], modality="MR"), *headers[1:]]
    with pytest.raises(SeriesError, match="has Modality MR"):
        check_series(others, replace(SMALL, assume_ct=True))


@pytest.mark.parametrize("change", [{"rows": 3}, {"pixel_spacing_mm": (0.6, 0.6)}])
def test_a_few_slices_of_another_size_are_left_out_only_if_the_rules_say_so(change: dict[str, object]) -> None:
    headers = headers_at([0, 1, 2, 3, 4])
    headers[4] = replace(headers[4], **change)

    with pytest.raises(SeriesError, match="mixes slices of different"):
        check_series(headers, SMALL)
    stack = check_series(headers, replace(SMALL, max_odd_slices=1))
    assert stack.order == (0, 1, 2, 3)
    assert stack.warnings == ("Left out 1 x slice of another size or pixel spacing than most.",)
    headers[3] = replace(headers[3], rows=2)
    with pytest.raises(SeriesError, match="mixes slices of different"):
        check_series(headers, replace(SMALL, max_odd_slices=1))


def test_uids_of_the_file_meta_information_stand_in_for_missing_ones() -> None:
    ds = Dataset()
    ds.Rows = 3
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"

    (header,) = slice_headers(ds)

    assert (header.sop_class_uid, header.sop_instance_uid, header.rows) == (pydicom.uid.CTImageStorage, "1.2.3", 3)
    assert header.position_lps_mm is None


def test_headers_survive_json(tmp_path: Path) -> None:
    headers = headers_of([*make_ct_series(tmp_path, num_slices=2), make_enhanced_ct(tmp_path / "e.dcm")])

    assert [SliceHeader.from_dict(json.loads(json.dumps(header.to_dict()))) for header in headers] == headers
    assert len(headers) == 10


# Real CT


@pytest.mark.skipif(not REAL_CT.is_dir(), reason=f"no real CT at {REAL_CT}")
@pytest.mark.parametrize(
    ("name", "shape", "spacing_mm", "num_warnings"),
    [
        pytest.param("hn_chum_001", (91, 512, 512), (3.27, 0.976562, 0.976562), 1, id="GE, one slice lost"),
        pytest.param("pycerr_pt1", (90, 511, 511), (3.0, 1.0, 1.0), 0, id="InstanceNumber always 1"),
    ],
)
def test_real_series_are_read(
    name: str, shape: tuple[int, ...], spacing_mm: tuple[float, ...], num_warnings: int
) -> None:
    volume = read_series(sorted((REAL_CT / name).iterdir()))

    assert volume.voxels_hu.shape == shape
    assert volume.grid.spacing_mm == pytest.approx(spacing_mm, abs=1e-4)
    assert len(volume.warnings) == num_warnings
    assert volume.voxels_hu.min() == -1024
    assert volume.voxels_hu.max() > 1000
    for z, source in enumerate(volume.slices):
        if not source.is_interpolated:
            position = pydicom.dcmread(source.path, stop_before_pixels=True).ImagePositionPatient
            np.testing.assert_allclose(volume.grid.to_lps_mm(np.array([z, 0, 0])), position, atol=0.01)
