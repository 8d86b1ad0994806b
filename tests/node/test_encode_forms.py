"""Segmentations in every form a profile can ask for, held against what highdicom alone makes of the same masks."""

import shutil
import subprocess
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from model import LEVELS, Analysis, Volume, read_series
from node.encode.frames import marked_part
from node.encode.identity import ResultUids
from node.encode.maker import Maker
from node.encode.seg import VERTEBRA_SEGMENTS, VERTEBRAE
from node.encode.source import read_source
from node.profiles import Kind, Profile, files_for
from tests.factories import make_ct_series
from tests.node.analysed_series import (
    MODEL,
    NODE,
    RULES,
    SINGLE_FRAME,
    analysis_of,
    check_conformance,
    children,
    encode,
    groups,
    level_at,
    middle,
    series,
)

BINARY = Profile()
LABEL_MAP = Profile(segmentation="labelmap")
RLE = Profile(segmentation="labelmap", transfer_syntax="rle")
JPEG_LS = Profile(segmentation="labelmap", transfer_syntax="jpeg-ls")


def by_highdicom(volume: Volume, analysis: Analysis, segmentation: str) -> Dataset:
    """The Segmentation of the vertebrae by highdicom alone, from the headers of all slices and the whole mask."""
    source = read_source(volume.slices, volume.grid)
    planes = [z for z, item in enumerate(volume.slices) if not item.is_interpolated]
    labels = [label for label in range(1, 8) if (analysis.vertebrae[planes] == label).any()]
    numbers = np.zeros(8, np.uint8)
    numbers[labels] = range(1, len(labels) + 1)
    uids = ResultUids.of((item.sop_instance_uid for item in volume.slices), MODEL)
    maker = Maker(source=source, model=MODEL, uids=uids, node=NODE)
    with disable_value_validation():  # the UIDs of stand-ins for Enhanced frames are long
        images = [source.image(z) for z in planes]
        for image in images:
            image.update({element.tag: element for element in source.header if element.tag not in image})
        return hd.seg.Segmentation(
            source_images=images,
            pixel_array=numbers[analysis.vertebrae[planes]],
            segmentation_type=segmentation.upper(),
            segment_descriptions=[
                VERTEBRAE.describe(number, VERTEBRA_SEGMENTS[label - 1], MODEL, uids)
                for number, label in enumerate(labels, start=1)
            ],
            series_number=9001,
            **maker.identification("vertebrae.seg"),
        )


def groups_of(seg: Dataset, *, is_enhanced: bool) -> list[str]:
    """Per-frame groups as text; references of Enhanced CT left out, where highdicom was given stand-ins for frames."""
    items = list(seg.PerFrameFunctionalGroupsSequence)
    for item in items if is_enhanced else ():
        del item.DerivationImageSequence
    return [str(item) for item in items]


@pytest.mark.parametrize("seen", [LEVELS, ("C3", "C6"), ("C2",)], ids=["all levels", "two levels", "one level"])
@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced, frames out of order", "a slice lost"])
def test_frames_are_those_highdicom_alone_would_make(kind: str, seen: tuple[str, ...], tmp_path: Path) -> None:
    if kind == "a slice lost":
        paths = make_ct_series(tmp_path / "ct", num_slices=10)
        volume = read_series([*paths[:4], *paths[5:]], RULES)
    else:
        volume = series(tmp_path, kind)
    analysis = analysis_of(volume, seen=seen, fractured=())
    objects = (Kind.VERTEBRAE_SEG,)
    profiles = (Profile(objects=objects), Profile(objects=objects, segmentation="labelmap"))
    made = encode(volume, analysis, tmp_path / "out", *profiles)

    for name, segmentation in (("vertebrae.seg", "binary"), ("vertebrae.labelmap.seg", "labelmap")):
        expected = by_highdicom(volume, analysis, segmentation)
        ds = pydicom.dcmread(made[name].path)
        assert ds.PixelData == expected.PixelData
        assert ds.get("DimensionOrganizationType") == expected.get("DimensionOrganizationType")
        assert str(ds.SharedFunctionalGroupsSequence[0]) == str(expected.SharedFunctionalGroupsSequence[0])
        is_enhanced = kind.startswith("enhanced")
        assert groups_of(ds, is_enhanced=is_enhanced) == groups_of(expected, is_enhanced=is_enhanced)
        for element in expected.group_dataset(0x0028):
            assert ds[element.tag].value == element.value
        assert [str(item) for item in ds.SegmentSequence] == [str(item) for item in expected.SegmentSequence]


