"""The same Instance in another transfer syntax is the same Instance; one that differs in anything else is not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from node.config import Config
from node.index import Index
from node.receive import same
from tests.factories import make_ct_series, make_enhanced_ct
from tests.node.sending import CONFLICT, SUCCESS, files_under, store_one
from tests.transfer_syntaxes import convert, undefine_lengths

SYNTAXES = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLSLossless,
]


def rich(_: int, ds: Dataset) -> None:
    """What is encoded in many ways: sequences, private elements, numbers of several kinds, a character set."""
    ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Müller^Jörg"
    ds.SmallestImagePixelValue, ds.PixelPaddingValue, ds.WindowCenter = 0, 63000, ["40", "300.0"]
    ds.FrameIncrementPointer, ds.TableOfYBreakPoints, ds.DistanceSourceToDetector = 0x00181063, 7, "1085.60"
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, "1.2.3"
    item.PurposeOfReferenceCodeSequence = [Dataset()]
    ds.ReferencedImageSequence = [item, Dataset(), item]
    block = ds.private_block(0x0029, "VENDOR", create=True)
    block.add_new(1, "LO", "odd")
    block.add_new(2, "OB", b"\1\2\3\4")
    block.add_new(3, "US", 258)
    block.add_new(4, "SQ", [item])


def both(path: Path, syntax: str, edit: Callable[[Dataset], None] | None = None) -> Path:
    """A copy in this transfer syntax."""
    other = path.with_name("other.dcm")
    shutil.copy(path, other)
    if edit is not None:
        ds = dcmread(other)
        edit(ds)
        ds.save_as(other)
    convert(other, syntax)
    return other


def are_same(one: Path, other: Path) -> bool:
    with one.open("rb") as first, other.open("rb") as second:
        return same.is_same(first, second)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_ct_series(tmp_path / "sent", num_slices=1, rows=32, columns=32, edit=rich)[0]


@pytest.mark.parametrize("second", SYNTAXES)
@pytest.mark.parametrize("first", [ImplicitVRLittleEndian, RLELossless])
def test_an_instance_is_the_same_in_every_transfer_syntax(plain: Path, first: str, second: str) -> None:
    other = both(plain, second)
    convert(plain, first)
    undefine_lengths(other)
    assert are_same(plain, other) == (first != second)  # who sends it in the same one sends the same bytes


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.parametrize(
    "edit",
    [
        lambda ds: setattr(ds, "PatientName", "Other^Name"),
        lambda ds: setattr(ds, "InstanceNumber", 2),
        lambda ds: delattr(ds, "StudyID"),
        lambda ds: setattr(ds.ReferencedImageSequence[2], "ReferencedSOPInstanceUID", "1.2.4"),
        lambda ds: ds.ReferencedImageSequence.pop(),
        lambda ds: setattr(ds[0x0029, 0x1003], "value", 513),
        lambda ds: setattr(ds, "PixelData", ds.PixelData[:-1] + b"\77"),
        lambda ds: setattr(ds, "PixelData", ds.PixelData[2:] + ds.PixelData[:2]),
    ],
)
def test_an_instance_that_differs_in_anything_is_another(
    plain: Path, syntax: str, edit: Callable[[Dataset], None]
) -> None:
    assert not are_same(plain, both(plain, syntax, edit))


def test_enhanced_ct_is_compared_frame_by_frame(tmp_path: Path) -> None:
    path = make_enhanced_ct(tmp_path / "a.dcm", num_frames=4)
    assert are_same(path, both(path, RLELossless))
    assert not are_same(path, both(path, RLELossless, lambda ds: setattr(ds, "PixelData", ds.PixelData[:-1] + b"\77")))


@pytest.mark.parametrize("bound", ["_MAX_TIME_S", "_MAX_FRAME_BYTES", "_MAX_HEADER_BYTES"])
def test_what_would_cost_much_to_compare_is_taken_for_another(
    plain: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(same, bound, -1.0 if bound == "_MAX_TIME_S" else 100)
    assert not are_same(plain, both(plain, RLELossless))


def test_what_is_deflated_or_damaged_is_compared_by_its_bytes(plain: Path) -> None:
    assert not are_same(plain, both(plain, DeflatedExplicitVRLittleEndian))
    other = both(plain, RLELossless)
    other.write_bytes(other.read_bytes()[:-30])
    assert not are_same(plain, other)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_c_store_again_in_another_transfer_syntax_succeeds_and_stores_nothing(
    receiver: Config, index: Index, plain: Path, syntax: str
) -> None:
    other, another = both(plain, syntax), plain.with_name("another.dcm")
    both(plain, syntax, lambda ds: setattr(ds, "PatientName", "Other^Name")).rename(another)
    other = both(plain, syntax)
    convert(plain, ImplicitVRLittleEndian)
    assert store_one(receiver, plain) == SUCCESS
    assert store_one(receiver, other) == SUCCESS
    assert store_one(receiver, another) == CONFLICT
    assert [case.num_instances for case in index.cases()] == [1]
    assert len(files_under(index.data_dir)) == 1
