"""Who may talk to the receiver, and for how long: real associations, raw sockets, and dcmtk under TLS."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_AC

from node.config import Config, Peer, ReceiveConfig
from node.implementation import IMPLEMENTATION_CLASS_UID, make_ae
from node.index import Index
from node.peers import ClientTls
from node.receive import Receivers, guard, server
from node.receive.access import Caller, judge, parse_address
from node.receive.places import NoPlaceError, Places
from node.tls import client_context
from tests.certificates import Authority, Files
from tests.factories import make_ct_series
from tests.receiver import listening

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

MakeConfig = Callable[..., Config]


@pytest.fixture
def start(make_config: MakeConfig, index: Index) -> Iterator[Callable[..., Config]]:
    """Starts a receiver with these settings of `receive`; gives its configuration."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(listening(make_config(receive=settings), index, grace_s=0.2))


def associate(
    config: Config, *, calling: str = "CT1", called: str = "CSPINE", source: str = "127.0.0.1"
) -> Association:
    ae = make_ae(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    return ae.associate(config.receive.host, config.receive.port, ae_title=called, bind_address=(source, 0))


def rejected(association: Association) -> tuple[int, int, int] | None:
    """Result, source and reason."""
    if not association.is_rejected:
        return None
    answer = association.acceptor.primitive
    return answer.result, answer.result_source, answer.diagnostic


def connect(config: Config, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((config.receive.host, config.receive.port), 10, source_address=(source, 0))


def wait_until(is_so: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_closed(connection: socket.socket, timeout_s: float = 5) -> bool:
    """Whether the other end closes it within that time, whatever it says before."""
    connection.settimeout(timeout_s)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def served(config: Config, folder: Path) -> bool:
    """Whether a sender from another address gets its Instance stored."""
    (path,) = make_ct_series(folder, num_slices=1)
    association = associate(config)
    assert association.is_established
    status = association.send_c_store(path).Status
    association.release()
    return bool(status == 0)


# ---- the list ----

ALLOW = (
    Peer(ae_title="CT1", address="10.0.0.0/24"),
    Peer(ae_title="CT2", address="10.0.0.7"),
    Peer(ae_title="CT3", called_ae_title="CSPINE"),
    Peer(address="fd00:1::/64"),
)


@pytest.mark.parametrize(
    ("calling", "called", "address", "reason"),
    [
        ("CT1", "ANY", "10.0.0.200", None),
        ("CT1", "ANY", "10.0.1.1", 3),
        ("CT2", "ANY", "10.0.0.7", None),
        ("CT2", "ANY", "10.0.0.8", 3),
        ("CT3", "CSPINE", "192.168.1.1", None),
        ("CT3", "OTHER", "192.168.1.1", 7),
        ("CT9", "CSPINE", "10.0.0.1", 3),
        ("ct1", "CSPINE", "10.0.0.1", 3),
        ("CT9", "ANY", "fd00:1::5", None),
        ("CT9", "ANY", "fd00:2::5", 3),
        ("CT1", "ANY", "::ffff:10.0.0.1", None),
        ("CT1", "ANY", "127.0.0.1", 3),
    ],
)
def test_a_peer_is_let_in_when_all_that_one_entry_names_fits(
    calling: str, called: str, address: str, reason: int | None
) -> None:
    caller = Caller(calling_ae_title=calling, called_ae_title=called, address=parse_address(address))
    rejection = judge(ReceiveConfig(allow=ALLOW), caller)
    assert (rejection and rejection.code[2]) == reason


def test_off_the_shelf_only_this_machine_is_let_in() -> None:
    for address, is_in in (("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)):
        caller = Caller(calling_ae_title="CT1", called_ae_title="CSPINE", address=parse_address(address))
        assert (judge(ReceiveConfig(), caller) is None) == is_in
        assert judge(ReceiveConfig(allow="any"), caller) is None


def test_a_peer_that_is_not_listed_is_rejected_with_the_reason_and_the_log_says_what_to_add(
    start: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = start(
        allow=[
            {"ae_title": "CT1", "address": "127.0.0.0/30"},
            {"ae_title": "CT2", "called_ae_title": "CSPINE", "address": "127.0.0.1"},
        ]
    )
    assert rejected(associate(config, calling="CT9")) == (1, 1, 3)
    assert "to let it in, add there: - {ae_title: 'CT9', address: 127.0.0.1}" in caplog.text
    assert rejected(associate(config, calling="CT1", source="127.0.0.9")) == (1, 1, 3)
    assert "no entry of receive.allow holds the address 127.0.0.9" in caplog.text
    assert rejected(associate(config, calling="CT2", called="NODE")) == (1, 1, 7)
    assert "it calls us 'NODE', and receive.allow expects 'CSPINE'" in caplog.text
    association = associate(config, calling="CT2")
    assert association.is_established
    association.release()


def test_an_ae_title_cannot_forge_a_line_of_the_log() -> None:
    caller = Caller(calling_ae_title="CT1\nERROR", called_ae_title="X", address=parse_address("10.0.0.1"))
    rejection = judge(ReceiveConfig(), caller)
    assert rejection is not None
    assert "\n" not in rejection.message


def test_an_association_that_cannot_be_judged_is_not_let_in(
    start: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pynetdicom goes on when a handler of its events breaks."""
    monkeypatch.setattr(guard, "judge", lambda *_: 1 / 0)
    assert rejected(associate(start())) == (2, 3, 2)


def test_whoever_is_turned_away_again_and_again_is_logged_once(
    start: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = start(allow=[{"ae_title": "CT1"}], max_associations=3, max_associations_per_address=3)
    for _ in range(10):
        assert rejected(associate(config, calling="CT9")) == (1, 1, 3)
    assert caplog.text.count("action=association-rejected") == 1


# ---- limits ----


def test_a_hundred_silent_connections_from_one_peer_keep_no_other_out(
    start: Callable[..., Config], tmp_path: Path
) -> None:
    config = start(max_associations=8, max_associations_per_address=4, associate_timeout_s=1.5)
    assert served(config, tmp_path)  # what syncs files begins with the first one, and stays
    before = threading.active_count()
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(config, "127.0.0.2"))) for _ in range(100)]
        begun = time.monotonic()
        assert served(config, tmp_path)
        assert time.monotonic() - begun < 1
        assert threading.active_count() - before < 2 * 60
        assert all(is_closed(connection) for connection in silent)
    wait_until(lambda: threading.active_count() <= before)
    assert served(config, tmp_path)


def test_above_the_limits_an_association_is_rejected_as_transient(start: Callable[..., Config]) -> None:
    config = start(max_associations=3, max_associations_per_address=2)
    here = [associate(config) for _ in range(3)]
    there = [associate(config, source="127.0.0.2") for _ in range(2)]
    assert [rejected(a) for a in here] == [None, None, (2, 3, 2)]
    assert [rejected(a) for a in there] == [None, (2, 3, 2)]
    here[0].release()
    wait_until(lambda: (again := associate(config)).is_established and again.release() is None)
    for association in (*here, *there):
        association.abort()


def test_a_request_that_comes_byte_by_byte_is_cut_off(start: Callable[..., Config], tmp_path: Path) -> None:
    config = start(associate_timeout_s=0.5)
    request = associate_rq()
    with closing(connect(config, "127.0.0.2")) as slow:
        begun = time.monotonic()
        with suppress(ConnectionError):
            for number in range(len(request)):
                slow.send(request[number : number + 1])
                time.sleep(0.02)
        assert time.monotonic() - begun < 3
    assert served(config, tmp_path)


@pytest.mark.parametrize("piece", [b"\4", b"\4\0\0\0\0\x64half"])
def test_a_pdu_that_does_not_end_ends_the_association(start: Callable[..., Config], piece: bytes) -> None:
    config = start(network_timeout_s=0.4)
    before = threading.active_count()
    with closing(connect(config)) as peer:
        peer.sendall(associate_rq())
        assert peer.recv(1) == b"\2"
        peer.sendall(piece)
        assert is_closed(peer)
    wait_until(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("kind", [b"\1", b"\4"])
def test_a_pdu_longer_than_allowed_is_not_read(start: Callable[..., Config], kind: bytes) -> None:
    config = start(associate_timeout_s=30, network_timeout_s=30)
    with closing(connect(config)) as peer:
        if kind == b"\4":
            peer.sendall(associate_rq())
            assert peer.recv(1) == b"\2"
        peer.sendall(kind + b"\0\xff\xff\xff\xf0" + b"x" * 1000)
        assert is_closed(peer)


def test_hundreds_of_health_checks_leave_nothing_behind(start: Callable[..., Config], tmp_path: Path) -> None:
    config = start()
    assert served(config, tmp_path)  # what syncs files begins with the first one, and stays
    before = threading.active_count()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(300):
        connect(config, "127.0.0.2").close()
    assert served(config, tmp_path)
    wait_until(lambda: threading.active_count() <= before)
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 5


def test_places_are_counted_over_processes_and_come_free_when_one_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "places"
    code = (
        "import pathlib, time, ipaddress; from node.receive.places import Places\n"
        f"places = Places(pathlib.Path({str(path)!r}), 8, 4)\n"
        "for _ in range(3): places.take(ipaddress.ip_address('10.0.0.1'))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    places = Places(path, 8, 4)
    first, other = ip_address("10.0.0.1"), ip_address("10.0.0.2")
    taken = places.take(first)
    with pytest.raises(NoPlaceError, match=r"10.0.0.1 has all 4 associations"):
        places.take(first)
    assert len({places.take(other) for _ in range(4)}) == 4
    with pytest.raises(NoPlaceError, match="all 8 associations"):
        places.take(ip_address("10.0.0.3"))
    places.free(taken)
    process.kill()
    process.wait()
    process.stdout.close()
    assert len({places.take(first) for _ in range(4)}) == 4
    places.close()


def test_addresses_of_one_ipv6_network_are_one_peer(tmp_path: Path) -> None:
    places = Places(tmp_path / "places", 8, 2)
    places.take(ip_address("fd00::1"))
    places.take(ip_address("fd00::2"))
    with pytest.raises(NoPlaceError):
        places.take(ip_address("fd00::3"))
    places.take(ip_address("fd00:0:0:1::3"))
    places.close()


def test_the_limits_hold_over_all_receiver_processes(make_config: MakeConfig, index: Index) -> None:
    config = make_config(receive={"processes": 2, "max_associations": 5, "max_associations_per_address": 3})
    receivers = Receivers(config, index)
    receivers.start()
    try:
        here = [associate(config) for _ in range(6)]
        there = [associate(config, source="127.0.0.2") for _ in range(6)]
        assert sum(a.is_established for a in here) == 3
        assert sum(a.is_established for a in there) == 2
        assert {rejected(a) for a in (*here, *there)} == {None, (2, 3, 2)}
        for association in (*here, *there):
            association.abort()
        wait_until(lambda: (again := associate(config)).is_established and again.release() is None)
    finally:
        receivers.terminate()
        receivers.join(5)


def test_a_connection_that_could_not_be_served_gives_its_place_back(
    start: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start(max_associations=1, associate_timeout_s=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(server, "take_lane", lambda *_: 1 / 0)  # as when no thread can be started
        with closing(connect(config)) as peer:
            peer.sendall(associate_rq())
            assert is_closed(peer)
    wait_until(lambda: (again := associate(config)).is_established and again.release() is None)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_association_whose_thread_is_slow_to_start_is_not_taken_for_one_that_has_ended(
    start: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is just starting has a number and is not yet alive; on a busy machine that can take a while."""
    config = start()
    set_id = threading.Thread._set_native_id

    def set_id_slowly(thread: threading.Thread) -> None:
        time.sleep(0.3)  # the guard looks ten times a second
        set_id(thread)

    monkeypatch.setattr(Association, "_set_native_id", set_id_slowly, raising=False)
    association = associate(config)
    assert rejected(association) is None
    association.release()


@pytest.mark.skipif(not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists(), reason="there is no IPv6")
def test_peers_are_told_apart_by_ipv6_addresses_too(start: Callable[..., Config]) -> None:
    config = start(host="::1", allow=[{"ae_title": "CT1", "address": "::1"}])
    for calling, answer in (("CT1", None), ("CT9", (1, 1, 3))):
        association = associate(config, calling=calling, source="::1")
        assert rejected(association) == answer
        association.abort()


# ---- TLS ----

needs_dcmtk = pytest.mark.skipif(
    not Path("/usr/bin/storescu").exists(), reason="dcmtk is not installed (apt-get install dcmtk)"
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def node_files(authority: Authority) -> Files:
    return authority.sign("node")


def tls_settings(files: Files, **given: Any) -> dict[str, Any]:
    return {"certificate": files.certificate, "key": files.key, **given}


def dcmtk(config: Config, *options: object, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    tool = "storescu" if paths else "echoscu"
    command = [f"/usr/bin/{tool}", "-aet", "CT1", "-aec", "CSPINE", *map(str, options), "127.0.0.1"]
    return subprocess.run(
        [*command, str(config.receive.port), *map(str, paths)],
        env=os.environ | {"TCP_NODELAY": "1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@needs_dcmtk
def test_dcmtk_stores_under_tls_with_a_client_certificate_and_is_refused_without(
    start: Callable[..., Config], authority: Authority, node_files: Files, index: Index, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = start(tls=tls_settings(node_files, client_ca=authority.certificate))
    paths = tuple(make_ct_series(tmp_path / "sent", num_slices=5))
    theirs = authority.sign("ct")
    done = dcmtk(config, "+tls", theirs.key, theirs.certificate, "+cf", authority.certificate, paths=paths)
    assert done.returncode == 0, done.stderr
    assert [case.num_instances for case in index.cases()] == [5]

    def refused(*options: object) -> str:
        caplog.clear()
        assert dcmtk(config, *options).returncode != 0
        wait_until(lambda: "action=connection-refused" in caplog.text)
        return caplog.text.partition("address=127.0.0.1: ")[2].splitlines()[0]

    stranger = Authority(tmp_path, name="another").sign("stranger")
    late = authority.sign("late", days=(-20, -1))
    assert refused("+tla", "-ic").startswith("it shows no certificate of its own")
    assert refused("+tls", stranger.key, stranger.certificate, "-ic").startswith("its certificate cannot be trusted")
    assert refused("+tls", late.key, late.certificate, "-ic").endswith("certificate has expired")
    assert refused().startswith("it speaks plain DICOM")


@needs_dcmtk
@pytest.mark.parametrize("verify", ["none", "optional"])
def test_without_a_client_certificate_a_peer_is_let_in_if_none_is_required(
    start: Callable[..., Config], authority: Authority, node_files: Files, verify: str
) -> None:
    client_ca = {} if verify == "none" else {"client_ca": authority.certificate}
    config = start(tls=tls_settings(node_files, verify=verify, **client_ca))
    assert dcmtk(config, "+tla", "+cf", authority.certificate).returncode == 0


@needs_dcmtk
def test_a_handshake_that_does_not_end_holds_up_nobody_and_is_cut_off(
    start: Callable[..., Config], authority: Authority, node_files: Files
) -> None:
    config = start(tls=tls_settings(node_files, verify="none"), associate_timeout_s=1)
    with closing(connect(config, "127.0.0.2")) as silent:
        begun = time.monotonic()
        assert dcmtk(config, "+tla", "+cf", authority.certificate).returncode == 0
        assert time.monotonic() - begun < 1
        assert is_closed(silent)


@needs_dcmtk
def test_a_renewed_certificate_is_used_for_the_next_association_and_running_ones_go_on(
    start: Callable[..., Config], tmp_path: Path
) -> None:
    authority, renewed = Authority(tmp_path / "a", name="first"), Authority(tmp_path / "b", name="second")
    files = authority.sign("node")
    config = start(tls=tls_settings(files, verify="none"))
    ae = make_ae("CT1")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    context = client_context(ClientTls(ca=authority.certificate))
    running = ae.associate("127.0.0.1", config.receive.port, tls_args=(context, "127.0.0.1"))
    assert running.is_established
    new = renewed.sign("node")
    for old_path, new_path in ((files.key, new.key), (files.certificate, new.certificate)):
        new_path.replace(old_path)
    assert dcmtk(config, "+tla", "+cf", renewed.certificate).returncode == 0
    assert dcmtk(config, "+tla", "+cf", authority.certificate).returncode != 0
    (path,) = make_ct_series(tmp_path / "sent", num_slices=1)
    assert running.send_c_store(path).Status == 0
    running.release()


# ---- negotiation ----


def item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def associate_rq(
    *user_items: bytes, application_context: bytes = b"1.2.840.10008.3.1.1.1", version: int = 1,
    sop_class: str = CTImageStorage,
) -> bytes:  # fmt: skip
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2) for one SOP Class, with these items of user information beside the usual."""
    context = b"\1\0\0\0" + item(0x30, sop_class.encode()) + item(0x40, ExplicitVRLittleEndian.encode())
    user = item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3") + b"".join(user_items)
    content = struct.pack(">HH16s16s32x", version, 0, b"CSPINE".ljust(16), b"CT1".ljust(16))
    content += item(0x10, application_context) + item(0x20, context) + item(0x50, user)
    return struct.pack(">BBL", 1, 0, len(content)) + content


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
    unknown = item(0x5F, b"whatever")
    config = start()
    for asked in (extended, common, identity, extended + common + identity):
        assert len(accepted(config, asked)) == 3
    encoded = answer_to(config, associate_rq(unknown))
    assert encoded[0] in (2, 7)  # PS3.8 9.3.1: to be ignored; pynetdicom aborts


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
