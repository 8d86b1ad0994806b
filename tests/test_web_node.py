"""The running node over HTTP only: a Series goes in by STOW-RS, its results are found by QIDO-RS; processes may die."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from pydicom import dcmread

from node.case import CaseState
from node.web.multipart import end_of, part_head
from tests.ports import free_port
from tests.running_node import RunningNode, phantom_series
from tests.waiting import WAIT_S


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def node(tmp_path: Path, port: int) -> Iterator[RunningNode]:
    running = RunningNode(tmp_path, web={"enabled": True, "port": port}, complete={"quiet_time_s": 2})
    deadline = time.monotonic() + 60
    while web_process(running, port) is None:
        assert time.monotonic() < deadline, running.log()
        time.sleep(0.1)
    yield running
    running.stop()
    running.wait_until_gone()


def stow(port: int, paths: list[Path]) -> requests.Response:
    parts = [part_head("xx", "application/dicom") + path.read_bytes() for path in paths]
    return requests.post(
        f"http://127.0.0.1:{port}/dicom-web/studies",
        data=b"".join(parts) + end_of("xx"),
        headers={"Content-Type": 'multipart/related; type="application/dicom"; boundary=xx'},
        timeout=60,
    )


def find(port: int, path: str) -> Any:
    return requests.get(f"http://127.0.0.1:{port}/dicom-web{path}", timeout=WAIT_S).json()


def web_process(node: RunningNode, port: int) -> psutil.Process | None:
    """The process that listens for HTTP."""
    for child in psutil.Process(node.process.pid).children():
        if any(item.laddr.port == port for item in child.net_connections() if item.status == psutil.CONN_LISTEN):
            return child
    return None


def test_a_series_goes_in_and_its_results_are_found(node: RunningNode, port: int, tmp_path: Path) -> None:
    paths = phantom_series(tmp_path / "in")
    study = dcmread(paths[0], stop_before_pixels=True).StudyInstanceUID
    assert stow(port, paths).status_code == 200
    assert node.wait_until_settled() == {CaseState.DONE: 1}
    series = find(port, f"/studies/{study}/series")
    assert sorted(item["00080060"]["Value"][0] for item in series)[:2] == ["CT", "SEG"]
    assert "SR" in {item["00080060"]["Value"][0] for item in series}


def test_the_http_side_is_started_again_and_loses_nothing(node: RunningNode, port: int, tmp_path: Path) -> None:
    paths = phantom_series(tmp_path / "in")
    first, rest = paths[:20], paths[20:]
    assert stow(port, first).status_code == 200
    process = web_process(node, port)
    assert process is not None
    process.kill()
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            assert stow(port, rest).status_code == 200
            break
        except requests.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert node.wait_until_settled() == {CaseState.DONE: 1}
    assert node.cases()[0].num_instances == len(paths)
    assert "action=web-died" in node.log()
