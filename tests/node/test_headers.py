"""What the receiver reads of an Instance on the wire: the same whatever it remembers, and wherever it stands."""

import struct
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian

from node.receive.headers import Announced, Encoded, HeaderReader
from node.receive.status import RefusedError
from tests.factories import make_ct_series, make_enhanced_ct
from tests.wire import dataset_of


def read(reader: HeaderReader, path: Path, prefix_bytes: int = 10**6) -> list[dict[str, Any]]:
    dataset, ds = dataset_of(path), dcmread(path)
    announced = Announced(
        sop_class_uid=str(ds.file_meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(ds.file_meta.MediaStorageSOPInstanceUID),
        transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
    )
    start = path.stat().st_size - len(dataset)
    encoded = Encoded(prefix=dataset[:prefix_bytes], num_bytes=len(dataset), path=path, start=start)
    return reader.read(encoded, announced).headers


def with_element(path: Path, keyword: str, raw: bytes) -> None:
    """Puts a value into an Implicit VR file that pydicom would not write."""
    data, head = path.read_bytes(), struct.pack("<HH", Tag(keyword).group, Tag(keyword).element)
    at = data.index(head, 200)
    (length,) = struct.unpack_from("<L", data, at + 4)
    path.write_bytes(data[: at + 4] + struct.pack("<L", len(raw)) + raw + data[at + 8 + length :])


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of such values; the node ignores warnings
@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "InstanceNumber", "SOPInstanceUID", "RescaleSlope"])
@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"1\\2 ",
        b"1\\2\\3\\4 ",
        b"nan\\0\\0 ",
        b" 1. \\2e0\\-3 ",
        b"a\\b\\c ",
        b"1_0 ",
        b"7.0 ",
        b"+7",
        b"\xff\xfe",
    ],
)
def test_what_is_remembered_of_a_series_changes_no_header(tmp_path: Path, keyword: str, odd: bytes) -> None:
    paths = make_ct_series(tmp_path / "sent", num_slices=4, transfer_syntax_uid=ImplicitVRLittleEndian)
    with_element(paths[2], keyword, odd)

    def headers_or_error(reader: HeaderReader, path: Path) -> object:
        try:
            return read(reader, path)
        except RefusedError as error:
            return str(error)

    remembering = HeaderReader()
    for path in paths:
        assert headers_or_error(remembering, path) == headers_or_error(HeaderReader(), path)


def test_headers_beyond_the_prefix_are_read_from_the_file(tmp_path: Path) -> None:
    single = make_ct_series(tmp_path / "sent", num_slices=1)[0]
    enhanced = make_enhanced_ct(tmp_path / "enhanced.dcm", num_frames=6)
    for path in (single, enhanced):
        assert read(HeaderReader(), path, prefix_bytes=200) == read(HeaderReader(), path)
    assert len(read(HeaderReader(), enhanced)) == 6


def test_slices_of_a_known_series_are_read_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is most of the time of a header."""
    first, *others = make_ct_series(tmp_path / "sent", num_slices=3)
    expected = [read(HeaderReader(), path) for path in others]
    reader = HeaderReader()
    read(reader, first)
    monkeypatch.setattr("node.receive.headers.read_dataset", None)
    assert [read(reader, path) for path in others] == expected


def test_a_slice_of_a_known_series_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    first, second = make_ct_series(tmp_path / "sent", num_slices=2)
    reader = HeaderReader()
    read(reader, first)
    second.write_bytes(second.read_bytes()[:-2])
    with pytest.raises(RefusedError, match="shorter than they say"):
        read(reader, second)
