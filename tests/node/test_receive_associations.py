"""The receiver's associations, however they end, and the processes that serve them."""

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from node.config import Config, ReceiveTls
from node.index import Index
from node.receive import ReceiverError, Receivers, server, supervisor
from tests.certificates import Authority
from tests.factories import make_ct_series
from tests.node.sending import (
    CANNOT_UNDERSTAND,
    SUCCESS,
    MakeConfig,
    associate,
    c_store,
    carried,
    carried_by,
    encoded_dataset,
    make_instance,
)
from tests.receiver import listening
from tests.waiting import WAIT_S, wait_until
from tests.wire import Peer, associate_rq, messages


def test_an_association_that_could_not_leave_all_is_no_end_of_a_series(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    (whole, damaged) = make_ct_series(tmp_path, num_slices=2)
    association = associate(receiver)
    uid = str(pydicom.dcmread(whole).SOPInstanceUID)
    assert c_store(association, encoded_dataset(whole), uid).Status == SUCCESS
    assert c_store(association, encoded_dataset(damaged)[:90], "1.2.3.99").Status == CANNOT_UNDERSTAND
    association.release()
    wait_until(lambda: carried(index) == (0, 0, 1))


def test_an_association_is_open_until_it_is_released(receiver: Config, index: Index, tmp_path: Path) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    assert carried(index) == (1, 0, 0)
    association.release()
    assert carried(index) == (0, 1, 0)  # noted before the release was answered
    assert len(index.cases_to_check()) == 1


def test_a_release_stays_a_release_when_the_connection_closes_at_once(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pynetdicom tells of both from different threads; the slower one here is the one that tells of the release."""
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    acceptor = next(t for t in threading.enumerate() if "AcceptorThread" in t.name)
    send_release = acceptor.acse.send_release  # type: ignore[attr-defined]

    def send_release_slowly(*args: Any, **values: Any) -> None:
        send_release(*args, **values)
        time.sleep(0.3)

    monkeypatch.setattr(acceptor.acse, "send_release", send_release_slowly)  # type: ignore[attr-defined]
    association.release()
    time.sleep(0.5)
    assert carried(index) == (0, 1, 0)


def test_an_aborted_association_is_noted(receiver: Config, index: Index, tmp_path: Path) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    association.abort()
    wait_until(lambda: carried(index) == (0, 0, 1))


def test_a_dropped_connection_is_noted(receiver: Config, index: Index, tmp_path: Path) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    connection = association.dul.socket.socket
    connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: carried(index) == (0, 0, 1))
    connection.close()


def test_a_silent_association_is_ended(make_config: MakeConfig, index: Index, tmp_path: Path) -> None:
    path = make_instance(tmp_path / "sent")
    with listening(make_config(receive={"network_timeout_s": 3}), index) as config:
        association = associate(config)
        association.send_c_store(path)
        wait_until(lambda: carried(index) == (0, 0, 1))
        association.abort()


def test_associations_above_the_limit_are_rejected_as_transient(make_config: MakeConfig, index: Index) -> None:
    with listening(make_config(receive={"max_associations": 1}), index) as config:
        first, second = associate(config), associate(config)
        assert (first.is_established, second.is_rejected) == (True, True)
        assert (second.acceptor.primitive.result, second.acceptor.primitive.diagnostic) == (2, 2)
        first.release()


def test_senders_at_the_same_time_are_all_served(receiver: Config, index: Index, tmp_path: Path) -> None:
    sent = [make_ct_series(tmp_path / str(number), num_slices=6) for number in range(4)]
    statuses: list[int] = []

    def send(paths: list[Path]) -> None:
        association = associate(receiver)
        statuses.extend(association.send_c_store(path).Status for path in paths)
        association.release()

    threads = [threading.Thread(target=send, args=(paths,)) for paths in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [SUCCESS] * 24
    assert [case.num_instances for case in index.cases()] == [6, 6, 6, 6]


# ---- the processes ----


@pytest.fixture
def receivers(make_config: MakeConfig, index: Index) -> Iterator[tuple[Config, Receivers]]:
    """The receiver processes as the node runs them."""
    config = make_config(receive={"processes": 2})
    running = Receivers(config, index)
    running.start()
    yield config, running
    running.terminate()
    running.join(5)


def test_the_processes_stop_cleanly_while_an_association_is_open(
    receivers: tuple[Config, Receivers], index: Index, tmp_path: Path
) -> None:
    config, running = receivers
    association = associate(config)
    assert association.send_c_store(make_instance(tmp_path / "sent")).Status == SUCCESS
    processes = list(running._processes.values())
    running.terminate()
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0, 0]
    wait_until(lambda: association.is_aborted)
    assert carried(index) == (0, 0, 1)
    assert [path for path in (index.data_dir / "instances").rglob("*.dcm") if not path.stat().st_size] == []


def _terminated_at_once(*arguments: Any) -> None:
    """A receiver process that gets its SIGTERM as soon as it does not die of it."""

    be_child = server.be_child

    def be_stopped_child(*given: Any, **named: Any) -> None:
        be_child(*given, **named)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "be_child", be_stopped_child)
        server.run(*arguments)


def test_a_process_that_has_only_begun_hears_that_it_is_to_stop(
    make_config: MakeConfig, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "run", _terminated_at_once)
    running = Receivers(make_config(receive={"processes": 1}), index)
    running.start()
    (begun,) = running._processes.values()
    begun.join(WAIT_S)
    exitcode = begun.exitcode
    running.terminate()
    running.join(0)
    assert exitcode == 0


def test_a_watch_that_runs_on_while_the_processes_end_replaces_none(receivers: tuple[Config, Receivers]) -> None:
    """The scheduler of the service does not wait for its jobs when the node stops."""
    _, running = receivers
    processes = dict(running._processes)
    running.terminate()
    for process in processes.values():
        process.join(WAIT_S)
    running.watch()
    assert running._processes == processes


def test_a_killed_receiver_is_replaced_and_no_connection_is_refused_meanwhile(
    receivers: tuple[Config, Receivers], index: Index, tmp_path: Path
) -> None:
    config, running = receivers
    first, second = (make_instance(tmp_path / name) for name in ("first", "second"))
    killed = list(running._processes.values())
    with Peer(config.receive, timeout_s=WAIT_S) as peer:
        peer.associate()
        peer.send(*messages(str(pydicom.dcmread(first).SOPInstanceUID), encoded_dataset(first)))
        assert peer.status() == SUCCESS
        for process in killed:
            process.kill()
            process.join()
        assert peer.receive()[0] == 0
    with Peer(config.receive, timeout_s=WAIT_S) as peer:  # in the queue of the port, which outlives the processes
        peer.send(associate_rq())
        running.watch()
        assert peer.receive()[0] == 2
        peer.send(*messages(str(pydicom.dcmread(second).SOPInstanceUID), encoded_dataset(second)))
        assert peer.status() == SUCCESS
        peer.release()
    assert len(index.cases()) == 2
    assert carried_by(index, index.cases()[-1].series_instance_uid) == (0, 0, 1)
    assert len(running._processes) == 2
    assert not set(killed) & set(running._processes.values())


def test_of_two_that_died_the_one_that_can_be_replaced_is_done_with_and_the_other_is_tried_again(
    receivers: tuple[Config, Receivers], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, running = receivers
    names, starts = list(running._processes), iter([running._start])
    reconciled: list[str] = []
    for process in running._processes.values():
        process.kill()
        process.join()
    monkeypatch.setattr(supervisor, "reconcile_run", lambda _, name: reconciled.append(name))

    def start_one() -> None:
        if (start := next(starts, None)) is None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        start()

    with monkeypatch.context() as short:
        short.setattr(running, "_start", start_one)
        running.watch()
    assert reconciled == names[:1]
    assert "action=receiver-not-started: Cannot allocate memory. It is tried again" in caplog.text
    wait_until(lambda: running.watch() or reconciled == names)  # after a pause
    assert len(running._processes) == 2


def test_what_cannot_be_started_is_tried_less_and_less_often_and_told_of_once_a_minute(
    receivers: tuple[Config, Receivers], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, running = receivers
    for process in running._processes.values():
        process.kill()
        process.join()
    tried_at: list[float] = []
    now_s = [1000.0]

    def start_none() -> None:
        tried_at.append(now_s[0])
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as short:
        short.setattr(running, "_start", start_none)
        short.setattr(time, "monotonic", lambda: now_s[0])
        while now_s[0] < 1119:
            running.watch()
            now_s[0] += 0.25
    assert caplog.text.count("action=receiver-not-started") == 2
    assert "receiver-died" not in caplog.text
    assert 10 < len(tried_at) < 20
    running.watch()
    assert len(running._processes) == 2
    assert all(process.is_alive() for process in running._processes.values())


def test_a_receiver_whose_key_is_gone_is_not_started_again_without_a_pause(
    make_config: MakeConfig, index: Index, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.sign("server")
    tls = ReceiveTls(certificate=files.certificate, key=files.key, verify="none")
    running = Receivers(make_config(receive={"processes": 1, "tls": tls}), index)
    running.start()
    key = files.key.read_bytes()
    try:
        files.key.unlink()
        (served,) = running._processes.values()
        served.kill()
        served.join()
        wait_until(lambda: running.watch() or running._restarts._num_failed == 2)
        assert caplog.text.count("action=receiver-died") == 1
        assert caplog.text.count("action=receiver-not-started: receive.tls: ") == 1
        files.key.write_bytes(key)
        wait_until(lambda: running.watch() or (not running._starting and not running._restarts._num_failed))
        assert [process.is_alive() for process in running._processes.values()] == [True]
    finally:
        running.terminate()
        running.join(5)


def test_a_port_in_use_is_named(make_config: MakeConfig, receiver: Config, index: Index) -> None:
    with pytest.raises(ReceiverError) as raised:
        Receivers(receiver, index)
    said = f"127.0.0.1:{receiver.receive.port} cannot be listened on: Address already in use; another program has that"
    assert str(raised.value).startswith(said)
