"""DICOMweb over Instances that are not as most are: names in three scripts, values that are none, Enhanced CT."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.encaps import generate_frames
from pydicom.tag import BaseTag
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from node.config import Config
from node.index import Index
from node.web import viewer
from tests.factories import make_ct_series, make_enhanced_ct, make_report
from tests.node.test_web import OCTETS, parts, path_of, uids_of, values
from tests.transfer_syntaxes import convert
from tests.web_server import WebServer, found_in, hold


@pytest.mark.parametrize(
    ("query", "is_found"),
    [
        ("PatientName=yamada^tarou", True),
        ("PatientName=山田*", True),
        ("PatientName=山田^太郎", True),
        ("PatientName=やまだ^?ろう", True),
        ("PatientName=Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("PatientName=太郎*", False),
        ("PatientName=Yamada", False),
        ("StudyDescription=HWS%5Cnativ", True),
        ("StudyDescription=HWS", False),
        ("StudyID=[1]%25_!*", True),
        ("StudyID=*[1]?_!*", True),
        ("StudyID=?1]*", True),
        ("StudyID=[1*", True),
        ("StudyID=[[]*", False),
    ],
)
def test_a_name_is_found_by_each_of_its_groups_and_a_text_by_all_of_it(
    japanese: WebServer, query: str, is_found: bool
) -> None:
    assert len(found_in(japanese.get(f"/studies?{query}"))) == is_found


NAMES = {
    "A": "Doe^Jane^^^",
    "B": "Doe^Jane",
    "C": "Doe^^^^",
    "D": "Roe^Eva^^^=山田^花^^= ",
    "E": "^^^^",
    "F": "Doe^^^Dr",
}


@pytest.mark.parametrize(
    ("name", "patients"),
    [
        ("Doe^Jane", "AB"),
        ("doe^jane^", "AB"),
        ("Doe^Jane^^^==", "AB"),
        ("Doe^Jane^*", "AB"),
        ("Doe^*^*", "ABCF"),
        ("Do?^J*", "AB"),
        ("Doe", "C"),
        ("Doe^", "C"),
        ("Doe^^^D*", "F"),
        ("Doe^^^*", "CF"),
        ("山田^花", "D"),
        ("山田^花^*", "D"),
        ("山田^花^^^", "D"),
        ("Roe^Eva=山田^花", "D"),
        ("Roe^Eva^^=山田^*", "D"),
        ("Jane^*", ""),
        ("^Jane", ""),
        ("^^", "ABCDEF"),  # no value: it asks nothing
        ("=", "ABCDEF"),
        ("%22%22&emptyvaluematching=true", "E"),
    ],
)
def test_delimiters_at_the_end_of_a_name_do_not_count(named: WebServer, name: str, patients: str) -> None:
    found = found_in(named.get(f"/studies?PatientName={name}"))
    assert "".join(sorted(values(found, "00100020"))) == patients


def test_a_name_is_returned_as_it_stands_in_the_file(named: WebServer) -> None:
    (found,) = named.get("/studies?PatientID=A").json()
    assert found["00100010"]["Value"] == [{"Alphabetic": "Doe^Jane^^^"}]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """Holds a Study of each of `NAMES`."""
    index = Index(tmp_path_factory.mktemp("named"))
    for patient, name in NAMES.items():

        def edit(_i: int, ds: Dataset, patient: str = patient, name: str = name) -> None:
            ds.SpecificCharacterSet = "ISO_IR 192"
            ds.PatientID, ds.PatientName = patient, name

        hold(index, make_ct_series(index.data_dir / "instances" / patient, num_slices=1, edit=edit))
    server = WebServer(Config(), index)
    yield server
    server.stop()
    index.close()


@pytest.mark.parametrize("path", ["/%00", "/" + 300 * "a", "/..%2fconfig.yaml", "/%2fetc%2fpasswd"])
def test_what_can_be_no_file_of_the_viewer_is_not_there(
    japanese: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "viewer").mkdir()
    (tmp_path / "viewer/index.html").write_text("OHIF")
    (tmp_path / "config.yaml").write_text("secret")
    monkeypatch.setattr(viewer, "PLACES", (tmp_path / "viewer",))
    assert requests.get(japanese.root + path, timeout=20).status_code == 404
    assert requests.get(f"{japanese.root}/viewer{path}", timeout=20).text == "OHIF"


def test_a_browser_that_has_a_file_of_the_viewer_is_not_sent_it_again(
    japanese: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "app.js"
    script.write_text("old")
    (tmp_path / "index.html").write_text("OHIF")
    monkeypatch.setattr(viewer, "PLACES", (tmp_path,))

    def ask(known: str = "") -> requests.Response:
        return requests.get(f"{japanese.root}/app.js", headers={"If-None-Match": known}, timeout=20)

    tag = ask().headers["ETag"]
    for known in (tag, f'"other", W/{tag}'):
        answer = ask(known)
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tag)
    assert ask('"other"').text == "old"
    script.write_text("newer")
    answer = ask(tag)
    assert (answer.status_code, answer.text) == (200, "newer")


@pytest.fixture(scope="module")
def japanese(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """Holds one Study with a name in three scripts, a backslash in its description, and an ID full of wildcards."""

    def edit(_i: int, ds: Dataset) -> None:
        ds.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        ds.PatientName, ds.StudyDescription = "Yamada^Tarou=山田^太郎=やまだ^たろう", "HWS\\nativ"
        ds.StudyID = "[1]%_!x"

    index = Index(tmp_path_factory.mktemp("japanese"))
    hold(index, make_ct_series(index.data_dir / "instances", num_slices=1, edit=edit))
    server = WebServer(Config(), index)
    yield server
    server.stop()
    index.close()


def _make_odd(path: Path) -> None:
    """What scanners and archives do write: a decimal comma, text for a number, no number at all."""
    ds = dcmread(path)
    ds.add_new("SingleCollimationWidth", "FD", float("nan"))
    for tag, vr, value in (
        (0x00180060, "DS", b"12,5"),
        (0x00181151, "IS", b"high"),
        (0x00280106, "US", b"\1\0\2\0"),
        (0x00281050, "DS", b"bone"),
        (0x00081140, "SQ", b"\1\2\3\4\5\6"),
    ):
        ds._dict[BaseTag(tag)] = RawDataElement(BaseTag(tag), vr, len(value), value, 0, False, True)
    item = Dataset()
    item.CodeMeaning = "Neck"
    item._dict[BaseTag(0x00180060)] = ds._dict[BaseTag(0x00180060)]
    ds.ProcedureCodeSequence = [item]
    ds.save_as(path)


@pytest.mark.filterwarnings("ignore")  # of pydicom; the service switches them off
def test_a_value_that_cannot_be_read_hides_nothing_else(index: Index) -> None:
    paths = make_ct_series(index.data_dir / "instances" / "odd", num_slices=2)
    _make_odd(paths[0])
    hold(index, paths)
    server = WebServer(Config(), index)
    try:
        answer = server.get(path_of(paths[0], 2) + "/metadata")
        assert answer.status_code == 200
        told = json.loads(answer.text, parse_constant=pytest.fail)[0]  # NaN is no JSON
        assert told["00080018"]["Value"] == [uids_of(paths[0])[2]]
        assert told["00189306"] == {"vr": "FD"}
        assert [told[tag] for tag in ("00180060", "00181151", "00081140")] == [{"vr": v} for v in ("DS", "IS", "SQ")]
        assert told["00081032"]["Value"][0]["00080104"]["Value"] == ["Neck"]
        found = server.get(path_of(paths[0], 2) + "/instances?includefield=KVP,SliceThickness,SingleCollimationWidth")
        first = json.loads(found.text, parse_constant=pytest.fail)[0]
        assert first["00180050"]["Value"] == [1.0]
        assert first["00180060"] == {"vr": "DS"}
        assert server.get(path_of(paths[0]) + "/rendered", "image/png").status_code == 200
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "shown"), [("0", 200), (["1", "2"], 406)])
def test_a_number_of_frames_that_is_none_counts_as_one(index: Index, number: str | list[str], shown: int) -> None:
    def edit(_i: int, ds: Dataset) -> None:
        ds.NumberOfFrames = number  # type: ignore[assignment]

    paths = make_ct_series(index.data_dir / "instances" / "frames", num_slices=2, edit=edit)
    hold(index, paths)
    server = WebServer(Config(), index)
    try:
        assert server.get(path_of(paths[0], 1)).status_code == 200
        assert server.get(path_of(paths[0]) + "/frames/1").status_code == 200
        assert server.get(path_of(paths[0]) + "/thumbnail").status_code == shown
        pngs = 'multipart/related; type="image/png"'
        assert server.get(path_of(paths[0], 2) + "/rendered", pngs).status_code == shown
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")
def test_numbers_dates_and_times_are_found_however_they_are_written(index: Index) -> None:
    def edit(i: int, ds: Dataset) -> None:
        ds.SeriesNumber, ds.InstanceNumber = "03", f"{i + 1:04d}"
        ds.StudyDate, ds.StudyTime = "1992.01.02", "10:30:00"

    hold(index, make_ct_series(index.data_dir / "instances" / "old", num_slices=3, edit=edit))
    server = WebServer(Config(), index)
    try:
        for query, count in (
            ("SeriesNumber=3", 3),
            ("SeriesNumber=003", 3),
            ("SeriesNumber=30", 0),
            ("InstanceNumber=1", 1),
            ("InstanceNumber=0002", 1),
            ("StudyDate=19920102&StudyTime=103000", 3),
            ("StudyDate=19920101-19920103&StudyTime=11-12", 3),
            ("StudyDate=19920102-19920103&StudyTime=11-12", 0),
            ("StudyTime=1000-1030", 3),
        ):
            assert len(found_in(server.get(f"/instances?{query}"))) == count, query
    finally:
        server.stop()


def test_an_instance_that_lacks_sop_class_and_modality_is_told_as_it_was_taken(index: Index) -> None:
    """The Instances of RSNA 2022 are like that; no viewer shows what is of no class."""
    paths = make_ct_series(index.data_dir / "instances" / "bare", num_slices=3)
    for path in paths:
        ds = dcmread(path)
        del ds.SOPClassUID, ds.Modality
        ds.save_as(path)
    hold(index, paths)
    server = WebServer(Config(), index)
    try:
        (study,) = server.get("/studies?ModalitiesInStudy=CT&includefield=00080060").json()
        assert study["00080060"]["Value"] == study["00080061"]["Value"] == ["CT"]
        (series,) = server.get(path_of(paths[0], 1) + "/series").json()
        assert series["00080060"]["Value"] == ["CT"]
        for told in ("/instances", "/metadata"):
            assert values(server.get(path_of(paths[0], 2) + told).json(), "00080016") == [CTImageStorage] * 3
    finally:
        server.stop()


def test_a_rendered_frame_of_enhanced_ct_is_windowed_in_its_own_hounsfield_units(index: Index) -> None:
    """Rescale, window and spacing stand in the functional groups; each frame has an intercept of its own here."""
    path = make_enhanced_ct(index.data_dir / "enhanced.dcm", num_frames=4)
    ds = dcmread(path)
    for item in ds.PerFrameFunctionalGroupsSequence:
        window = Dataset()
        window.WindowCenter, window.WindowWidth = [200, 40], [1000, 400]
        item.FrameVOILUTSequence = [window]
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1, 1]
    ds.save_as(path)
    hold(index, [path])
    server = WebServer(Config(), index)
    try:
        for number, item in enumerate(ds.PerFrameFunctionalGroupsSequence, start=1):
            hu = ds.pixel_array[number - 1] + float(item.PixelValueTransformationSequence[0].RescaleIntercept)
            for query, centre, width in (("", 200, 1000), ("?window=0,600", 0, 600)):
                answer = server.get(f"{path_of(path)}/frames/{number}/rendered{query}", "image/png")
                shown = np.asarray(Image.open(BytesIO(answer.content)), float)
                expected = np.clip((hu - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255
                assert np.abs(shown - expected).max() <= 1
    finally:
        server.stop()


def test_frames_of_what_has_no_pixels_are_not_there(index: Index) -> None:
    path = make_report(index.data_dir / "report.dcm")
    hold(index, [path])
    server = WebServer(Config(), index)
    try:
        answer = server.get(path_of(path) + "/frames/1")
        assert (answer.status_code, "no pixels" in answer.text) == (404, True)
        assert server.get(path_of(path) + "/bulkdata/7FE00010").status_code == 404
    finally:
        server.stop()


@pytest.mark.parametrize("syntax", [RLELossless, ExplicitVRBigEndian])
def test_pixels_as_bulk_data_are_decoded_little_endian_and_named_so(index: Index, syntax: str) -> None:
    (path,) = make_ct_series(index.data_dir / "instances", num_slices=1)
    pixels = dcmread(path).PixelData
    convert(path, syntax)
    hold(index, [path])
    server = WebServer(Config(), index)
    try:
        url = path_of(path) + "/bulkdata/7FE00010"
        single = server.get(url, "application/octet-stream")
        assert single.headers["Content-Type"] == f"application/octet-stream; transfer-syntax={ExplicitVRLittleEndian}"
        assert single.content == pixels
        assert parts(server.get(url)) == [(single.headers["Content-Type"], pixels)]
        assert server.get(url, f"application/octet-stream; transfer-syntax={RLELossless}").status_code == 406
    finally:
        server.stop()


@pytest.mark.parametrize(("syntax", "kind"), [(RLELossless, "image/dicom-rle"), (JPEGLSLossless, "image/jls")])
def test_compressed_pixels_as_bulk_data_come_frame_by_frame_or_decoded_as_one_value(
    index: Index, syntax: str, kind: str
) -> None:
    path = make_enhanced_ct(index.data_dir / "enhanced.dcm", num_frames=4)
    pixels = dcmread(path).PixelData
    convert(path, syntax)
    hold(index, [path])
    server = WebServer(Config(), index)
    try:
        url = path_of(path) + "/bulkdata/7FE00010"
        assert [data for _, data in parts(server.get(url, OCTETS))] == [pixels]
        stored = list(generate_frames(dcmread(path).PixelData, number_of_frames=4))
        for accept, told in (
            (OCTETS + "; transfer-syntax=*", "application/octet-stream"),
            (f'multipart/related; type="{kind}"', kind),
        ):
            assert parts(server.get(url, accept)) == [(f"{told}; transfer-syntax={syntax}", frame) for frame in stored]
    finally:
        server.stop()
