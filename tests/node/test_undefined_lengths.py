"""Headers with sequences of undefined length, wherever what is kept of them in memory ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)
from pynetdicom.dsutils import split_dataset

from node.config import Config
from node.index import Index
from node.receive.headers import NUM_PREFIX_BYTES, Announced, Encoded, HeaderReader, Headers
from node.receive.status import RefusedError
from node.web.settings import WebConfig
from tests.factories import make_ct_series, make_enhanced_ct
from tests.node.sending import SUCCESS, store_one
from tests.node.test_web_store import stow
from tests.transfer_syntaxes import convert, undefine_lengths
from tests.web_server import WebServer
from tests.wire import dataset_of

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@pytest.fixture
def web(make_config: Callable[..., Config], index: Index) -> Iterator[WebServer]:
    server = WebServer(make_config().model_copy(update={"web": WebConfig()}), index)
    yield server
    server.stop()


def written(path: Path, syntax: str = ExplicitVRLittleEndian, *, is_undefined: bool = True) -> Path:
    """The file again, in this transfer syntax and with undefined lengths."""
    if is_undefined:
        undefine_lengths(path)
    convert(path, syntax)
    return path


def make_plain(folder: Path, num_referenced: int, syntax: str = ExplicitVRLittleEndian) -> Path:
    """A CT slice with a long sequence that nobody here wants."""

    def refer(_: int, ds: Dataset) -> None:
        items = [Dataset() for _ in range(num_referenced)]
        for item in items:
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = ds.SOPClassUID, generate_uid()
        ds.ReferencedImageSequence = items

    return written(make_ct_series(folder, num_slices=1, edit=refer)[0], syntax)


def make_enhanced(folder: Path, num_frames: int, syntax: str = ExplicitVRLittleEndian) -> Path:
    return written(make_enhanced_ct(folder / "enhanced.dcm", num_frames=num_frames, rows=4, columns=4), syntax)


def read(path: Path, num_prefix_bytes: int) -> Headers:
    dataset, (meta, start) = dataset_of(path), split_dataset(path)
    announced = Announced(
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
    )
    prefix = dataset[:num_prefix_bytes]
    return HeaderReader().read(Encoded(prefix=prefix, num_bytes=len(dataset), path=path, start=start), announced)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of values that break off; the node ignores warnings
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("make", [make_plain, make_enhanced])
def test_it_does_not_matter_where_the_prefix_ends(
    tmp_path: Path, make: Callable[[Path, int, str], Path], syntax: str
) -> None:
    path = make(tmp_path / "sent", 3, syntax)
    size = len(dataset_of(path))
    whole = read(path, size)
    assert len(whole.headers) == (3 if make is make_enhanced else 1)
    for num_bytes in range(8, size, 7):  # an odd step: it ends in every part of an item
        assert read(path, num_bytes) == whole, num_bytes


@pytest.mark.parametrize("make", [make_plain, make_enhanced])
def test_a_dataset_that_breaks_off_in_a_sequence_is_refused(tmp_path: Path, make: Callable[[Path, int], Path]) -> None:
    path = make(tmp_path / "sent", 3)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\xfe\xff\xdd\xe0")])
    for num_prefix_bytes in (100, 10**6):
        with pytest.raises(RefusedError, match="cannot be parsed"):
            read(path, num_prefix_bytes)


@pytest.mark.parametrize("syntax", SYNTAXES[:3])
@pytest.mark.parametrize("make", [make_plain, make_enhanced])
def test_c_store_and_stow_take_long_headers_of_undefined_lengths(
    receiver: Config, web: WebServer, tmp_path: Path, make: Callable[[Path, int, str], Path], syntax: str
) -> None:
    """Enhanced CT of 700 frames, as some scanners write it; and a plain slice that refers to many others."""
    by_c_store, by_stow = (make(tmp_path / name, 1800 if make is make_plain else 700, syntax) for name in "ab")
    end_of_sequence = b"\xff\xfe\xe0\xdd" if syntax == ExplicitVRBigEndian else b"\xfe\xff\xdd\xe0"
    assert dataset_of(by_c_store).rindex(end_of_sequence) > NUM_PREFIX_BYTES
    assert store_one(receiver, by_c_store) == SUCCESS
    assert stow(web, [by_stow.read_bytes()]).status_code == 200
