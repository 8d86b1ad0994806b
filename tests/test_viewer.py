"""OHIF shows what the node made where it belongs: the real viewer, in a real browser, on an Orthanc and on the node."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.ndimage import binary_dilation

from model.phantom import Anatomy, Phantom, default_grid, render, write_series
from node.config import Config
from node.encode.colours import LEVEL_RGB
from node.encode.seg import VERTEBRAE
from node.index import Index
from node.web.settings import WebConfig
from tests.ohif_viewer import OhifSite, OhifStudy, browser_page, find_chromium, open_study
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.waiting import wait_until
from tests.web_server import WebServer, hold

BUILD_FOLDER = Path(__file__).parents[1] / "build"


@dataclass(frozen=True)
class Analysed:
    """A phantom, its Series, and what `cspine analyze` made of it."""

    phantom: Phantom
    paths: list[Path]
    results: list[Path]


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    find_chromium()
    folder = tmp_path_factory.mktemp("analysed")
    anatomy = Anatomy.random(2)
    phantom = render(anatomy, default_grid(anatomy, (2.0, 1.0, 1.0)), seed=2)
    paths = write_series(phantom, folder / "ct", seed=2)
    analyze = [sys.executable, "-m", "node", "analyze", str(folder / "ct"), "--out", str(folder / "out")]
    subprocess.run(analyze, check=True, capture_output=True)
    return Analysed(phantom, paths, sorted((folder / "out").glob("*.dcm")))


def check_overlay(study: OhifStudy, analysed: Analysed, picture: Path) -> None:
    """The overlay lies on the vertebra, not on its mirror image."""
    phantom = analysed.phantom
    is_vertebra = (phantom.vertebrae >= 1) & (phantom.vertebrae <= 7)
    z = int(is_vertebra.sum(axis=(1, 2)).argmax())
    on = is_vertebra[z]
    # Where a mirror image would lie, but for what is next to the vertebra.
    off = on[:, ::-1] & ~binary_dilation(on, iterations=2)
    on_lps_mm, off_lps_mm = (phantom.grid.to_lps_mm(np.insert(np.argwhere(mask), 0, z, axis=1)) for mask in (on, off))
    picture.parent.mkdir(exist_ok=True)
    uid = dcmread(analysed.paths[z], stop_before_pixels=True).SOPInstanceUID
    shares: list[tuple[float, float]] = []

    def is_drawn() -> bool:
        overlay = np.ptp(study.picture_of(uid, picture), axis=2) > 0.1  # CT is grey
        shares.append((share_of(study.to_page(on_lps_mm), overlay), share_of(study.to_page(off_lps_mm), overlay)))
        return shares[-1][0] > 0.75 and shares[-1][1] < 0.1

    wait_until(is_drawn, lambda: f"of the vertebra, and of its mirror image, are drawn over: {shares}")


def share_of(places: NDArray[np.intp], marked: NDArray[np.bool_]) -> float:
    """Which share of places `(n, 2)` in a picture is marked there."""
    return float(marked[places[:, 0], places[:, 1]].mean())


def test_ohif_on_an_orthanc_lays_the_vertebrae_over_the_ct_where_they_are(analysed: Analysed, tmp_path: Path) -> None:
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    site = OhifSite(orthanc.url)
    study_uid = dcmread(analysed.paths[0], stop_before_pixels=True).StudyInstanceUID
    try:
        for path in (*analysed.paths, *analysed.results):
            orthanc.client.upload_file(str(path))
        with open_study(site.host, study_uid) as study:
            study.load_segmentation(VERTEBRAE.series_description)
            check_overlay(study, analysed, BUILD_FOLDER / "ohif.png")
            assert study.hosts == {site.host}
    finally:
        site.stop()
        orthanc.stop()


@pytest.fixture
def case_list(analysed: Analysed, index: Index) -> Iterator[Callable[..., WebServer]]:
    """What serves a node that holds the one case, done, under the settings of `web` given."""
    hold(index, [Path(shutil.copy(path, index.data_dir)) for path in analysed.paths])
    case = index.cases()[0]
    folder = index.data_dir / "cases" / case.series_instance_uid / "0123"
    folder.mkdir(parents=True)
    for path in (*analysed.results, analysed.results[0].parent / "findings.json"):
        shutil.copy(path, folder)
    index.queue(case)
    claimed = index.claim_next()
    assert claimed is not None
    index.finish(claimed, folder, summary="", sop_instance_uids=[], destinations=[])
    servers: list[WebServer] = []

    def serve(**web: object) -> WebServer:
        servers.append(WebServer(Config(web=WebConfig(**web)), index))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()


def test_one_key_in_the_case_list_opens_the_ct_with_its_vertebrae(
    analysed: Analysed, case_list: Callable[..., WebServer]
) -> None:
    server = case_list()
    BUILD_FOLDER.mkdir(exist_ok=True)
    with browser_page() as (page, hosts):
        page.goto(server.root)
        for width, name in ((1280, "case-list.png"), (360, "case-list-phone.png")):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=BUILD_FOLDER / name)
        page.set_viewport_size({"width": 1280, "height": 800})
        assert page.get_by_role("row").count() == 2
        assert page.get_by_role("columnheader", name="Probability").is_visible()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        study = OhifStudy(page, hosts)
        study.wait_for_segmentation()
        check_overlay(study, analysed, BUILD_FOLDER / "ohif-node.png")
        assert study.segments().keys() == LEVEL_RGB.keys()
        for level, colour in study.segments().items():
            assert colour == pytest.approx(LEVEL_RGB[level], abs=3)  # CIELab is written in steps
        report = study.read_report("fracture report")
        page.screenshot(path=BUILD_FOLDER / "ohif-report.png")
        findings = json.loads((analysed.results[0].parent / "findings.json").read_text("utf-8"))
        for level, found in findings["levels"].items():
            percent = round(100 * found["probability"], 1)
            said, *of_regions = re.findall(
                rf"Fracture {level} vertebra(.*?)(?=Fracture C\d vertebra|$)", report, re.DOTALL
            )
            assert f" {percent:g} % " in said
            assert found["finding"].capitalize() in said
            assert len(of_regions) == len(found["regions"])
    assert hosts == {f"127.0.0.1:{server.port}"}


def test_a_browser_asks_for_a_token_and_with_it_opens_the_list_and_the_case(
    case_list: Callable[..., WebServer],
) -> None:
    server = case_list(allow="tokens")
    with browser_page(password=server.tokens.make("reader", ("read",))) as (page, hosts):
        answer = page.goto(server.root)
        assert answer is not None
        assert answer.status == 200
        page.get_by_role("row").get_by_role("link").click()
        OhifStudy(page, hosts).wait_for_segmentation()
