"""Sending as `cspine send` and `cspine check` do: to real peers, to none, and with files that are not DICOM."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from node.config import DicomDestination
from node.send import Answer, SendError, find_dicom_files, send_files
from tests.factories import make_ct_series, make_report
from tests.raw_scu import echo
from tests.waiting import WAIT_S

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def nowhere(free_port: Callable[[], int]) -> DicomDestination:
    """An address where nothing listens."""
    return DicomDestination(
        type="dicom", name="peer", host="127.0.0.1", port=free_port(), ae_title="PEER", timeout_s=WAIT_S
    )


@pytest.fixture
def stored() -> list[tuple[str, bytes]]:
    """Transfer syntax and encoded dataset of what `peer` accepted."""
    return []


@pytest.fixture
def peer(nowhere: DicomDestination, stored: list[tuple[str, bytes]]) -> Iterator[DicomDestination]:
    """A Storage SCP for CT that wants no Instance numbered 3."""

    def store(event: evt.Event) -> int:
        if event.dataset.InstanceNumber == 3:
            return 0xA700
        stored.append((event.context.transfer_syntax, event.encoded_dataset(include_meta=False)))
        return 0x0000

    ae = AE(ae_title="PEER")
    ae.require_called_aet = True
    ae.add_supported_context(Verification)
    ae.add_supported_context(CTImageStorage, [ExplicitVRLittleEndian, RLELossless])
    server = ae.start_server((nowhere.host, nowhere.port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    yield nowhere
    server.shutdown()


def test_files_go_out_as_they_are_each_in_its_own_transfer_syntax(
    peer: DicomDestination, stored: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    paths = [
        *make_ct_series(tmp_path / "plain", num_slices=2),
        *make_ct_series(tmp_path / "rle", num_slices=2, transfer_syntax_uid=RLELossless),
    ]
    seen: list[Path] = []
    assert send_files(paths, peer, calling_ae_title="TEST", on_answer=lambda answer: seen.append(answer.path)) == []
    assert seen == paths
    assert [syntax for syntax, _ in stored] == [ExplicitVRLittleEndian] * 2 + [RLELossless] * 2
    for path, (_, encoded) in zip(paths, stored, strict=True):
        assert path.read_bytes().endswith(encoded)


def test_each_refusal_is_told_with_its_reason_and_the_rest_is_sent(
    peer: DicomDestination, stored: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    paths = [*make_ct_series(tmp_path / "ct", num_slices=4), make_report(tmp_path / "report.dcm")]
    told: list[Answer] = []
    refused = send_files(paths, peer, calling_ae_title="TEST", on_answer=told.append)
    assert [item.path for item in refused] == [paths[2], paths[4]]
    assert [item for item in told if not item.taken] == refused
    assert len(stored) == 3
    assert "refused 0002.dcm with status 0xA700" in refused[0].reason
    assert not refused[0].permanent
    assert "does not take Comprehensive SR Storage as Explicit VR Little Endian; allow it there" in refused[1].reason
    assert refused[1].permanent


@contextmanager
def taking(nowhere: DicomDestination, sop_class: str, syntaxes: list[str], status: int = 0) -> Iterator[list[Dataset]]:
    """A Storage SCP for one SOP Class in these transfer syntaxes; gives what it was sent."""
    taken: list[Dataset] = []

    def store(event: evt.Event) -> int:
        taken.append(dcmread(BytesIO(event.encoded_dataset())))
        return status

    ae = AE(ae_title="PEER")
    ae.add_supported_context(sop_class, syntaxes)
    server = ae.start_server((nowhere.host, nowhere.port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield taken
    finally:
        server.shutdown()


@pytest.mark.parametrize("offered", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("own", [RLELossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_peer_that_takes_another_transfer_syntax_gets_the_same_pixels_in_that(
    nowhere: DicomDestination, tmp_path: Path, own: str, offered: str
) -> None:
    paths = make_ct_series(tmp_path, num_slices=2, transfer_syntax_uid=own)
    with taking(nowhere, CTImageStorage, [offered]) as taken:
        assert send_files(paths, nowhere, calling_ae_title="TEST") == []
    for path, ds in zip(paths, taken, strict=True):
        assert ds.file_meta.TransferSyntaxUID == offered
        assert ds.SOPInstanceUID == dcmread(path).SOPInstanceUID
        np.testing.assert_array_equal(ds.pixel_array, dcmread(path).pixel_array)


def test_pixels_that_cannot_be_decoded_here_are_a_refusal_of_that_file_alone(
    nowhere: DicomDestination, tmp_path: Path
) -> None:
    damaged, whole = make_ct_series(tmp_path, num_slices=2, transfer_syntax_uid=RLELossless)
    ds = dcmread(damaged)
    ds.PixelData = encapsulate([b"no RLE at all"])
    ds.save_as(damaged)
    with taking(nowhere, CTImageStorage, [ExplicitVRLittleEndian]) as taken:
        (refused,) = send_files([damaged, whole], nowhere, calling_ae_title="TEST")
    assert (refused.path, refused.permanent, len(taken)) == (damaged, True, 1)
    assert (
        "does not take 0000.dcm as it is, and it cannot be rewritten from RLE Lossless (RuntimeError)" in refused.reason
    )


@pytest.mark.parametrize(
    ("status", "taken", "permanent", "said"),
    [
        (0x0000, True, False, ""),
        (0xB007, True, False, "took 0000.dcm with status 0xB007 (attributes were changed or discarded)"),
        (0x0111, True, False, "it has this Instance already"),
        (0xA700, False, False, "out of resources; is its disk full?"),
        (0x0110, False, False, "processing failure"),
        (0x0999, False, False, "unknown status"),
        (0xA900, False, True, "the dataset does not match its SOP Class"),
        (0xC123, False, True, "it cannot understand the object"),
        (0x0122, False, True, "SOP Class not supported; allow it there"),
        (0x0124, False, True, "not authorised"),
    ],
)
def test_a_status_says_whether_the_object_is_there_and_whether_to_send_it_again(
    nowhere: DicomDestination, tmp_path: Path, status: int, taken: bool, permanent: bool, said: str
) -> None:
    answers: list[Answer] = []
    with taking(nowhere, CTImageStorage, [ExplicitVRLittleEndian], status):
        send_files(make_ct_series(tmp_path, num_slices=1), nowhere, calling_ae_title="TEST", on_answer=answers.append)
    assert [(answer.taken, answer.permanent) for answer in answers] == [(taken, permanent)]
    assert said in answers[0].reason


def test_a_peer_that_is_not_there_is_named_with_what_to_check(nowhere: DicomDestination, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, num_slices=1)
    with pytest.raises(SendError, match=f"PEER at 127.0.0.1:{nowhere.port} cannot be reached; check host and port"):
        send_files(paths, nowhere, calling_ae_title="TEST")
    with pytest.raises(SendError, match="cannot be reached"):
        echo(nowhere, calling_ae_title="TEST")


def test_a_peer_that_takes_the_connection_and_hangs_up_is_not_called_unreachable(nowhere: DicomDestination) -> None:
    with socket.create_server((nowhere.host, nowhere.port)) as listener:
        hanging_up = threading.Thread(target=lambda: listener.accept()[0].close())
        hanging_up.start()
        with pytest.raises(SendError, match="does not answer in DICOM; check the port, and whether it wants TLS"):
            echo(nowhere, calling_ae_title="TEST")
        hanging_up.join()


def test_a_peer_that_takes_the_connection_and_is_silent_is_said_to_be_so(nowhere: DicomDestination) -> None:
    with (
        socket.create_server((nowhere.host, nowhere.port)),
        pytest.raises(SendError, match=r"did not answer within 0\.5 s; see whether it hangs, or wants TLS"),
    ):
        echo(nowhere.model_copy(update={"timeout_s": 0.5}), calling_ae_title="TEST")


def test_a_host_name_that_does_not_resolve_is_a_send_error(nowhere: DicomDestination) -> None:
    with pytest.raises(SendError, match=r"no-such-host\.invalid:\d+ cannot be reached: .+; check the host"):
        echo(nowhere.model_copy(update={"host": "no-such-host.invalid"}), calling_ae_title="TEST")


def test_a_wrong_called_ae_title_is_told_as_such(peer: DicomDestination) -> None:
    with pytest.raises(SendError, match="rejected the association from TEST: Called AE title not recognised") as error:
        echo(peer.model_copy(update={"ae_title": "WRONG"}), calling_ae_title="TEST")
    assert error.value.permanent


def test_echo_is_answered(peer: DicomDestination) -> None:
    echo(peer, calling_ae_title="TEST")


def test_something_that_listens_but_does_not_speak_dicom_is_a_send_error_in_time(nowhere: DicomDestination) -> None:
    with socket.create_server((nowhere.host, nowhere.port)) as server:
        connections: list[socket.socket] = []
        accepting = threading.Thread(target=lambda: connections.append(server.accept()[0]))
        accepting.start()
        with pytest.raises(SendError, match="PEER at"):
            echo(nowhere.model_copy(update={"timeout_s": 0.5}), calling_ae_title="TEST")
        accepting.join()
        connections[0].close()


def test_a_file_that_does_not_say_what_it_is_or_cannot_be_read_keeps_back_no_other(
    peer: DicomDestination, stored: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    paths = make_ct_series(tmp_path, num_slices=2)
    nothing, damaged, cut, gone = bad = [tmp_path / name for name in ("nothing", "damaged", "cut", "gone")]
    nothing.write_bytes(b"\0" * 128 + b"DICM")
    damaged.write_bytes(paths[0].read_bytes()[128:])
    cut.write_bytes(paths[0].read_bytes()[:142])
    told: list[Answer] = []
    refused = send_files([*bad, *paths], peer, calling_ae_title="TEST", on_answer=told.append)
    assert [item.reason for item in refused] == [
        f"{nothing} lacks SOP Class, SOP Instance or transfer syntax in its File Meta Information (PS3.10 7.1)",
        f"{damaged} is no DICOM file, or a damaged one",
        f"{cut} is no DICOM file, or a damaged one",
        f"{gone} cannot be read: No such file or directory",
    ]
    assert not any(item.permanent for item in refused)
    assert len(stored) == 2
    assert len(told) == 6
    assert send_files(bad, peer, calling_ae_title="TEST") == refused


def test_dicom_files_are_found_in_all_folders_whatever_their_names(tmp_path: Path) -> None:
    make_ct_series(tmp_path / "a" / "b", num_slices=2)
    (tmp_path / "a" / "b" / "0000.dcm").rename(tmp_path / "IM000001")
    (tmp_path / "notes.txt").write_text("not DICOM", encoding="utf-8")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    found, num_others = find_dicom_files(tmp_path)
    assert found == [tmp_path / "IM000001", tmp_path / "a" / "b" / "0001.dcm"]
    assert num_others == 2


def test_a_file_whose_meta_information_lacks_its_instance_is_refused_and_the_rest_is_sent(
    nowhere: DicomDestination, tmp_path: Path
) -> None:
    without, whole = make_ct_series(tmp_path, num_slices=2)
    ds = dcmread(without)
    del ds.file_meta.MediaStorageSOPInstanceUID
    ds.save_as(without, enforce_file_format=False)
    with taking(nowhere, CTImageStorage, [ExplicitVRLittleEndian]) as taken:
        (refused,) = send_files([without, whole], nowhere, calling_ae_title="TEST")
    assert (refused.path, len(taken)) == (without, 1)
    assert "lacks SOP Class, SOP Instance or transfer syntax" in refused.reason
