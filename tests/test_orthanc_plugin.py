"""The Python plugin inside a real Orthanc: what it sends by C-STORE and by STOW-RS, and what it does when it cannot."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from node.config import Config
from node.index import Index
from node.web.settings import WebConfig
from tests.factories import make_ct_series, make_report, make_screen_save
from tests.orthanc_server import STABLE_AGE_S, OrthancServer
from tests.ports import free_port
from tests.receiver import listening
from tests.test_orthanc import wait_until
from tests.web_server import WebServer


def make_mixed(folder: Path) -> list[Path]:
    """Two CT Series, one with a screen save among its slices, and a report; the CT Images of the one and the other."""
    paths = make_ct_series(folder / "a", num_slices=8) + make_ct_series(folder / "b", num_slices=5)
    make_screen_save(folder / "a" / "dose.dcm", like=paths[0])
    make_report(folder / "report.dcm")
    return paths


def test_the_ct_instances_of_stable_series_are_sent_by_c_store(
    make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    config = make_config()
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=config.receive.port, routes_by="python")
    try:
        with listening(config, index):
            paths = make_mixed(tmp_path / "in")
            orthanc.upload(tmp_path / "in")
            wait_until(lambda: orthanc.num_stable() == 3, "all Series are stable", orthanc.log)
            wait_until(lambda: [job["State"] for job in orthanc.jobs()] == ["Success"] * 2, "both went", orthanc.log)
            assert sorted(case.num_instances for case in index.cases()) == [5, 8]
            assert {case.calling_ae_title for case in index.cases()} == {"ORTHANC"}
        # Nobody listens any more.
        make_ct_series(tmp_path / "late", series_instance_uid=dcmread(paths[0]).SeriesInstanceUID, num_slices=1)
        orthanc.upload(tmp_path / "late")
        wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
        assert "Tried again in 5 s" in orthanc.log()
        with listening(config, index):
            wait_until(lambda: sorted(case.num_instances for case in index.cases()) == [5, 9], "it came", orthanc.log)
    finally:
        orthanc.stop()


def test_what_went_by_c_store_goes_once_also_from_an_orthanc_that_forgets_its_jobs(
    make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    config = make_config()
    orthanc = OrthancServer(
        tmp_path / "orthanc",
        port=free_port(),
        node_port=config.receive.port,
        routes_by="python",
        settings={"JobsHistorySize": 0},
    )
    try:
        with listening(config, index):
            for name in ("a", "b"):
                make_ct_series(tmp_path / name, num_slices=3)
                orthanc.upload(tmp_path / name)
            wait_until(lambda: [case.num_instances for case in index.cases()] == [3, 3], "both came", orthanc.log)
            time.sleep(STABLE_AGE_S)
        assert "NOT SENT" not in orthanc.log()
    finally:
        orthanc.stop()


def test_what_could_not_be_sent_by_stow_is_sent_when_it_can(
    make_config: Callable[..., Config], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config().model_copy(update={"web": WebConfig(allow="tokens")})
    web = WebServer(config, index)
    monkeypatch.setattr("node.web.tokens.secrets.token_urlsafe", lambda _: "s3cret")
    orthanc = OrthancServer(
        tmp_path / "orthanc",
        port=free_port(),
        node_port=config.receive.port,
        routes_by="python",
        plugin_settings={"StowUrl": f"{web.url}/studies", "Token": "s3cret"},
    )
    try:
        make_mixed(tmp_path / "in")
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: orthanc.log().count("cspine: NOT SENT") >= 2, "the log says so of both", orthanc.log)
        assert "Tried again in 5 s" in orthanc.log()
        assert index.cases() == []
        web.tokens.make("orthanc", ("store",))
        wait_until(lambda: sorted(case.num_instances for case in index.cases()) == [5, 8], "both came", orthanc.log)
        said = orthanc.log()
        time.sleep(STABLE_AGE_S)
        assert orthanc.log().count("NOT SENT") == said.count("NOT SENT")
    finally:
        orthanc.stop()
        web.stop()


def test_what_the_node_has_no_room_for_is_sent_when_it_has(
    make_config: Callable[..., Config], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took some of the Series before its disk was full."""
    config = make_config()
    web = WebServer(config, index)
    began: list[int] = []
    begin = web.store.begin

    def begin_few(*arguments: Any) -> Any:
        began.append(1)
        if len(began) > 3 and web.store._min_free_mb == 0:
            web.store._min_free_mb = 10**9
        return begin(*arguments)

    monkeypatch.setattr(web.store, "begin", begin_few)
    orthanc = OrthancServer(
        tmp_path / "orthanc",
        port=free_port(),
        node_port=config.receive.port,
        routes_by="python",
        plugin_settings={"StowUrl": f"{web.url}/studies"},
    )
    try:
        make_ct_series(tmp_path / "in", num_slices=8)
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: "Tried again in 5 s" in orthanc.log(), "the log says that not all went", orthanc.log)
        assert [case.num_instances for case in index.cases()] == [3]
        monkeypatch.setattr(web.store, "begin", begin)
        web.store._min_free_mb = 0
        wait_until(lambda: [case.num_instances for case in index.cases()] == [8], "the rest came", orthanc.log)
    finally:
        orthanc.stop()
        web.stop()
