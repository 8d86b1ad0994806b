"""The fast lane, held against pynetdicom's own SCP: the same bytes, statuses and answers, however a message is cut."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from pynetdicom import AE, evt
from pynetdicom.dimse_messages import C_STORE_RQ, C_STORE_RSP
from pynetdicom.dimse_primitives import C_STORE

from node.config import Config
from node.implementation import IMPLEMENTATION_CLASS_UID, implementation_version_name
from node.index import Index
from node.receive import lane
from node.receive.command import Command, c_store_response, parse_command
from node.receive.headers import Announced
from node.receive.store import file_meta
from tests.factories import make_ct_series
from tests.ports import free_port
from tests.receiver import listening
from tests.stored import path_of
from tests.waiting import wait_until
from tests.wire import (
    A_ABORT,
    ABORT,
    COMMAND,
    CT_CONTEXT,
    ECHO_CONTEXT,
    LAST,
    P_DATA_TF,
    RELEASE,
    Peer,
    associate_rq,
    c_echo,
    c_store,
    command,
    dataset_of,
    messages,
    pdu,
    value,
)

BY_US = IMPLEMENTATION_CLASS_UID, implementation_version_name()  # as the association announces
SUCCESS, NO_SUCH_CLASS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0x0122, 0xA700, 0xC000
MakeConfig = Callable[..., Config]


@pytest.fixture
def receiver(make_config: MakeConfig, index: Index) -> Iterator[Config]:
    with listening(make_config(receive={"max_instance_mb": 1}), index, grace_s=0.5) as config:
        yield config


@pytest.fixture
def instance(tmp_path: Path) -> tuple[str, bytes]:
    """SOPInstanceUID and dataset of a good Instance of 33 KB."""
    (path,) = make_ct_series(tmp_path / "sent", num_slices=1, rows=128, columns=128)
    return str(dcmread(path).SOPInstanceUID), dataset_of(path)


def stored(index: Index, uid: str) -> bytes:
    path = path_of(index, uid)
    return dataset_of(path)


def files_with_content(index: Index) -> list[Path]:
    return [path for path in (index.data_dir / "instances").rglob("*.dcm") if size_of(path)]


def size_of(path: Path) -> int:
    """0 for a file that is just being removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# ---- the same as pynetdicom ----


def test_file_meta_information_and_dataset_are_what_pynetdicom_gives_but_for_who_wrote_them(
    receiver: Config, index: Index, instance: tuple[str, bytes]
) -> None:
    uid, dataset = instance
    given: list[bytes] = []
    ae = AE()
    ae.add_supported_context(CTImageStorage, ExplicitVRLittleEndian)
    port = free_port()
    handlers = [(evt.EVT_C_STORE, lambda event: (given.append(event.encoded_dataset()), 0)[1])]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    for at in (receiver.receive, receiver.receive.model_copy(update={"port": port})):
        with Peer(at) as peer:
            peer.associate()
            peer.send(*messages(uid, dataset))
            assert peer.status() == SUCCESS
            peer.release()
    server.shutdown()
    path = path_of(index, uid)
    theirs, ours = dcmread(BytesIO(given[0])), dcmread(path)
    assert ours == theirs
    for ds in (theirs, ours):
        ds.file_meta.ImplementationClassUID, ds.file_meta.ImplementationVersionName = BY_US
        del ds.file_meta.FileMetaInformationGroupLength  # of our names
    assert ours.file_meta == theirs.file_meta


@pytest.mark.parametrize("length", [1, 20, 63, 64])
def test_the_file_meta_information_is_encoded_as_pydicom_does(length: int) -> None:
    from pynetdicom.dsutils import create_file_meta, encode_file_meta

    uid = "1." + "2" * (length - 2) if length > 1 else "1"
    announced = Announced(sop_class_uid=CTImageStorage, sop_instance_uid=uid, transfer_syntax_uid=RLELossless)
    expected = encode_file_meta(
        create_file_meta(
            sop_class_uid=CTImageStorage,
            sop_instance_uid=uid,
            transfer_syntax=RLELossless,
            implementation_uid=BY_US[0],
            implementation_version=BY_US[1],
        )
    )
    assert file_meta(announced) == bytes(128) + b"DICM" + expected


