"""Elements found by their lengths alone, held against pydicom's reading of the same bytes."""

from io import BytesIO

import pytest
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from node.receive.elements import find_elements

WANTED = frozenset(int(Tag(k)) for k in ("SOPInstanceUID", "PatientComments", "InstanceNumber", "RescaleSlope", "Rows"))


def encode(ds: Dataset, *, is_implicit: bool) -> bytes:
    file = DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = True, is_implicit
    write_dataset(file, ds)
    return file.getvalue()


def make_ds(*, is_undefined: bool = True) -> Dataset:
    """A header with nested sequences between what is wanted."""
    inner, item, ds = Dataset(), Dataset(), Dataset()
    inner.CodeValue, inner.InstanceNumber = "T-D0050", "77"
    item.AnatomicRegionSequence = Sequence([inner, inner])
    item.RescaleSlope = "9"
    ds.SOPInstanceUID, ds.PatientComments, ds.InstanceNumber = "1.2.3", "x" * 10_000, "5"
    ds.ReferencedImageSequence = Sequence([item, Dataset(), item])
    ds.RequestAttributesSequence = Sequence([])
    ds.Rows, ds.RescaleSlope = 512, "1.5"
    ds.PixelData = b"\0" * 64
    ds["PixelData"].VR = "OW"
    for holder, keyword in ((item, "AnatomicRegionSequence"), (ds, "ReferencedImageSequence")):
        holder[keyword].is_undefined_length = is_undefined
        for one in holder[keyword].value:
            one.is_undefined_length_sequence_item = is_undefined
    return ds


@pytest.mark.parametrize("is_implicit", [True, False])
@pytest.mark.parametrize("is_undefined", [True, False])
def test_values_are_those_that_pydicom_reads(is_implicit: bool, is_undefined: bool) -> None:
    encoded = encode(make_ds(is_undefined=is_undefined), is_implicit=is_implicit)
    found = find_elements(encoded, WANTED, is_implicit=is_implicit)
    assert found is not None
    ds = read_dataset(BytesIO(encoded), is_implicit, True)
    raw = {int(tag): ds.get_item(tag).value for tag in WANTED}
    assert {tag: found.value(tag) for tag in WANTED} == raw
    assert found.num_pixel_bytes == 64
    assert found.pixels_at == len(encoded) - 64
    assert found.whole(int(Tag("Rows"))) == encoded[encoded.index(b"\x28\0\x10\0") :][: 8 + 2]


def test_what_is_not_plainly_written_is_left_to_pydicom() -> None:
    implicit, explicit = (encode(make_ds(), is_implicit=is_implicit) for is_implicit in (True, False))
    for encoded, is_implicit in (
        (explicit, True),
        (implicit, False),
        (explicit[:10_100], False),  # in the sequence
        (explicit[:40], False),  # in a value
        (explicit[:-80], False),  # before the pixel data
        (explicit.replace(b"\xfe\xff\xdd\xe0", b"\x08\0\0\0"), False),  # a sequence without end
        (explicit.replace(b"RO", b"??").replace(b"US", b"??"), False),  # a VR that there is not
        ((b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff") * 2000, False),  # nested without end
    ):
        assert find_elements(encoded, WANTED, is_implicit=is_implicit) is None
    no_pixels = find_elements(explicit[: -64 - 12], WANTED, is_implicit=False)
    assert no_pixels is not None
    assert no_pixels.num_pixel_bytes is None