@pytest.mark.parametrize("profile", [LABEL_MAP, RLE, JPEG_LS], ids=["explicit", "rle", "jpeg-ls"])
@pytest.mark.parametrize("kind", ["oblique", "enhanced, frames out of order"])
def test_a_label_map_is_read_back_voxel_by_voxel(kind: str, profile: Profile, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    analysis = analysis_of(volume)
    made = encode(volume, analysis, tmp_path / "out", profile)
    suffix = {"explicit-vr-le": "", "rle": "-rle", "jpeg-ls": "-jls"}[profile.transfer_syntax]
    path = made[f"vertebrae.labelmap{suffix}.seg"].path

    ds = pydicom.dcmread(path)
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.7"
    assert (
        ds.file_meta.TransferSyntaxUID
        == {
            "explicit-vr-le": pydicom.uid.ExplicitVRLittleEndian,
            "rle": pydicom.uid.RLELossless,
            "jpeg-ls": pydicom.uid.JPEGLSLossless,
        }[profile.transfer_syntax]
    )
    found = hd.seg.segread(path).get_volume(combine_segments=True)
    indices = np.stack(np.indices(found.array.shape), axis=-1).reshape(-1, 3)
    points = found.map_indices_to_reference(indices).reshape(*found.array.shape, 3)
    assert np.array_equal(found.array, level_at(points, middle(volume)))
    # With pydicom alone, plane by plane.
    part = marked_part(analysis.vertebrae)
    assert part is not None
    planes = [plane for plane in analysis.vertebrae if plane.any()]
    assert sorted(plane.tobytes() for plane in ds.pixel_array) == sorted(plane.tobytes() for plane in planes)


def test_a_segmentation_of_too_many_frames_is_split_by_levels(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)
    profile = Profile(max_frames=4)
    made = encode(volume, analysis, tmp_path / "out", profile)

    names = files_for(profile, [path.name for path in (tmp_path / "out").iterdir()])
    parts = [pydicom.dcmread(tmp_path / "out" / name) for name in names if name.startswith("vertebrae.max4-")]
    assert len(parts) > 1
    assert all(part.NumberOfFrames <= 4 for part in parts)
    assert [segment.SegmentLabel for part in parts for segment in part.SegmentSequence] == list(LEVELS)
    assert len({part.SeriesInstanceUID for part in parts}) == len({part.SOPInstanceUID for part in parts}) == len(parts)
    whole = pydicom.dcmread(encode(volume, analysis, tmp_path / "whole")["vertebrae.seg"].path)
    assert np.array_equal(np.concatenate([part.pixel_array.reshape(-1, 20, 24) for part in parts]), whole.pixel_array)

    # Each level of the report refers to the part that has it.
    report = pydicom.dcmread(made["report.max4.sr"].path)
    for part in parts:
        for segment in part.SegmentSequence:
            (reference,) = children(groups(report)[segment.SegmentLabel], "121191")[0].ReferencedSOPSequence
            assert reference.ReferencedSOPInstanceUID == part.SOPInstanceUID
            assert reference.ReferencedSegmentNumber == segment.SegmentNumber


def test_a_segmentation_within_the_frame_limit_is_shared_with_those_who_have_none(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out", Profile(), Profile(max_frames=400))
    assert list(made) == ["vertebrae.seg", "fractures.seg", "report.sr"]


def test_every_form_that_some_destination_wants_is_made_once_under_its_own_uids(tmp_path: Path) -> None:
    volume = series(tmp_path)
    profiles = [BINARY, RLE, Profile(report="comprehensive"), Profile(max_frames=4)]
    made = encode(volume, analysis_of(volume), tmp_path / "out", *profiles, BINARY)

    uids = [uid for item in made.values() for uid in (item.sop_instance_uid, item.series_instance_uid)]
    assert len(set(uids)) == len(uids)
    names = [item.path.name for item in made.values()]
    assert sorted({name for profile in profiles for name in files_for(profile, names)}) == sorted(names)


@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced, frames out of order"])
def test_all_objects_of_a_case_agree_with_each_other(kind: str, tmp_path: Path) -> None:
    """dcentvfy finds no attribute of patient, study, series or equipment that differs where it must not."""
    tool = shutil.which("dcentvfy")
    if tool is None:
        pytest.skip("dcentvfy not installed (Debian: dicom3tools)")
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out", BINARY, Profile(report="comprehensive", max_frames=4))
    paths = [*{item.path for item in volume.slices}, *(item.path for item in made.values())]
    checked = subprocess.run([tool, *map(str, paths)], capture_output=True, text=True, check=False)
    # It files the AccessionNumber of an SR under the Study and that of an image under the Series, whoever wrote them.
    said = [line for line in checked.stderr.splitlines() if "Element=<AccessionNumber> IE" not in line]
    assert (checked.returncode, checked.stdout, said) == (0, "", [])
    for name in ("vertebrae.max4-1.seg", "report.comprehensive.max4.sr"):
        check_conformance(made[name].path)
