"""Big-endian Instances, as dcmtk writes them: what is given out in little endian has the same values, each of them."""

import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import DataElement, Dataset, dcmread, dcmwrite
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from node.config import Config
from node.index import Index
from node.transcode import transcoded
from tests.factories import make_ct_series
from tests.node.retrieving import tool
from tests.node.test_web import path_of
from tests.web_server import WebServer, hold


def sixteen_bits(_ds: Dataset) -> None:
    """As the factory makes it: OW."""


def eight_bits_in_bytes(ds: Dataset) -> None:
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.Rows, ds.Columns = 4, 5
    ds["PixelData"] = DataElement(Tag("PixelData"), "OB", bytes(range(20)))


def eight_bits_in_words(ds: Dataset) -> None:
    eight_bits_in_bytes(ds)
    ds["PixelData"].VR = "OW"


PIXELS = [sixteen_bits, eight_bits_in_bytes, eight_bits_in_words]


def make_big_endian(folder: Path, edit: Callable[[Dataset], None]) -> tuple[Path, Dataset]:
    """A file by dcmtk with a value of each VR that has an order of bytes, also in an item, and what it was made of."""
    (path,) = make_ct_series(folder, num_slices=1)
    ds = dcmread(path)
    edit(ds)
    item = Dataset()
    for tag, vr, value in (
        (0x00280106, "US", 258),
        (0x00280009, "AT", [0x00181063, 0x00181065]),
        (0x00189306, "FD", 1.25),
        (0x00189073, "FL", 2.5),
        (0x00281201, "OW", b"\1\2\3\4"),
        (0x00660016, "OF", np.array([1.5, -2.5], "<f4").tobytes()),
        (0x00660040, "OL", np.array([1, 2**31], "<u4").tobytes()),
        (0x00660022, "OD", np.array([1.5, 1e300], "<f8").tobytes()),
        (0x00420011, "OB", b"%PDF"),
    ):
        ds.add_new(tag, vr, value)
        item.add_new(tag, vr, value)
    ds.ReferencedImageSequence = [item]
    dcmwrite(path, ds)
    subprocess.run([tool("dcmconv"), "+tb", path, path], check=True, timeout=30)
    assert dcmread(path).file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    return path, ds


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_big_endian_instance_is_given_to_peers_with_the_same_values(
    tmp_path: Path, pixels: Callable[[Dataset], None], syntax: str
) -> None:
    path, ds = make_big_endian(tmp_path, pixels)
    with transcoded(path, syntax) as written:
        given = dcmread(written)
        assert given.file_meta.TransferSyntaxUID == syntax
        assert np.array_equal(given.pixel_array, dcmread(path).pixel_array)
        assert given == ds if syntax == ExplicitVRLittleEndian else given.PixelData == ds.PixelData


@pytest.mark.parametrize("pixels", PIXELS)
def test_a_big_endian_instance_is_given_in_little_endian_over_the_web(
    index: Index, pixels: Callable[[Dataset], None]
) -> None:
    path, ds = make_big_endian(index.data_dir / "instances", pixels)
    hold(index, [path])
    server = WebServer(Config(), index)
    try:
        answer = server.get(path_of(path), "application/dicom")
        given = dcmread(BytesIO(answer.content))
        assert given.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert np.array_equal(given.pixel_array, dcmread(path).pixel_array)
        assert given == ds
        told = server.get(path_of(path) + "/metadata").json()[0]
        del told["7FE00010"], ds.PixelData
        assert Dataset.from_json(told) == Dataset.from_json(ds.to_json_dict())
    finally:
        server.stop()


def test_values_of_unknown_vr_are_little_endian_in_every_transfer_syntax(tmp_path: Path) -> None:
    """PS3.5 6.2.2; pydicom knows some of them all the same, public and private ones."""
    path, _ = make_big_endian(tmp_path, sixteen_bits)
    before = path.read_bytes()
    creator = b"GEMS_IMAG_01"
    more = b"\x00\x27\x00\x10LO\x00\x0c" + creator + b"\x00\x27\x10\x06UN\x00\x00\x00\x00\x00\x02\x02\x01"
    more += b"\x00\x28\x01\x07UN\x00\x00\x00\x00\x00\x02\x02\x01"
    # Between groups 0020 and 0028, and after the US of (0028,0106).
    at = before.index(b"\x00\x28\x00\x02US")
    after = before.index(b"\x00\x28\x01\x06US\x00\x02") + 10
    path.write_bytes(before[:at] + more[:-14] + before[at:after] + more[-14:] + before[after:])
    with transcoded(path, ExplicitVRLittleEndian) as written:
        given = dcmread(written)
        assert given[0x00280107].value == 258
        assert given.get_item(0x00271006).value == b"\2\1"
