"""OHIF shows what the node made where it belongs: the real viewer, in a real browser, on an Orthanc and on the node."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.ndimage import binary_dilation

from model.phantom import Anatomy, Phantom, default_grid, render, write_series
from node.config import Config
from node.encode.seg import VERTEBRAE
from node.index import Index
from tests.ohif_viewer import OhifSite, find_chromium, open_study
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
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


def check_overlay(host: str, analysed: Analysed, picture: Path, before: Path) -> None:
    """Opens the Study there: the overlay lies on the vertebra, not on its mirror image, and nobody else was asked."""
    phantom = analysed.phantom
    is_vertebra = (phantom.vertebrae >= 1) & (phantom.vertebrae <= 7)
    z = int(is_vertebra.sum(axis=(1, 2)).argmax())
    on = is_vertebra[z]
    # Where a mirror image would lie, but for what is next to the vertebra.
    off = on[:, ::-1] & ~binary_dilation(on, iterations=2)
    on_lps_mm, off_lps_mm = (phantom.grid.to_lps_mm(np.insert(np.argwhere(mask), 0, z, axis=1)) for mask in (on, off))
    first = dcmread(analysed.paths[z], stop_before_pixels=True)
    picture.parent.mkdir(exist_ok=True)
    with open_study(host, first.StudyInstanceUID) as study:
        plain = study.picture_of(first.SOPInstanceUID, before)
        study.load_segmentation(VERTEBRAE.series_description)
        marked = study.picture_of(first.SOPInstanceUID, picture)
        overlay = np.ptp(marked, axis=2) > np.ptp(plain, axis=2) + 0.1  # it brought colour
        assert share_of(study.to_page(on_lps_mm), overlay) > 0.75
        assert share_of(study.to_page(off_lps_mm), overlay) < 0.1
        assert study.hosts == {host}


def share_of(places: NDArray[np.intp], marked: NDArray[np.bool_]) -> float:
    """Which share of places `(n, 2)` in a picture is marked there."""
    return float(marked[places[:, 0], places[:, 1]].mean())


def test_ohif_on_an_orthanc_lays_the_vertebrae_over_the_ct_where_they_are(analysed: Analysed, tmp_path: Path) -> None:
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    site = OhifSite(orthanc.url)
    try:
        for path in (*analysed.paths, *analysed.results):
            orthanc.client.upload_file(str(path))
        check_overlay(site.host, analysed, BUILD_FOLDER / "ohif.png", tmp_path / "before.png")
    finally:
        site.stop()
        orthanc.stop()


def test_ohif_served_by_the_node_shows_its_own_results(analysed: Analysed, index: Index, tmp_path: Path) -> None:
    hold(index, [Path(shutil.copy(path, index.data_dir)) for path in analysed.paths])
    case = index.cases()[0]
    folder = index.data_dir / "cases" / case.series_instance_uid / "0123"
    folder.mkdir(parents=True)
    for path in analysed.results:
        shutil.copy(path, folder)
    index.queue(case)
    claimed = index.claim_next()
    assert claimed is not None
    index.finish(claimed, folder, summary="", sop_instance_uids=[], destinations=[])
    server = WebServer(Config(), index)
    try:
        check_overlay(f"127.0.0.1:{server.port}", analysed, BUILD_FOLDER / "ohif-node.png", tmp_path / "before.png")
    finally:
        server.stop()