@pytest.mark.parametrize(("status", "comment"), [(0x0000, ""), (0xA700, "no"), (0xC111, "x" * 90)])
@pytest.mark.parametrize("max_length", [0, 16384, 64, 7])
def test_a_response_is_encoded_as_pynetdicom_does(status: int, comment: str, max_length: int) -> None:
    request = Command(
        has_dataset=True, is_c_store=True, message_id=77, sop_class_uid=CTImageStorage, sop_instance_uid="1.2.345"
    )
    primitive = C_STORE()
    primitive.MessageIDBeingRespondedTo, primitive.Status = 77, status
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = CTImageStorage, "1.2.345"
    if comment:
        primitive.ErrorComment = comment[:64]
    message = C_STORE_RSP()
    message.primitive_to_message(primitive)
    expected = [
        pdu(P_DATA_TF, value(9, data[0], data[1:]))
        for part in message.encode_msg(9, max_length)
        for _, data in part.presentation_data_value_list
    ]
    if max_length == 0:
        assert list(c_store_response(request, 9, status, comment, 0)) == expected
    joined = b"".join(part[12:] for part in c_store_response(request, 9, status, comment, max_length))
    assert joined == b"".join(part[12:] for part in expected)
    assert all(len(part) - 6 <= max(max_length, 7) or not max_length for part in
               c_store_response(request, 9, status, comment, max_length))  # fmt: skip


def test_a_request_is_read_as_pynetdicom_writes_it() -> None:
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority, primitive.MoveOriginatorApplicationEntityTitle = 300, 1, "PACS"
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = CTImageStorage, "1.2.34"
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    (part, *_) = message.encode_msg(1, 0)
    encoded = part.presentation_data_value_list[0][1][1:]
    message.command_set.CommandDataSetType = 1
    read = parse_command(encoded)
    assert (read.is_c_store, read.message_id) == (True, 300)
    assert (read.sop_class_uid, read.sop_instance_uid) == (CTImageStorage, "1.2.34")


# ---- however it is cut ----


def cut(data: bytes, sizes: Callable[[], int]) -> list[bytes]:
    pieces = []
    while data:
        size = sizes()
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def one_pdu(uid: str, dataset: bytes) -> list[bytes]:
    """The command and two values of the dataset in one PDU."""
    half = len(dataset) // 2
    values = [(COMMAND | LAST, c_store(uid)), (0, dataset[:half]), (LAST, dataset[half:])]
    return [pdu(P_DATA_TF, b"".join(value(CT_CONTEXT, control, piece) for control, piece in values))]


def tiny_pdus(uid: str, dataset: bytes) -> list[bytes]:
    """Every PDU holds a value of 7 bytes, of the command too; the last value is empty."""
    commands, pieces = cut(c_store(uid), lambda: 7), [*cut(dataset[:4000], lambda: 7), dataset[4000:], b""]
    return [
        *(pdu(P_DATA_TF, value(1, COMMAND | (LAST if c is commands[-1] else 0), c)) for c in commands),
        *(pdu(P_DATA_TF, value(1, LAST if n == len(pieces) - 1 else 0, p)) for n, p in enumerate(pieces)),
    ]


def any_pdus(uid: str, dataset: bytes) -> list[bytes]:
    """Values of any size, any number of them in a PDU."""
    rng = random.Random(5)
    commands, pieces = cut(c_store(uid), lambda: rng.randint(1, 90)), cut(dataset, lambda: rng.randint(1, 9000))
    values = [value(1, COMMAND | (LAST if n == len(commands) - 1 else 0), c) for n, c in enumerate(commands)]
    values += [value(1, LAST if n == len(pieces) - 1 else 0, p) for n, p in enumerate(pieces)]
    pdus = []
    while values:
        count = rng.randint(1, 5)
        pdus.append(pdu(P_DATA_TF, b"".join(values[:count])))
        values = values[count:]
    return pdus


