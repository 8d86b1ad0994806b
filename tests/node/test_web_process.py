"""The process of the HTTP side as the service sees it."""

import socket
import threading
from collections.abc import Callable
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import OperationalError

from node.config import Config
from node.index import Index
from node.web import server
from node.web.settings import WebConfig
from node.web.supervisor import WebProcess
from tests.ports import free_port
from tests.waiting import WAIT_S, wait_until


def test_a_watch_that_runs_on_while_the_process_ends_starts_no_other(
    make_config: Callable[..., Config], index: Index
) -> None:
    """The scheduler of the service does not wait for its jobs when the node stops."""
    web = WebProcess(make_config().model_copy(update={"web": WebConfig(enabled=True, port=free_port())}), index)
    web.start()
    process = web._process
    try:
        assert process is not None
        web.terminate()
        process.join(WAIT_S)
        assert process.exitcode == 0  # it heard of it, though it was only just about to serve
        web.watch()
        assert web._process is process
    finally:
        web.join(0)


def test_where_it_cannot_be_started_again_it_is_tried_with_pauses_and_told_of_once_a_minute(
    make_config: Callable[..., Config], index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    web = WebProcess(make_config().model_copy(update={"web": WebConfig(enabled=True, port=port)}), index)
    web.start()
    process = web._process
    try:
        assert process is not None
        process.kill()
        process.join()
        with socket.create_server(("127.0.0.1", port)):
            wait_until(lambda: web.watch() or web._restarts._num_failed == 2)
            started = web._process
            web.watch()
            assert web._process is started  # it waits
        assert caplog.text.count("action=web-died") == 1
        assert caplog.text.count("action=web-not-started") == 1
        wait_until(lambda: web.watch() or web._is_serving)
    finally:
        web.terminate()
        web.join(5)


def test_the_catalog_is_refreshed_again_after_a_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_REFRESH_S", 0.01)
    refresh = Mock(side_effect=[OperationalError("", {}, Exception("database or disk is full")), *[None] * 10_000])
    stopping = threading.Event()
    thread = threading.Thread(target=server._refresh, args=(Mock(refresh=refresh), stopping))
    thread.start()
    try:
        wait_until(lambda: refresh.call_count >= 3)
    finally:
        stopping.set()
        thread.join(WAIT_S)
    assert caplog.text.count("action=catalog-not-refreshed") == 1
