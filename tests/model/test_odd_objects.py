"""CT as it comes from old scanners, gateways and converters: read to the right voxels, or refused by name."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    generate_uid,
)

from model.series import (
    HEADER_TAGS,
    IncompleteSeries,
    SeriesError,
    SeriesRules,
    check_series,
    read_series,
    slice_headers,
)
from model.stack import SliceHeader
from model.volume import Volume
from tests.factories import hu_at, make_ct_series, make_enhanced_ct
from tests.transfer_syntaxes import convert

# pydicom's, about odd values; the node switches them off, since they quote values.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = SeriesRules(min_slices=3, min_extent_mm=1.0)
Change = Callable[[Dataset], None]


def assert_every_voxel_is_in_its_place(volume: Volume) -> None:
    places = volume.grid.to_lps_mm(np.stack(np.indices(volume.grid.shape), axis=-1).astype(float))
    np.testing.assert_array_equal(volume.voxels_hu, hu_at(places))


def rewrite(path: Path, change: Change) -> None:
    """Changes a written file, compressed or not."""
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)


def without(*keywords: str) -> Change:
    def change(ds: Dataset) -> None:
        for keyword in keywords:
            del ds[keyword]

    return change


def having(**values: object) -> Change:
    def change(ds: Dataset) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return change


# ---- what a header may leave out or say oddly ----


def with_icon(ds: Dataset) -> None:
    icon = Dataset()
    icon.Rows, icon.Columns, icon.SamplesPerPixel, icon.PhotometricInterpretation = 2, 2, 1, "MONOCHROME1"
    icon.BitsAllocated, icon.BitsStored, icon.HighBit, icon.PixelRepresentation = 8, 8, 7, 0
    icon.PixelData = b"\1\2\3\4"
    icon["PixelData"].VR = "OB"
    ds.IconImageSequence = [icon]


def with_private_depths(ds: Dataset) -> None:
    """Private groups of nested sequences, all of undefined length; their pixels and geometry are nobody's."""
    block = ds.private_block(0x0019, "SOMEBODY 1.0", create=True)
    inner = Dataset()
    inner.ImagePositionPatient, inner.PixelSpacing = [1, 2, 3], [9, 9]
    inner.private_block(0x0021, "SOMEBODY 1.0", create=True).add_new(1, "OB", b"\0\1" * 50)
    outer = Dataset()
    outer.ReferencedImageSequence = DicomSequence([inner, Dataset()])
    block.add_new(0x10, "SQ", DicomSequence([outer]))
    ds[block.get_tag(0x10)].is_undefined_length = True
    outer["ReferencedImageSequence"].is_undefined_length = True


def with_group_lengths(ds: Dataset) -> None:
    for group in (0x0008, 0x0010, 0x0028, 0x7FE0):  # retired in 2008, wrong as often as not
        ds.add_new(Tag(group, 0), "UL", 12345)


def with_nothing_in_type_2(ds: Dataset) -> None:
    for keyword in ("PatientName", "PatientID", "StudyDate", "AccessionNumber", "KVP", "InstanceNumber"):
        setattr(ds, keyword, None)
    ds.SliceLocation = ds.SliceThickness = None


ODD_HEADERS = {
    "InstanceNumber missing": without("InstanceNumber"),
    "Modality and SOPClassUID missing": without("Modality", "SOPClassUID"),
    "SamplesPerPixel missing": without("SamplesPerPixel"),
    "PhotometricInterpretation missing": without("PhotometricInterpretation"),
    "PixelRepresentation missing": without("PixelRepresentation"),
    "BitsStored and HighBit missing": without("BitsStored", "HighBit"),
    "NumberOfFrames 1": having(NumberOfFrames=1),
    "NumberOfFrames empty": having(NumberOfFrames=None),
    "PixelPaddingValue empty": lambda ds: ds.add_new("PixelPaddingValue", "US", None),
    "type 2 empty": with_nothing_in_type_2,
    "icon": with_icon,
    "private sequences": with_private_depths,
    "group lengths": with_group_lengths,
    "Japanese": having(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎"),
    "Greek": having(SpecificCharacterSet="ISO_IR 126", PatientName="Διονυσιος"),
    "ImageOrientationPatient off in the fifth decimal": having(ImageOrientationPatient=[1, 1e-5, 0, -1e-5, 0.99999, 0]),
}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in ODD_HEADERS.items()])
def test_an_odd_header_changes_no_voxel(tmp_path: Path, change: Change, syntax: str) -> None:
    paths = make_ct_series(tmp_path, num_slices=3)
    for path in paths:
        convert(path, syntax)
    for path in paths[1:]:  # the first slice is as it should be
        rewrite(path, change)

    volume = read_series(paths, SMALL)

    assert_every_voxel_is_in_its_place(volume)
    assert volume.warnings == ()