@pytest.mark.parametrize("form", [messages, one_pdu, tiny_pdus, any_pdus])
@pytest.mark.parametrize("segment", [None, 1000])
def test_an_instance_is_stored_however_its_message_is_cut(
    receiver: Config, index: Index, instance: tuple[str, bytes], form: Any, segment: int | None
) -> None:
    """segment: bytes that are sent at a time, without regard to PDUs; None for all at once."""
    uid, dataset = instance
    wire = b"".join(form(uid, dataset))
    with Peer(receiver.receive) as peer:
        peer.associate()
        for piece in cut(wire, lambda: segment or len(wire)):
            peer.send(piece)
        assert peer.status() == SUCCESS
        peer.release()
    assert stored(index, uid) == dataset


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_the_dataset_is_kept_in_its_transfer_syntax(
    receiver: Config, index: Index, tmp_path: Path, syntax: str
) -> None:
    (path,) = make_ct_series(tmp_path / "sent", num_slices=1, transfer_syntax_uid=syntax)
    uid, dataset = str(dcmread(path).SOPInstanceUID), dataset_of(path)
    with Peer(receiver.receive) as peer:
        peer.associate(associate_rq([syntax]))
        peer.send(*messages(uid, dataset, piece=300))
        assert peer.status() == SUCCESS
    assert stored(index, uid) == dataset


