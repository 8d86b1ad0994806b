"""The Python plugin inside a real Orthanc: what it sends by C-STORE and by STOW-RS, and what it does when it cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread

from node.config import Config
from node.index import Index
from node.web.settings import WebConfig
from tests.factories import make_ct_series, make_report, make_screen_save
from tests.orthanc_server import OrthancServer
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
        failed = orthanc.jobs()[-1]
        assert (failed["State"], failed["ID"] in orthanc.log()) == ("Failure", True)
    finally:
        orthanc.stop()


@pytest.mark.parametrize("is_known", [True, False])
def test_the_ct_instances_of_stable_series_are_sent_by_stow(
    make_config: Callable[..., Config], index: Index, tmp_path: Path, *, is_known: bool
) -> None:
    config = make_config()
    config = config.model_copy(update={"web": WebConfig(allow="tokens")})
    web = WebServer(config, index)
    token = web.tokens.make("orthanc", ("store",)) if is_known else "wrong"
    orthanc = OrthancServer(
        tmp_path / "orthanc",
        port=free_port(),
        node_port=config.receive.port,
        routes_by="python",
        plugin_settings={"StowUrl": f"{web.url}/studies", "Token": token},
    )
    try:
        make_mixed(tmp_path / "in")
        orthanc.upload(tmp_path / "in")
        if is_known:
            wait_until(lambda: len(index.cases()) == 2, "both Series are there", orthanc.log)
            wait_until(lambda: sorted(case.num_instances for case in index.cases()) == [5, 8], "and whole", orthanc.log)
            assert "NOT SENT" not in orthanc.log()
        else:
            wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
            assert "401" in orthanc.log()
            assert index.cases() == []
    finally:
        orthanc.stop()
        web.stop()
