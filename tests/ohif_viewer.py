"""The real OHIF in a real browser, for tests: headless Chromium, on an Orthanc's DICOMweb.

OHIF comes from npm (`make viewer`); it is served as it would be in a hospital, with DICOMweb on the same origin.
"""

import mimetypes
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray
from playwright.sync_api import Page, sync_playwright

from node.web import viewer
from tests.serving import Quiet

# Software rendering, and no service of the browser maker's is asked for anything.
_CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]
_TIMEOUT_MS = float(os.environ.get("CSPINE_BROWSER_TIMEOUT_MS", "90000"))


def find_chromium() -> str:
    """The path of Chromium; without it, or without OHIF, the test is skipped, or fails where servers are required."""
    chromium = shutil.which("chromium")
    if chromium and viewer.find_viewer():
        return chromium
    missing = "This needs Chromium (Debian: apt-get install chromium) and OHIF (make viewer)"
    if os.environ.get("CSPINE_REQUIRE_SERVERS"):
        pytest.fail(missing)
    pytest.skip(missing)


class OhifSite:
    """What a hospital would put before its archive, from construction to `stop`.

    OHIF is at `/viewer`, the archive's DICOMweb at `/dicom-web`, on one loopback port.
    """

    def __init__(self, archive_url: str) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(archive_url))
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(archive_url: str) -> type[BaseHTTPRequestHandler]:
    folder = viewer.find_viewer()
    assert folder is not None

    class Handler(Quiet, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, kind, body = self._answer()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            # What OHIF's decoders need to share memory between threads.
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> tuple[int, str, bytes]:
            path = self.path.partition("?")[0]
            if path.startswith("/dicom-web/"):
                accept = {"Accept": self.headers.get("Accept", "*/*")}
                try:
                    with urllib.request.urlopen(urllib.request.Request(archive_url + self.path, headers=accept)) as got:
                        return got.status, got.headers["Content-Type"], got.read()
                except urllib.error.HTTPError as error:
                    with error:
                        return error.code, "text/plain", error.read()
            name = path.removeprefix("/viewer").lstrip("/")
            if name == "app-config.js":
                return 200, "text/javascript", viewer.config_script().encode()
            file = folder / name
            if not name or not file.is_file():  # a page of the single-page application
                file = folder / "index.html"
            return 200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes()

    return Handler


class OhifStudy:
    """A Study open in OHIF, its CT in the one viewport. hosts: whom the browser has asked for anything."""

    def __init__(self, page: Page, hosts: set[str]) -> None:
        self._page, self.hosts = page, hosts
        page.wait_for_function("() => window.cornerstone?.getEnabledElements()[0]?.viewport.getImageIds?.().length")
        # A profile of its own has seen no tour of the viewer. OHIF notes here that it begins one, before it shows it.
        assert page.evaluate("localStorage.getItem('shownTours')") is None
        assert not page.get_by_text("Skip all").is_visible()

    def load_segmentation(self, series_description: str) -> None:
        """Opens a Series of segmentations over the CT, as a reader does: by a double-click."""
        self._open(series_description)
        self.wait_for_segmentation()

    def read_report(self, series_description: str) -> str:
        """Opens a Series of reports in place of the CT; the text that is shown."""
        self._open(series_description)
        shown = self._page.locator('[data-cy="viewport-grid"]')
        shown.get_by_text("Imaging Measurement Report").wait_for()
        return shown.inner_text()

    def _open(self, series_description: str) -> None:
        thumbnails = self._page.locator('[data-cy="study-browser-thumbnail-no-image"]')
        thumbnails.filter(has_text=series_description).dblclick()

    def wait_for_segmentation(self) -> None:
        """Waits until one lies over the CT."""
        self._page.wait_for_function("() => window.cornerstoneTools.segmentation.state.getSegmentations().length")

    def segments(self) -> dict[str, list[int]]:
        """The name of each segment and its colour, as red, green and blue up to 255."""
        found = self._page.evaluate(
            """() => {
                const { state, config } = window.cornerstoneTools.segmentation;
                const { id } = window.cornerstone.getEnabledElements()[0].viewport;
                return state.getSegmentations().flatMap(one => Object.values(one.segments).map(segment => [
                    segment.label,
                    config.color.getSegmentIndexColor(id, one.segmentationId, segment.segmentIndex).slice(0, 3),
                ]));
            }"""
        )
        return dict(found)

    def picture_of(self, sop_instance_uid: str, png: Path) -> NDArray[np.float32]:
        """Shows one Instance, and the page as `(rows, columns, RGB)` in 0..1, also kept as a file."""
        self._page.evaluate(
            """async uid => {
                const viewport = window.cornerstone.getEnabledElements()[0].viewport;
                await viewport.setImageIdIndex(viewport.getImageIds().findIndex(id => id.includes(uid)));
                viewport.render();
            }""",
            sop_instance_uid,
        )
        self._page.wait_for_timeout(500)  # the overlay is drawn in its own time: it may not be there yet
        self._page.screenshot(path=png)
        return np.asarray(imread(png))[..., :3]

    def to_page(self, points_lps_mm: NDArray[np.float64]) -> NDArray[np.intp]:
        """Row and column `(n, 2)` in the picture of LPS points `(n, 3)` of the Instance shown."""
        places = self._page.evaluate(
            """points => {
                const viewport = window.cornerstone.getEnabledElements()[0].viewport;
                const box = viewport.element.getBoundingClientRect();
                return points.map(p => viewport.worldToCanvas(p)).map(([x, y]) => [box.top + y, box.left + x]);
            }""",
            points_lps_mm.tolist(),
        )
        return np.rint(places).astype(np.intp)


@contextmanager
def browser_page(password: str | None = None) -> Iterator[tuple[Page, set[str]]]:
    """A page of a browser of its own, and the hosts that it will have asked for anything.

    password: what its user gives when the browser asks.
    """
    hosts: set[str] = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=_CHROMIUM_ARGUMENTS)
        page = browser.new_page(
            viewport={"width": 1280, "height": 800},
            http_credentials=None if password is None else {"username": "anyone", "password": password},
        )
        page.set_default_timeout(_TIMEOUT_MS)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        try:
            yield page, hosts
        finally:
            browser.close()


@contextmanager
def open_study(host: str, study_instance_uid: str) -> Iterator[OhifStudy]:
    """Opens a Study in the OHIF of that host and port."""
    with browser_page() as (page, hosts):
        page.goto(f"http://{host}/viewer/viewer?StudyInstanceUIDs={study_instance_uid}")
        yield OhifStudy(page, hosts)