def test_many_requests_before_the_first_answer_are_answered_in_order(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    paths = make_ct_series(tmp_path / "sent", num_slices=5)
    with Peer(receiver.receive) as peer:
        peer.associate()
        for number, path in enumerate(paths):
            uid = str(dcmread(path).SOPInstanceUID)
            request, *rest = messages(uid, dataset_of(path))
            request = pdu(P_DATA_TF, value(1, COMMAND | LAST, c_store(uid, message_id=number)))
            peer.send(request, *rest)
        peer.send(RELEASE)
        assert [peer.response() for _ in paths] == [(0x8001, number, SUCCESS) for number in range(5)]
        assert peer.receive()[0] == 6
    assert [case.num_instances for case in index.cases()] == [5]


def test_an_answer_is_cut_to_what_the_peer_takes(receiver: Config, instance: tuple[str, bytes]) -> None:
    with Peer(receiver.receive) as peer:
        peer.associate(associate_rq(max_length=32))
        peer.send(*messages(*instance))
        sizes = []
        while True:
            pdu_type, body = peer.receive()
            assert pdu_type == P_DATA_TF
            sizes.append(len(body))
            if body[5] & LAST:
                break
        assert max(sizes) <= 32
        assert len(sizes) > 3


def test_uids_of_any_length_do(receiver: Config, index: Index, tmp_path: Path) -> None:
    for number, uid in enumerate(("1.2", "1.23", generate_uid(), "1." + "2" * 62)):
        (path,) = make_ct_series(
            tmp_path / str(number), num_slices=1, edit=lambda _, ds, uid=uid: setattr(ds, "SOPInstanceUID", uid)
        )
        with Peer(receiver.receive) as peer:
            peer.associate()
            peer.send(*messages(uid, dataset_of(path)))
            assert peer.status() == SUCCESS
        assert stored(index, uid) == dataset_of(path)


# ---- what is pynetdicom's stays pynetdicom's ----


def test_c_echo_between_instances_is_answered(receiver: Config, index: Index, tmp_path: Path) -> None:
    with Peer(receiver.receive) as peer:
        peer.associate()
        for number, path in enumerate(make_ct_series(tmp_path / "sent", num_slices=3)):
            peer.send(pdu(P_DATA_TF, value(ECHO_CONTEXT, COMMAND | LAST, c_echo(100 + number))))
            assert peer.response() == (0x8030, 100 + number, SUCCESS)
            peer.send(*messages(str(dcmread(path).SOPInstanceUID), dataset_of(path)))
            assert peer.status() == SUCCESS
        peer.release()
    assert [case.num_instances for case in index.cases()] == [3]


def test_c_echo_is_answered_at_once(receiver: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reactor is woken for it, and does not sleep to the end of its tick, which is a long one here."""
    monkeypatch.setattr(lane, "_TICK_S", 2.0)
    took_s = []
    with Peer(receiver.receive) as peer:
        peer.associate()
        for number in range(10):
            started = time.monotonic()
            peer.send(pdu(P_DATA_TF, value(ECHO_CONTEXT, COMMAND | LAST, c_echo(number))))
            peer.response()
            took_s.append(time.monotonic() - started)
    assert sorted(took_s)[5] < 1


def test_c_cancel_does_no_harm(receiver: Config, instance: tuple[str, bytes]) -> None:
    with Peer(receiver.receive) as peer:
        peer.associate()
        peer.send(pdu(P_DATA_TF, value(CT_CONTEXT, COMMAND | LAST, command(0x0FFF, dataset=False))))
        peer.send(*messages(*instance))
        assert peer.status() == SUCCESS
        peer.release()


@pytest.mark.parametrize("ending", [ABORT, b"", pdu(A_ABORT + 92, b"nonsense"), RELEASE])
def test_a_message_that_breaks_off_leaves_nothing(
    receiver: Config, index: Index, instance: tuple[str, bytes], ending: bytes
) -> None:
    with Peer(receiver.receive) as peer:
        peer.associate()
        peer.send(*messages(*instance)[:-1])
        wait_until(lambda: len(files_with_content(index)) == 1)
        peer.send(ending)
        if not ending:
            peer.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: not files_with_content(index))
    assert index.cases() == []


@pytest.mark.parametrize(
    "broken",
    [
        pdu(P_DATA_TF, b"\0\0\0"),  # shorter than a value's head
        pdu(P_DATA_TF, b"\0\0\0\x01\x01\x03"),  # a value without its control header
        pdu(P_DATA_TF, b"\0\0\1\0\x01\x03abc"),  # a value longer than its PDU
        pdu(P_DATA_TF, value(1, LAST, b"a dataset without a command")),
        pdu(P_DATA_TF, value(99, COMMAND | LAST, c_store("1.2.3"))),  # in no context
        pdu(P_DATA_TF, value(1, COMMAND | LAST, b"no command")),
        pdu(P_DATA_TF, b"".join([value(1, COMMAND, bytes(1000))] * 50)),  # a command without end
        b"\x04\0\xff\xff\xff\xff" + value(1, COMMAND | LAST, c_store("1.2.3")),  # 4 GB
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_dicom_is_aborted_and_others_are_served_on(
    receiver: Config, instance: tuple[str, bytes], broken: bytes
) -> None:
    with Peer(receiver.receive) as other, Peer(receiver.receive) as peer:
        other.associate()
        peer.associate()
        peer.send(broken)
        assert peer.receive()[0] in (A_ABORT, 0)
        assert peer.receive()[0] == 0
        other.send(*messages(*instance))
        assert other.status() == SUCCESS


# ---- refused, and the association lives on ----


def refused(receiver: Config, index: Index, *wire: bytes) -> int:
    with Peer(receiver.receive) as peer:
        peer.associate()
        peer.send(*wire)
        status = peer.status()
        peer.send(pdu(P_DATA_TF, value(ECHO_CONTEXT, COMMAND | LAST, c_echo())))
        assert peer.response()[2] == SUCCESS
        peer.release()
    assert files_with_content(index) == []
    assert index.cases() == []
    return status


def test_an_instance_larger_than_allowed_is_refused_while_it_comes(
    receiver: Config, index: Index, instance: tuple[str, bytes]
) -> None:
    sizes: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            sizes.extend(size_of(path) for path in files_with_content(index))

    watching = threading.Thread(target=watch)
    watching.start()
    uid, dataset = instance
    assert refused(receiver, index, *messages(uid, dataset + bytes(8 * 2**20), piece=100_000)) == CANNOT_UNDERSTAND
    stop.set()
    watching.join()
    assert max(sizes, default=0) <= 2**20 + 1000


def test_another_sop_class_than_that_of_the_context_is_refused(
    receiver: Config, index: Index, instance: tuple[str, bytes]
) -> None:
    uid, dataset = instance
    request = pdu(P_DATA_TF, value(1, COMMAND | LAST, c_store(uid, sop_class=MRImageStorage)))
    assert refused(receiver, index, request, *messages(uid, dataset)[1:]) == NO_SUCH_CLASS


def test_a_request_without_dataset_is_refused(receiver: Config, index: Index) -> None:
    request = command(0x0001, dataset=False, sop_class=CTImageStorage, sop_instance="1.2.3")
    assert refused(receiver, index, pdu(P_DATA_TF, value(1, COMMAND | LAST, request))) == CANNOT_UNDERSTAND


@pytest.mark.parametrize("missing", [1, 1000, 33_000])
def test_a_dataset_that_ends_too_early_is_refused(
    receiver: Config, index: Index, instance: tuple[str, bytes], missing: int
) -> None:
    uid, dataset = instance
    assert refused(receiver, index, *messages(uid, dataset[:-missing])) == CANNOT_UNDERSTAND


def test_encapsulated_pixel_data_without_their_end_are_refused(receiver: Config, index: Index, tmp_path: Path) -> None:
    (path,) = make_ct_series(tmp_path / "sent", num_slices=1, transfer_syntax_uid=RLELossless)
    uid, dataset = str(dcmread(path).SOPInstanceUID), dataset_of(path)
    with Peer(receiver.receive) as peer:
        peer.associate(associate_rq([RLELossless]))
        peer.send(*messages(uid, dataset[:-8]))
        assert peer.status() == CANNOT_UNDERSTAND
        peer.send(*messages(uid, dataset))
        assert peer.status() == SUCCESS


def test_the_disk_watermark_is_left_behind_by_itself(
    make_config: MakeConfig, index: Index, instance: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 100 * 2**20
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    with (
        listening(make_config(receive={"min_free_disk_mb": 200}), index, grace_s=0.5) as config,
        Peer(config.receive) as peer,
    ):
        peer.associate()
        peer.send(*messages(*instance))
        assert peer.status() == OUT_OF_RESOURCES
        assert files_with_content(index) == []
        free = 300 * 2**20
        peer.send(*messages(*instance))
        assert peer.status() == SUCCESS


def test_a_peer_that_stops_in_the_middle_of_a_pdu_is_cut_off(
    make_config: MakeConfig, index: Index, instance: tuple[str, bytes]
) -> None:
    threads = threading.active_count()
    with (
        listening(make_config(receive={"network_timeout_s": 1}), index, grace_s=0.5) as config,
        Peer(config.receive) as peer,
    ):
        peer.associate()
        peer.send(b"".join(messages(*instance))[:20_000])
        while peer.receive()[0]:
            pass
        wait_until(lambda: not files_with_content(index))
    wait_until(lambda: threading.active_count() <= threads)


def test_health_checks_leave_nothing_behind(receiver: Config, index: Index, instance: tuple[str, bytes]) -> None:
    wait_until(lambda: threading.active_count() < 12)
    threads, descriptors = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for number in range(200):
        with Peer(receiver.receive) as peer:
            if number % 3 == 1:
                peer.send(random.Random(number).randbytes(40))
    wait_until(lambda: threading.active_count() <= threads + 1)
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2)
    with Peer(receiver.receive) as peer:
        peer.associate()
        peer.send(*messages(*instance))
        assert peer.status() == SUCCESS
