"""OHIF shows what the node made where it belongs: the real viewer, in a real browser, over a real Orthanc."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.ndimage import binary_dilation

from model.phantom import Anatomy, default_grid, render, write_series
from node.encode.seg import VERTEBRAE
from tests.ohif_viewer import OhifSite, find_chromium, open_study
from tests.orthanc_server import OrthancServer
from tests.ports import free_port

BUILD_FOLDER = Path(__file__).parents[1] / "build"


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[OrthancServer]:
    find_chromium()
    server = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    yield server
    server.stop()


@pytest.fixture
def site(orthanc: OrthancServer) -> Iterator[OhifSite]:
    started = OhifSite(orthanc.url)
    yield started
    started.stop()


def share_of(places: NDArray[np.intp], marked: NDArray[np.bool_]) -> float:
    """Which share of places `(n, 2)` in a picture is marked there."""
    return float(marked[places[:, 0], places[:, 1]].mean())


def test_ohif_lays_the_vertebrae_over_the_ct_where_they_are(
    orthanc: OrthancServer, site: OhifSite, tmp_path: Path
) -> None:
    anatomy = Anatomy.random(2)
    phantom = render(anatomy, default_grid(anatomy, (2.0, 1.0, 1.0)), seed=2)
    paths = write_series(phantom, tmp_path / "ct", seed=2)
    analyze = [sys.executable, "-m", "node", "analyze", str(tmp_path / "ct"), "--out", str(tmp_path / "out")]
    subprocess.run(analyze, check=True, capture_output=True)
    orthanc.upload(tmp_path / "ct")
    orthanc.upload(tmp_path / "out")

    is_vertebra = (phantom.vertebrae >= 1) & (phantom.vertebrae <= 7)
    z = int(is_vertebra.sum(axis=(1, 2)).argmax())
    on = is_vertebra[z]
    # Where a mirror image would lie, but for what is next to the vertebra.
    off = on[:, ::-1] & ~binary_dilation(on, iterations=2)
    on_lps_mm, off_lps_mm = (phantom.grid.to_lps_mm(np.insert(np.argwhere(mask), 0, z, axis=1)) for mask in (on, off))
    first = dcmread(paths[z], stop_before_pixels=True)
    BUILD_FOLDER.mkdir(exist_ok=True)
    with open_study(site, first.StudyInstanceUID) as study:
        before = study.picture_of(first.SOPInstanceUID, tmp_path / "before.png")
        study.load_segmentation(VERTEBRAE.series_description)
        after = study.picture_of(first.SOPInstanceUID, BUILD_FOLDER / "ohif.png")
        overlay = np.ptp(after, axis=2) > np.ptp(before, axis=2) + 0.1  # it brought colour
        assert share_of(study.to_page(on_lps_mm), overlay) > 0.75
        assert share_of(study.to_page(off_lps_mm), overlay) < 0.1
        assert study.hosts == {site.host}
