"""Who may talk to the receiver, and for how long: real associations and raw sockets."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from ipaddress import ip_address
from pathlib import Path

import pytest
from pynetdicom.association import Association

from node.config import Config, Peer, ReceiveConfig
from node.index import Index
from node.receive import Receivers, guard, server
from node.receive.access import Caller, judge, parse_address
from node.receive.places import NoPlaceError, Places
from tests.node.calling import (
    MakeConfig,
    associate,
    associate_rq,
    connect,
    is_closed,
    is_quiet,
    let_pass,
    rejected,
    served,
)
from tests.waiting import WAIT_S, wait_until

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")


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


def num_threads() -> int:
    """Those that a connection may have left; what syncs files is started as needed, and stays."""
    return sum(not thread.name.startswith("sync") for thread in threading.enumerate())


def test_a_hundred_silent_connections_from_one_peer_keep_no_other_out(
    start: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = start(max_associations=8, max_associations_per_address=4, associate_timeout_s=1000)
    before = num_threads()
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(config, "127.0.0.2"))) for _ in range(100)]
        assert served(config, tmp_path)
        assert is_quiet(silent[0])  # it was not waited for
        assert num_threads() - before < 2 * 60
        let_pass(1000, monkeypatch)
        assert all(is_closed(connection) for connection in silent)
    wait_until(lambda: num_threads() <= before)
    assert served(config, tmp_path)


def test_strangers_that_only_connect_take_no_place_of_those_who_are_let_in(
    start: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = start(
        allow=[{"ae_title": "CT1", "address": "127.0.0.1"}],
        max_associations=1,
        max_associations_per_address=1,
        associate_timeout_s=1000,
    )
    silent = [connect(config, "127.0.0.9") for _ in range(3)]
    assert served(config, tmp_path / "sent")
    assert all(map(is_quiet, silent))
    assert rejected(associate(config, source="127.0.0.9")) == (1, 1, 3)  # and is told so
    assert "no entry of receive.allow holds the address 127.0.0.9" in caplog.text
    for connection in silent:
        connection.close()


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


def test_a_request_that_comes_byte_by_byte_is_cut_off(
    start: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = start(associate_timeout_s=1000)
    request = associate_rq()

    def trickle(connection: socket.socket) -> None:
        for number in range(len(request)):  # more than 200: the whole takes several times as long as it may
            connection.send(request[number : number + 1])
            let_pass(20 * number, monkeypatch)
            time.sleep(0.05)

    with closing(connect(config, "127.0.0.2")) as slow, pytest.raises(ConnectionError):
        trickle(slow)
    assert served(config, tmp_path)


@pytest.mark.parametrize("piece", [b"\4", b"\4\0\0\0\0\x64half"])
def test_a_pdu_that_does_not_end_ends_the_association(start: Callable[..., Config], piece: bytes) -> None:
    config = start(network_timeout_s=0.4)
    before = num_threads()
    with closing(connect(config)) as peer:
        peer.sendall(associate_rq())
        assert peer.recv(1) == b"\2"
        peer.sendall(piece)
        assert is_closed(peer)
    wait_until(lambda: num_threads() <= before)


@pytest.mark.parametrize("kind", [b"\1", b"\4"])
def test_a_pdu_longer_than_allowed_is_not_read(start: Callable[..., Config], kind: bytes) -> None:
    config = start(associate_timeout_s=300, network_timeout_s=300)
    with closing(connect(config)) as peer:
        if kind == b"\4":
            peer.sendall(associate_rq())
            assert peer.recv(1) == b"\2"
        peer.sendall(kind + b"\0\xff\xff\xff\xf0" + b"x" * 1000)
        assert is_closed(peer)


def test_hundreds_of_health_checks_leave_nothing_behind(start: Callable[..., Config], tmp_path: Path) -> None:
    config = start()
    assert served(config, tmp_path)  # files that stay open are opened
    before = num_threads()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(300):
        connect(config, "127.0.0.2").close()
    assert served(config, tmp_path)
    wait_until(lambda: num_threads() <= before)
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= files + 5)


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
    limits = {"max_associations": 5, "max_associations_per_address": 3}
    config = make_config(receive={"processes": 2, "network_timeout_s": WAIT_S} | limits)
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
        receivers.join(WAIT_S)


def test_a_connection_that_could_not_be_served_gives_its_place_back(
    start: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start(max_associations=1, associate_timeout_s=2)
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
