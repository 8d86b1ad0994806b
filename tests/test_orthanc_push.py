"""Orthanc sends to the node by its script or its plugin: all of it, though either of them goes down in between."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from node.case import Case
from node.config import Config
from node.index import Index
from tests.factories import make_ct_series, make_report
from tests.orthanc_server import STABLE_AGE_S, OrthancServer
from tests.ports import free_port
from tests.receiver import listening
from tests.running_node import RunningNode
from tests.test_orthanc import wait_until
from tests.web_server import WebServer

WAYS = ("lua", "python", "stow")  # the first two by C-STORE


class Pusher:
    """An Orthanc that is started again and again with the same data. way: one of `WAYS`."""

    def __init__(self, way: str, folder: Path, node_port: int, web_port: int) -> None:
        self.way, self.node_port, self.web_port, self._folder = way, node_port, web_port, folder
        self._settings: dict[str, Any] = {"port": free_port(), "http_port": free_port(), "node_port": node_port}
        self._settings["routes_by"] = "lua" if way == "lua" else "python"
        if way == "stow":
            self._settings["plugin_settings"] = {"StowUrl": f"http://127.0.0.1:{web_port}/dicom-web/studies"}

    def start(self, stable_age_s: int = STABLE_AGE_S, routes: bool = True, **settings: Any) -> OrthancServer:
        """It asks for a password, which is none of the script's business. settings: more of Orthanc's own."""
        ours = self._settings | {"settings": settings} | ({} if routes else {"routes_by": ""})
        self.orthanc = OrthancServer(self._folder, stable_age_s=stable_age_s, password="hunter2", **ours)
        return self.orthanc

    def stop(self) -> None:
        """By SIGKILL."""
        self.orthanc.stop()


@pytest.fixture(params=WAYS)
def pusher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pusher]:
    pushing = Pusher(request.param, tmp_path / "orthanc", free_port(), free_port())
    yield pushing
    pushing.orthanc.stop()


@contextmanager
def receiving(pusher: Pusher, make_config: Callable[..., Config], index: Index) -> Iterator[None]:
    """The node listens for what is sent that way."""
    config = make_config(receive={"port": pusher.node_port})
    if pusher.way == "stow":
        web = WebServer(config, index, socket.create_server(("127.0.0.1", pusher.web_port)))
        yield
        web.stop()
    else:
        with listening(config, index):
            yield


def counts(cases: list[Case]) -> dict[str, int]:
    """How many Instances there are, by Series."""
    return {case.series_instance_uid: case.num_instances for case in cases}


def uid_of(paths: list[Path]) -> str:
    return str(dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID)


def test_twenty_series_at_once_arrive_though_orthanc_is_restarted_in_the_middle(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    expected = {uid_of(make_ct_series(tmp_path / f"in/{number:02d}", num_slices=4)): 4 for number in range(20)}
    orthanc = pusher.start()
    with receiving(pusher, make_config, index):
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: len(index.cases()) > 0, "the first has come", orthanc.log)
        pusher.stop()
        orthanc = pusher.start()
        wait_until(lambda: counts(index.cases()) == expected, "all have come", orthanc.log, 60)


def test_the_first_series_arrives_though_orthanc_is_restarted_before_the_node_runs_and_what_was_there_stays(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    make_ct_series(tmp_path / "before", num_slices=4)
    series = make_ct_series(tmp_path / "in", num_slices=4)
    orthanc = pusher.start(routes=False)
    orthanc.upload(tmp_path / "before")
    wait_until(lambda: orthanc.num_stable() == 1, "it is stable", orthanc.log)
    pusher.stop()
    pusher.start()
    pusher.stop()
    orthanc = pusher.start()
    orthanc.upload(tmp_path / "in")
    wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
    pusher.stop()
    with receiving(pusher, make_config, index):
        orthanc = pusher.start()
        wait_until(lambda: counts(index.cases()) == {uid_of(series): 4}, "it has come", orthanc.log)


def test_what_came_before_orthanc_was_restarted_is_sent_once_and_waits_for_the_node_over_another_restart(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    early, late = make_ct_series(tmp_path / "early"), make_ct_series(tmp_path / "late", num_slices=4)
    orthanc = pusher.start(stable_age_s=1000)
    orthanc.upload(tmp_path / "early")
    (series,) = orthanc.series()
    pusher.stop()
    orthanc = pusher.start()
    wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
    assert orthanc.num_stable() == 0
    pusher.stop()
    with receiving(pusher, make_config, index):
        orthanc = pusher.start()
        wait_until(lambda: counts(index.cases()) == {uid_of(early): 8}, "it has come", orthanc.log)
        orthanc.upload(tmp_path / "late")
        wait_until(lambda: counts(index.cases()).get(uid_of(late)) == 4, "the next has come, too", orthanc.log)
        pusher.stop()
        orthanc = pusher.start()
        make_ct_series(tmp_path / "last", num_slices=1)
        orthanc.upload(tmp_path / "last")
        wait_until(lambda: len(index.cases()) == 3, "and another one", orthanc.log)
        assert uid_of(early) not in orthanc.log()
        assert series.orthanc_id not in orthanc.log()


def test_a_node_that_is_killed_in_the_middle_gets_the_rest_when_it_runs_again(tmp_path: Path) -> None:
    """Three Orthancs send to it, each in its way."""
    web_port, expected = free_port(), dict[str, int]()
    (tmp_path / "node").mkdir()
    (tmp_path / "other").mkdir()
    node = RunningNode(
        tmp_path / "node",
        receive={"allow": [{"ae_title": "ORTHANC"}]},
        complete={"quiet_time_s": 600},
        web={"enabled": True, "port": web_port},
    )
    pushers = [Pusher(way, tmp_path / way, node.port, web_port) for way in WAYS]
    lua, *_ = orthancs = [pusher.start() for pusher in pushers]

    def log() -> str:
        return "\n".join([node.log(), *(orthanc.log() for orthanc in orthancs)])

    def upload(when: str) -> set[str]:
        for way, orthanc in zip(WAYS, orthancs, strict=True):
            expected[uid_of(make_ct_series(tmp_path / when / way, num_slices=40))] = 40
            orthanc.upload(tmp_path / when / way)
        return set(expected)

    try:
        first = upload("before")
        wait_until(lambda: first == set(counts(node.cases())), "all have begun", log, 60)
        node.kill()
        upload("after")
        wait_until(lambda: all("cspine: NOT SENT" in one.log() for one in orthancs), "each of them says so", log, 60)
        node.wait_until_gone()
        node.start()
        for number in range(100):
            if counts(node.cases()) == expected:
                break
            # An Orthanc as old as this one has no heartbeat: the script wakes up when something else happens.
            make_report(tmp_path / f"other/{number}.dcm")
            lua.client.upload_file(str(tmp_path / f"other/{number}.dcm"))
            time.sleep(1)
        assert counts(node.cases()) == expected, log()
    finally:
        for orthanc in orthancs:
            orthanc.stop()
        if node.process.poll() is None:
            node.kill()