def test_a_character_set_nobody_knows_does_not_matter(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, num_slices=3)
    for path in paths:
        encoded = path.read_bytes()
        rewrite(path, having(SpecificCharacterSet="ISO_IR 100"))
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"KLINGON_1 "))
        assert path.read_bytes() != encoded

    assert_every_voxel_is_in_its_place(read_series(paths, SMALL))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_values_in_the_high_bits_of_their_cells_are_read(tmp_path: Path, syntax: str) -> None:
    """12 bits at the top of 16, as ACR-NEMA allowed, with something else below."""

    def shifted(_: int, ds: Dataset) -> None:
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") << 4 | 7).astype("<u2").tobytes()

    paths = make_ct_series(tmp_path, edit=shifted, transfer_syntax_uid=syntax)
    for path in paths:
        rewrite(path, having(BitsStored=12, HighBit=15))

    assert_every_voxel_is_in_its_place(read_series(paths, SMALL))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_eight_bit_cells_are_read(tmp_path: Path, syntax: str) -> None:
    def eight_bits(_: int, ds: Dataset) -> None:
        stored = np.frombuffer(ds.PixelData, "<u2").astype(int) - 1024
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.RescaleSlope, ds.RescaleIntercept = 12.5, -1000
        ds.PixelData = np.rint((stored + 1000) / 12.5).astype("u1").tobytes()  # an odd number of bytes, unpadded
        ds["PixelData"].VR = "OB"

    paths = make_ct_series(tmp_path, edit=eight_bits, rows=7, columns=9, transfer_syntax_uid=syntax)

    volume = read_series(paths, SMALL)

    places = volume.grid.to_lps_mm(np.stack(np.indices(volume.grid.shape), axis=-1).astype(float))
    assert np.abs(volume.voxels_hu - hu_at(places)).max() <= 7


# ---- how PixelData may be wrapped ----


def as_undefined_length(path: Path) -> None:
    """Native pixels announced as if encapsulated, ended by a delimiter: some gateways did that."""
    encoded = path.read_bytes()
    head, length_at = encoded.index(b"\xe0\x7f\x10\x00OW\0\0"), 8
    body = encoded[head + length_at + 4 :]
    path.write_bytes(encoded[: head + length_at] + b"\xff\xff\xff\xff" + body + b"\xfe\xff\xdd\xe0\0\0\0\0")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda ds: setattr(ds["PixelData"], "VR", "OB"), id="16-bit cells as OB"),
        pytest.param(having(DataSetTrailingPadding=b"\0" * 126), id="trailing padding"),
        pytest.param(lambda ds: setattr(ds, "PixelData", ds.PixelData + b"\0" * 6), id="longer than the frame"),
    ],
)
def test_native_pixels_are_read_however_wrapped(tmp_path: Path, change: Change) -> None:
    paths = make_ct_series(tmp_path)
    for path in paths:
        rewrite(path, change)

    assert_every_voxel_is_in_its_place(read_series(paths, SMALL))


def test_native_pixels_of_undefined_length_are_read(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path)
    for path in paths:
        as_undefined_length(path)

    assert_every_voxel_is_in_its_place(read_series(paths, SMALL))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize(
    ("offset_table", "num_fragments"),
    [
        ("none", 1),
        ("none", 3),
        ("basic", 1),
        ("basic", 3),
        ("extended", 1),
    ],  # extended: one fragment a frame (PS3.5 A.4)
)
def test_frames_are_found_in_any_encapsulation(
    tmp_path: Path, syntax: str, offset_table: str, num_fragments: int
) -> None:
    paths = make_ct_series(tmp_path / "single", num_slices=5, rows=40, columns=36)
    for path in paths:
        convert(path, syntax)
    frames = [next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1)) for path in paths]
    whole = make_enhanced_ct(tmp_path / "e.dcm", num_frames=5, rows=40, columns=36)

    def wrap(ds: Dataset) -> None:
        for group in ds.PerFrameFunctionalGroupsSequence:
            group.PixelValueTransformationSequence[0].RescaleIntercept = -1024
        if offset_table == "extended":
            ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        else:
            ds.PixelData = encapsulate(frames, fragments_per_frame=num_fragments, has_bot=offset_table == "basic")
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = syntax

    rewrite(whole, wrap)

    assert_every_voxel_is_in_its_place(read_series([whole], SMALL))


