"""What the receiver answers to the items of an A-ASSOCIATE-RQ."""

import multiprocessing
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pynetdicom.pdu import A_ASSOCIATE_AC

from node.config import Config
from node.implementation import IMPLEMENTATION_CLASS_UID
from node.process import be_child
from node.receive.request import readable_request
from tests.node.calling import associate_rq, connect, is_closed, item

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")


def answer_to(config: Config, request: bytes) -> bytes:
    """The PDU that answers."""
    with closing(connect(config)) as peer:
        peer.sendall(request)
        head = peer.recv(6, socket.MSG_WAITALL)
        return head + peer.recv(struct.unpack(">BBL", head)[2], socket.MSG_WAITALL)


def accepted(config: Config, *user_items: bytes, **given: Any) -> dict[str, Any]:
    """The items of user information in the A-ASSOCIATE-AC, by the name of their class; checks that it is one."""
    encoded = answer_to(config, associate_rq(*user_items, **given))
    assert encoded[0] == 2, encoded
    pdu = A_ASSOCIATE_AC()
    pdu.decode(encoded)
    return {type(i).__name__: i for i in pdu.user_information.user_data}


def test_the_node_names_itself_and_its_longest_pdu(start: Callable[..., Config]) -> None:
    items = accepted(start(max_pdu_kb=64))
    assert items["ImplementationClassUIDSubItem"].implementation_class_uid == IMPLEMENTATION_CLASS_UID
    assert items["ImplementationVersionNameSubItem"].implementation_version_name.startswith("CSPINE_")
    assert items["MaximumLengthSubItem"].maximum_length_received == 64 * 1024
    assert len(items) == 3  # nothing that was not asked for


def test_asynchronous_operations_are_refused_by_a_window_of_one(start: Callable[..., Config]) -> None:
    items = accepted(start(), item(0x53, struct.pack(">HH", 0, 0)))
    window = items["AsynchronousOperationsWindowSubItem"]
    assert (window.maximum_number_operations_invoked, window.maximum_number_operations_performed) == (1, 1)


def role(sop_class: str, scu: int, scp: int) -> bytes:
    return item(0x54, struct.pack(">H", len(sop_class)) + sop_class.encode() + bytes([scu, scp]))


def test_a_request_as_long_as_it_may_be_is_gone_through_once() -> None:
    """Anybody can send one, and while it is gone through nothing else is received: it took 5 s."""
    request = associate_rq(more=250_000 * item(0x10, b""))
    begun_s = time.thread_time()
    assert readable_request(request) == request
    assert time.thread_time() - begun_s < 2


@pytest.mark.parametrize("proposed", [(1, 0), (1, 1)])
def test_of_the_roles_of_storage_the_peer_is_granted_that_of_the_scu(
    start: Callable[..., Config], proposed: tuple[int, int]
) -> None:
    granted = accepted(start(), role(CTImageStorage, *proposed))["SCP_SCU_RoleSelectionSubItem"]
    assert (granted.scu_role, granted.scp_role) == (1, 0)


def test_a_peer_that_wants_to_be_only_the_scp_of_storage_gets_no_context(start: Callable[..., Config]) -> None:
    encoded = answer_to(start(), associate_rq(role(CTImageStorage, 0, 1)))
    pdu = A_ASSOCIATE_AC()
    pdu.decode(encoded)
    assert [context.result for context in pdu.presentation_context] == [1]  # user rejection


def test_extended_negotiation_that_is_not_supported_is_ignored(start: Callable[..., Config]) -> None:
    uid = CTImageStorage.encode()
    extended = item(0x56, struct.pack(">H", len(uid)) + uid + b"\2\0\0\0\0\0")
    service = b"1.2.840.10008.4.2"
    common = b"\x57\0" + struct.pack(
        ">HH", 2 + len(uid) + 2 + len(service) + 2, len(uid)
    ) + uid + struct.pack(">H", len(service)) + service + b"\0\0"  # fmt: skip
    identity = item(0x58, b"\1\1" + struct.pack(">H", 4) + b"user" + b"\0\0")
    config = start()
    for asked in (extended, common, identity, extended + common + identity):
        assert len(accepted(config, asked)) == 3


def test_items_that_the_standard_does_not_know_are_ignored(
    start: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """PS3.8 9.3.1; pynetdicom would abort."""
    config, unknown = start(), item(0x5F, b"whatever")
    known = item(0x40, ExplicitVRLittleEndian.encode())
    for given in ({}, {"more": item(0x60, b"whatever")}, {"of_context": item(0x41, b"whatever") + known}):
        assert len(accepted(config, unknown, **given)) == 3
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"of_context": b""}, "a presentation context without transfer syntax"),
        ({"of_context": item(0x40, b"")}, "a presentation context without transfer syntax"),
        ({"more": b"\x50"}, "an item is cut off"),
    ],
)
def test_a_request_that_cannot_be_understood_is_aborted_at_once_and_its_address_named(
    start: Callable[..., Config], caplog: pytest.LogCaptureFixture, given: dict[str, Any], why: str
) -> None:
    config = start(associate_timeout_s=1000)
    with closing(connect(config)) as peer:
        peer.sendall(associate_rq(**given))
        assert peer.recv(10, socket.MSG_WAITALL)[0] == 7  # A-ABORT
        assert is_closed(peer)
    assert caplog.messages == [f"action=invalid-pdu calling='' address=127.0.0.1: aborted ({why})"]
    assert accepted(config)


def test_what_has_no_place_in_an_association_is_logged_with_its_address(
    start: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = start()
    with closing(connect(config)) as peer:
        peer.sendall(associate_rq())
        assert peer.recv(1) == b"\2"
        peer.sendall(b"\1\0\0\0\0\1\0")  # another request, which is none
        assert is_closed(peer)
    assert "calling='CT1' address=127.0.0.1: aborted (" in caplog.text


def break_a_thread() -> None:
    be_child("INFO")
    thread = threading.Thread(target=lambda: int("Neck^Test"), name="breaking")
    thread.start()
    thread.join()


def test_a_thread_that_breaks_in_a_child_process_names_itself_and_no_patient(
    capfd: pytest.CaptureFixture[str],
) -> None:
    child = multiprocessing.get_context("spawn").Process(target=break_a_thread)
    child.start()
    child.join()
    said = capfd.readouterr().err
    assert "action=thread-broken thread=breaking: unexpected ValueError at" in said
    assert "Neck" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"application_context": b"1.2.840.10008.3.1.1.2"}, (1, 1, 2)),
        ({"version": 2}, (1, 2, 2)),
    ],
)
def test_another_application_context_or_protocol_is_rejected(
    start: Callable[..., Config], given: dict[str, Any], answer: tuple[int, int, int]
) -> None:
    encoded = answer_to(start(), associate_rq(**given))
    assert (encoded[0], tuple(encoded[7:10])) == (3, answer)


def test_a_sop_class_that_is_not_ours_is_refused_in_its_context_only(start: Callable[..., Config]) -> None:
    encoded = answer_to(start(), associate_rq(sop_class=MRImageStorage))
    pdu = A_ASSOCIATE_AC()
    pdu.decode(encoded)
    assert [context.result for context in pdu.presentation_context] == [3]  # abstract syntax not supported
