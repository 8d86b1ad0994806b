"""Pictures over DICOMweb: of one frame, of several, of whole Series; windowed and scaled as PS3.18 8.3.5.1 says."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicomweb_client.api import DICOMwebClient
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread

from node.config import Config
from node.index import Index
from tests.factories import make_ct_series, make_enhanced_ct, make_report
from tests.node.test_web import parts, path_of, uids_of
from tests.web_server import WebServer, hold

JPEGS, PNGS = 'multipart/related; type="image/jpeg"', 'multipart/related; type="image/png"'


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five slices with square pixels, a report of the same Study, and an Enhanced CT of four frames."""
    folder = tmp_path_factory.mktemp("rendered")
    ct = make_ct_series(folder / "ct", num_slices=5, pixel_spacing_mm=(1, 1))
    report = dcmread(make_report(folder / "report.dcm"))
    report.StudyInstanceUID = dcmread(ct[0]).StudyInstanceUID
    report.save_as(folder / "report.dcm")
    return [*ct, folder / "report.dcm", make_enhanced_ct(folder / "enhanced.dcm", num_frames=4)]


@pytest.fixture(scope="module")
def web(paths: list[Path]) -> Iterator[WebServer]:
    index = Index(paths[-1].parent)
    hold(index, paths)
    server = WebServer(Config(), index)
    yield server
    server.stop()
    index.close()


def image(data: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(BytesIO(data)), float)


def shown(web: WebServer, path: Path, query: str = "") -> NDArray[np.float64]:
    answer = web.get(f"{path_of(path)}/rendered{query}", "image/png")
    assert answer.status_code == 200, answer.text
    return image(answer.content)


def hu_of(path: Path) -> NDArray[np.float64]:
    ds = dcmread(path)
    return ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


# ---- one and several ----


def test_a_series_is_its_middle_slice_or_all_of_them(web: WebServer, paths: list[Path]) -> None:
    url = path_of(paths[0], 2) + "/rendered"
    one = web.get(url)
    assert (one.headers["Content-Type"], one.status_code) == ("image/jpeg", 200)
    assert one.content == web.get(path_of(paths[2]) + "/rendered").content
    found = parts(web.get(url, PNGS))
    assert [kind for kind, _ in found] == ["image/png"] * 5
    assert all((image(data) == shown(web, path)).all() for (_, data), path in zip(found, paths[:5], strict=True))


def test_a_study_of_two_series_is_the_middle_slice_of_the_longer_one(tmp_path: Path) -> None:
    shorter, longer = make_ct_series(tmp_path / "0", num_slices=2), make_ct_series(tmp_path / "1", num_slices=5)
    uid = dcmread(shorter[0]).StudyInstanceUID
    for path in longer:
        ds = dcmread(path)
        ds.StudyInstanceUID = uid
        ds.save_as(path)
    index = Index(tmp_path)
    hold(index, [*shorter, *longer])
    server = WebServer(Config(), index)
    try:
        one = server.get(path_of(longer[0], 1) + "/rendered")
        assert one.content == server.get(path_of(longer[2]) + "/rendered").content
    finally:
        server.stop()
        index.close()


def test_a_study_is_shown_without_what_has_no_pixels(web: WebServer, paths: list[Path]) -> None:
    url = path_of(paths[0], 1) + "/rendered"
    assert image(web.get(url).content).shape == (20, 24)
    assert len(parts(web.get(url, JPEGS))) == 5
    assert web.get(path_of(paths[5], 2) + "/rendered", JPEGS).status_code == 406
    assert web.get(path_of(paths[5], 2) + "/rendered").status_code == 406


def test_several_frames_come_as_several_pictures(web: WebServer, paths: list[Path]) -> None:
    url = path_of(paths[6]) + "/frames/{}/rendered"
    found = parts(web.get(url.format("3,1")))
    assert [data for _, data in found] == [web.get(url.format(number)).content for number in (3, 1)]
    assert {kind for kind, _ in found} == {"image/jpeg"}
    assert len(parts(web.get(path_of(paths[6]) + "/rendered", JPEGS))) == 4
    assert len(parts(web.get(url.format(2), JPEGS))) == 1
    assert web.get(url.format("3,1"), "image/png").status_code == 406
    assert web.get(url.format("3,5")).status_code == 404


def test_a_frame_has_a_thumbnail(web: WebServer, paths: list[Path]) -> None:
    answer = web.get(path_of(paths[6]) + "/frames/2/thumbnail", "image/png")
    assert max(image(answer.content).shape) == 128
    assert web.get(path_of(paths[6]) + "/frames/5/thumbnail").status_code == 404