# ---- what values mean ----


def test_imager_pixel_spacing_stands_in_with_a_warning(tmp_path: Path) -> None:
    def only_the_detectors(_: int, ds: Dataset) -> None:
        ds.ImagerPixelSpacing = ds.PixelSpacing
        del ds.PixelSpacing

    volume = read_series(make_ct_series(tmp_path, edit=only_the_detectors), SMALL)

    assert_every_voxel_is_in_its_place(volume)
    assert volume.warnings == ("PixelSpacing is missing; ImagerPixelSpacing was taken for it: sizes may be wrong.",)


@pytest.mark.parametrize("which", [[4], range(8)], ids=["one", "all"])
@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (b"-1024.0 ", b"-1024,0 ", "whose RescaleIntercept is no number"),
        (b"-1024.0 ", b"NaN     ", "whose RescaleIntercept is no number"),
        (b"-1024.0 ", b"        ", "without RescaleIntercept"),
        (b"1.000 ", b"1.0e99", "whose RescaleSlope is 1e\\+99"),
        (b"1.000 ", b"0     ", "whose RescaleSlope is 0"),
        (b"1.000 ", b"inf   ", "whose RescaleSlope is no number"),
        (b"1.000 ", b"      ", "without RescaleSlope"),
    ],
)
def test_slices_whose_rescale_is_garbage_are_refused_not_guessed(
    tmp_path: Path, good: bytes, bad: bytes, reason: str, which: Sequence[int]
) -> None:
    def written_so(_: int, ds: Dataset) -> None:
        ds.RescaleIntercept, ds.RescaleSlope = "-1024.0", "1.000"

    paths = make_ct_series(tmp_path, edit=written_so)
    for i in which:
        encoded = paths[i].read_bytes()
        assert encoded.count(good) == 1
        paths[i].write_bytes(encoded.replace(good, bad))
    headers = [header for path in paths for header in slice_headers(pydicom.dcmread(path, stop_before_pixels=True))]
    uid = headers[which[0]].sop_instance_uid

    with pytest.raises(SeriesError, match=rf"{len(which)} of 8 slices {reason}, the first is Instance {uid}; what"):
        read_series(paths, SMALL)
    stored = [SliceHeader.from_dict(json.loads(json.dumps(header.to_dict()))) for header in headers]
    with pytest.raises(SeriesError, match=reason):  # before anything is queued
        check_series(stored, SMALL)


@pytest.mark.parametrize(("keyword", "value"), [("RescaleSlope", 0), ("RescaleIntercept", None)])
def test_enhanced_ct_without_a_usable_rescale_is_refused(tmp_path: Path, keyword: str, value: Any) -> None:
    def edit(ds: Dataset) -> None:
        for frame in ds.PerFrameFunctionalGroupsSequence:
            setattr(frame.PixelValueTransformationSequence[0], keyword, value)

    path = make_enhanced_ct(tmp_path / "ct.dcm", num_frames=8)
    ds = pydicom.dcmread(path)
    edit(ds)
    ds.save_as(path)
    with pytest.raises(SeriesError, match=rf"8 of 8 slices (whose {keyword} is 0|without {keyword}), the first"):
        read_series([path], SMALL)


def test_a_header_that_claims_more_than_memory_holds_is_refused_before_it_is_allocated() -> None:
    headers = [
        SliceHeader(
            sop_instance_uid=f"1.2.{z}",
            series_instance_uid="1.2.3",
            study_instance_uid="1.2",
            sop_class_uid=pydicom.uid.CTImageStorage,
            rows=65535,
            columns=65535,
            pixel_spacing_mm=(0.5, 0.5),
            position_lps_mm=(0.0, 0.0, float(z)),
            orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        )
        for z in range(100)
    ]

    with pytest.raises(SeriesError, match="100 slices of 65535 x 65535: 429483622500 voxels"):
        check_series(headers)


# ---- Enhanced and multi-frame CT ----


def legacy_converted(ds: Dataset) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = LegacyConvertedEnhancedCTImageStorage


def everything_shared_but_position(ds: Dataset) -> None:
    frames = ds.PerFrameFunctionalGroupsSequence
    cells = ds.pixel_array.astype(int)
    for z, frame in enumerate(frames):
        cells[z] += int(frame.PixelValueTransformationSequence[0].RescaleIntercept) + 1024
    shared = ds.SharedFunctionalGroupsSequence[0]
    shared.PixelValueTransformationSequence = frames[0].PixelValueTransformationSequence
    shared.PixelValueTransformationSequence[0].RescaleIntercept = -1024
    for frame in frames:
        del frame.PixelValueTransformationSequence
    ds.PixelData = cells.astype("<u2").tobytes()


