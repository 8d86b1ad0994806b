"""Enhanced CT that describes other frames than it has: refused by name, before it costs anything."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate_extended, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from node.config import Config
from node.index import Index
from node.receive import headers
from node.receive.status import RefusedError
from tests.factories import make_ct_series, make_enhanced_ct
from tests.node.sending import CANNOT_UNDERSTAND, SUCCESS, store_one
from tests.node.test_undefined_lengths import read, written
from tests.wire import dataset_of

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
NONE_TOLD = object()


def with_frames(
    folder: Path,
    num_items: int,
    number_of_frames: object = NONE_TOLD,
    syntax: str = ExplicitVRLittleEndian,
    is_undefined: bool = False,
) -> Path:
    """A plain CT slice that describes so many frames by empty items."""
    folder.mkdir(exist_ok=True)
    (path,) = make_ct_series(folder, num_slices=1, rows=8, columns=8)
    ds = dcmread(path)
    ds.PerFrameFunctionalGroupsSequence = [Dataset() for _ in range(num_items)]
    if number_of_frames is not NONE_TOLD:
        ds.NumberOfFrames = number_of_frames
    ds.save_as(path)
    return written(path, syntax, is_undefined=is_undefined)


@pytest.mark.parametrize("is_undefined", [True, False])
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    ("num_items", "number_of_frames", "why"),
    [
        (300, 2, "NumberOfFrames is 2, and 300 are described"),
        (300, 300, "300 frames are more than the pixel data can hold"),
        (300, NONE_TOLD, "300 frames are more than the pixel data can hold"),
    ],
)
def test_frames_that_there_cannot_be_are_refused_before_one_is_made_of_each(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_items: int,
    number_of_frames: object,
    why: str,
    syntax: str,
    is_undefined: bool,
) -> None:
    path = with_frames(tmp_path, num_items, number_of_frames, syntax, is_undefined)
    monkeypatch.setattr(headers, "read_dataset", None)  # pydicom, which makes objects
    with pytest.raises(RefusedError, match=why):
        read(path, 10**7)


def test_frames_that_are_not_plainly_written_are_counted_before_headers_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_frames(tmp_path, 300, 2)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"SH\x02\0001 ", b"XX\x02\0001 "))  # a VR that there is not
    monkeypatch.setattr(headers, "slice_headers", None)
    with pytest.raises(RefusedError, match="NumberOfFrames is 2, and 300 are described"):
        read(path, 10**7)


@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless])
def test_enhanced_ct_is_taken_as_it_is_written(tmp_path: Path, syntax: str) -> None:
    path = make_enhanced_ct(tmp_path / "a.dcm", num_frames=5, transfer_syntax_uid=RLELossless)
    if syntax != RLELossless:
        written(make_enhanced_ct(path, num_frames=5), syntax)
    assert len(read(path, 10**7).headers) == 5


def with_offset_table(path: Path) -> Path:
    make_enhanced_ct(path, num_frames=5, transfer_syntax_uid=RLELossless)
    ds = dcmread(path)
    frames = list(generate_frames(ds.PixelData, number_of_frames=5))
    ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)
    return path


def with_group_length(path: Path) -> Path:
    make_enhanced_ct(path, num_frames=5)
    data, head = path.read_bytes(), b"\xe0\x7f\x10\x00OW"
    length = len(data) - data.index(head)
    path.write_bytes(data.replace(head, b"\xe0\x7f\x00\x00UL\x04\x00" + length.to_bytes(4, "little") + head))
    return path


@pytest.mark.parametrize("make", [with_offset_table, with_group_length])
def test_what_comes_before_the_pixel_data_in_their_group_is_not_taken_for_them(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """An Extended Offset Table has 8 bytes a frame: no room for a frame, and there when the pixel data are cut off."""
    path = make(tmp_path / "a.dcm")
    for num_prefix_bytes in (10**7, dataset_of(path).index(b"\xe0\x7f") + 10):
        assert len(read(path, num_prefix_bytes).headers) == 5
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(RefusedError, match="the pixel data are shorter than they say"):
        read(path, 10**7)


@pytest.mark.parametrize("is_undefined", [True, False])
@pytest.mark.parametrize("syntax", SYNTAXES[:3])
def test_enhanced_ct_whose_prefix_ends_in_front_of_the_pixel_data_is_read_on(
    tmp_path: Path, syntax: str, is_undefined: bool
) -> None:
    """Nothing is known of the pixel data yet: they were taken for none, in which there is room for no frame."""
    path = written(make_enhanced_ct(tmp_path / "a.dcm", num_frames=5), syntax, is_undefined=is_undefined)
    group = b"\x7f\xe0\x00\x10" if syntax == ExplicitVRBigEndian else b"\xe0\x7f\x10\x00"
    assert len(read(path, dataset_of(path).index(group)).headers) == 5


@pytest.mark.parametrize("number_of_frames", ["+5", "005", "5 ", ""])
def test_a_number_of_frames_may_be_written_in_any_way(tmp_path: Path, number_of_frames: str) -> None:
    path = make_enhanced_ct(tmp_path / "a.dcm", num_frames=5)
    head = b"\x28\0\x08\0IS"
    told = number_of_frames.encode() + b" " * (len(number_of_frames) % 2)
    path.write_bytes(path.read_bytes().replace(head + b"\2\0005 ", head + bytes([len(told), 0]) + told))
    assert len(read(path, 10**7).headers) == 5


def test_c_store_of_very_many_empty_frames_is_refused_by_name(
    receiver: Config, index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A quarter of a million of them, 2 MB, cost minutes of CPU and hundreds of MB."""
    assert store_one(receiver, with_frames(tmp_path / "odd", 60_000)) == CANNOT_UNDERSTAND
    assert "60000 frames; an Instance may have 50000" in caplog.text
    assert store_one(receiver, make_enhanced_ct(tmp_path / "good.dcm")) == SUCCESS
    assert len(index.cases()) == 1