def test_the_dicomweb_client_of_others_retrieves_a_series_as_a_picture(web: WebServer, paths: list[Path]) -> None:
    study, series, instance = uids_of(paths[0])
    client = DICOMwebClient(web.url)
    assert image(client.retrieve_series_rendered(study, series, media_types=("image/png",))).shape == (20, 24)
    assert client.retrieve_instance_frames_rendered(study, series, instance, [1], media_types=("image/jpeg",))


# ---- window ----


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("function", ["linear", "linear-exact", "sigmoid"])
def test_a_window_is_of_the_function_that_is_asked_for_or_of_the_instance(
    web: WebServer, paths: list[Path], index: Index, function: str, own: bool
) -> None:
    hu = hu_of(paths[0])
    expected = {
        "linear": np.clip((hu - 199.5) / 79 + 0.5, 0, 1),
        "linear-exact": np.clip((hu - 200) / 80 + 0.5, 0, 1),
        "sigmoid": 1 / (1 + np.exp(-4 * (hu - 200) / 80)),
    }[function]
    if not own:
        assert np.abs(shown(web, paths[0], f"?window=200,80,{function}") - expected * 255).max() <= 0.51
        return
    ds = dcmread(paths[0])
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 200, 80, function.upper().replace("-", "_")
    ds.save_as(index.data_dir / "own.dcm")
    hold(index, [index.data_dir / "own.dcm"])
    server = WebServer(Config(), index)
    try:
        assert np.abs(shown(server, index.data_dir / "own.dcm") - expected * 255).max() <= 0.51
    finally:
        server.stop()


# ---- viewport ----


@pytest.mark.parametrize(
    ("viewport", "shape"),
    [
        ("1000,1000", (833, 1000)),  # larger than it is
        ("100,20", (20, 24)),
        ("12,1000", (10, 12)),
        ("240,240,0,0,10,20", (240, 120)),
        ("240,240,,,,10", (100, 240)),
    ],
)
def test_a_picture_fills_the_viewport_as_far_as_its_shape_lets_it(
    web: WebServer, paths: list[Path], viewport: str, shape: tuple[int, int]
) -> None:
    assert shown(web, paths[0], f"?viewport={viewport}").shape == shape


def test_a_region_is_cut_out_and_mirrored_where_its_size_is_negative(web: WebServer, paths: list[Path]) -> None:
    whole = shown(web, paths[0], "?window=300,600")
    region = whole[3:15, 4:20]
    for size, expected in (
        ("16,12", region),
        ("-16,12", region[:, ::-1]),
        ("16,-12", region[::-1]),
        ("-16,-12", region[::-1, ::-1]),
    ):
        assert (shown(web, paths[0], f"?window=300,600&viewport=16,12,4,3,{size}") == expected).all()
    assert (shown(web, paths[0], "?window=300,600&viewport=20,17,4,3") == whole[3:, 4:]).all()


def test_what_is_not_drawn_is_said(web: WebServer, paths: list[Path]) -> None:
    plain = web.get(path_of(paths[0]) + "/rendered?iccprofile=no")
    assert "Warning" not in plain.headers
    for url, accept in ((path_of(paths[0]) + "/rendered", ""), (path_of(paths[0], 2) + "/rendered", PNGS)):
        answer = web.get(f"{url}?annotation=technique,patient&iccprofile=srgb", accept)
        assert answer.headers["Warning"] == (
            '299 cspine: "The following annotation values are not supported: technique,patient", '
            '299 cspine: "The iccprofile parameter is not supported: the picture has none"'
        )
    assert web.get(path_of(paths[0]) + "/rendered?annotation=patient").content == plain.content


@pytest.mark.parametrize(
    "query",
    [
        "viewport=0,5",
        "viewport=5000,5",
        "viewport=1.5,5",
        "viewport=5",
        "viewport=16,12,20,0,10,10",
        "viewport=16,12,0,0,0,10",
        "viewport=16,12,nan",
        "viewport=16,12,0,0,10,10,1",
        "viewport=16,12,x",
        "window=1",
        "window=1,2,cubic",
        "window=1,2,linear,3",
        "window=nan,5",
        "window=1,0.5,linear",
        "window=1,0,sigmoid",
        "quality=101",
        "quality=1.5",
    ],
)
def test_what_is_no_viewport_window_or_quality_is_refused(web: WebServer, paths: list[Path], query: str) -> None:
    assert web.get(f"{path_of(paths[0])}/rendered?{query}").status_code == 400