def stack_of(groups: Callable[[int], str]) -> Change:
    def change(ds: Dataset) -> None:
        for z, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            content = Dataset()
            content.StackID, content.InStackPositionNumber = groups(z), z + 1
            frame.FrameContentSequence = [content]

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(legacy_converted, id="Legacy Converted"),
        pytest.param(everything_shared_but_position, id="rescale shared"),
        pytest.param(stack_of(lambda z: "1"), id="one stack"),
        pytest.param(stack_of(lambda z: "1" if z < 4 else "2"), id="two stacks that continue each other"),
    ],
)
def test_enhanced_ct_of_any_making_is_read(tmp_path: Path, change: Change) -> None:
    path = make_enhanced_ct(tmp_path / "e.dcm")
    rewrite(path, change)

    assert_every_voxel_is_in_its_place(read_series([path], SMALL))


def moved(places: list[float], stacks: str) -> Change:
    """Frames at these heights above the first, of these stacks."""

    def change(ds: Dataset) -> None:
        for z, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            frame.PlanePositionSequence[0].ImagePositionPatient[2] = -20 + places[z]
        stack_of(lambda z: stacks[z])(ds)

    return change


@pytest.mark.parametrize(
    ("places", "stacks", "reason"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], "AAAABBBB", r"2 stacks of frames at the same place: StackID A .*StackID B"),
        ([0, 1, 2, 3, 50, 51, 52, 53], "AAAABBBB", r"2 stacks of frames of different spacing or with a gap"),
        ([0, 1, 2, 3, 6, 9, 12, 15], "AAAABBBB", r"2 stacks of frames of different spacing or with a gap"),
    ],
)
def test_stacks_that_are_no_one_volume_are_refused_by_name(
    tmp_path: Path, places: list[float], stacks: str, reason: str
) -> None:
    path = make_enhanced_ct(tmp_path / "e.dcm")
    rewrite(path, moved(places, stacks))

    with pytest.raises(SeriesError, match=reason) as refusal:
        read_series([path], SMALL)
    assert not isinstance(refusal.value, IncompleteSeries)


def split(path: Path, *, total_known: bool) -> list[Path]:
    """An Enhanced CT as a concatenation of four Instances (PS3.3 C.7.6.16.2.2.4)."""
    source, parts = pydicom.dcmread(path), []
    concatenation_uid, size = generate_uid(), source.NumberOfFrames // 4
    for number in range(4):
        ds = pydicom.dcmread(path)
        mine = slice(size * number, size * (number + 1))
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.ConcatenationUID, ds.InConcatenationNumber = concatenation_uid, number + 1
        ds.ConcatenationFrameOffsetNumber = size * number
        if total_known:
            ds.InConcatenationTotalNumber = 4
        ds.NumberOfFrames = size
        ds.PerFrameFunctionalGroupsSequence = source.PerFrameFunctionalGroupsSequence[mine]
        ds.PixelData = source.pixel_array[mine].tobytes()
        parts.append(path.with_name(f"part{number}.dcm"))
        ds.save_as(parts[-1])
    return parts


@pytest.mark.parametrize("total_known", [True, False])
def test_a_concatenation_is_joined(tmp_path: Path, total_known: bool) -> None:
    parts = split(make_enhanced_ct(tmp_path / "e.dcm"), total_known=total_known)

    assert_every_voxel_is_in_its_place(read_series(parts[::-1], SMALL))


@pytest.mark.parametrize("lacking", [0, 2, 3])
def test_a_concatenation_that_lacks_a_part_is_awaited(tmp_path: Path, lacking: int) -> None:
    parts = split(make_enhanced_ct(tmp_path / "e.dcm"), total_known=True)
    del parts[lacking]
    headers = [header for path in parts for header in slice_headers(pydicom.dcmread(path, specific_tags=HEADER_TAGS))]

    with pytest.raises(IncompleteSeries, match=r"has 3 of 4 parts of concatenation"):
        check_series(headers, SMALL, final=True)


def test_many_frames_without_functional_groups_are_refused(tmp_path: Path) -> None:
    path = make_enhanced_ct(tmp_path / "e.dcm")

    def as_plain_ct(ds: Dataset) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        del ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing = [1, 1]

    rewrite(path, as_plain_ct)

    with pytest.raises(SeriesError, match="without a usable ImagePositionPatient"):
        read_series([path], SMALL)
