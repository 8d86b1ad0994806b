"""QIDO-RS and WADO-RS over what the node holds: answers compared with what was stored, and with a real Orthanc's."""

import json
import socket
from collections.abc import Callable, Iterator
from email import message_from_bytes
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from node.config import Config
from node.index import Index
from node.web import qido
from node.web.settings import TrustedProxy, WebConfig
from tests.factories import make_ct_series
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.waiting import WAIT_S
from tests.web_server import WebServer, found_in, hold

INSTANCES = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'


def _study(number: int) -> Callable[[int, Dataset], None]:
    """Patient and Study attributes of a made-up Study."""

    def edit(_i: int, ds: Dataset) -> None:
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = ["Müller^Eva", "Doe^Jane", "Smith_x^Bob"][number]
        ds.PatientID, ds.AccessionNumber = f"P-{number}", f"ACC{number}"
        ds.StudyDate, ds.StudyTime = f"2026010{number + 1}", f"1{number}3000"
        ds.StudyDescription, ds.SeriesDescription, ds.SeriesNumber = "Neck", f"bone {number}", number + 2
        ds.ReferringPhysicianName, ds.StudyID, ds.PatientBirthDate, ds.PatientSex = "Ref^A", "S1", "19700101", "F"

    return edit


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """A node that holds three Studies of six slices, each in a transfer syntax of its own; nothing here changes it."""
    index = Index(tmp_path_factory.mktemp("held"))
    for number, syntax in enumerate((ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless)):
        folder = index.data_dir / "instances" / str(number)
        hold(index, make_ct_series(folder, num_slices=6, edit=_study(number), transfer_syntax_uid=syntax))
    yield index
    index.close()


@pytest.fixture(scope="module")
def paths(held: Index) -> list[Path]:
    return sorted(held.data_dir.glob("instances/*/*.dcm"))


@pytest.fixture(scope="module")
def web(held: Index) -> Iterator[WebServer]:
    server = WebServer(Config(), held)
    yield server
    server.stop()


def values(answer: list[dict[str, Any]], tag: str) -> list[Any]:
    return [item[tag]["Value"][0] for item in answer]


def uids_of(path: Path) -> tuple[str, str, str]:
    ds = dcmread(path, stop_before_pixels=True)
    return ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID


def path_of(path: Path, depth: int = 3) -> str:
    names = ("studies", "series", "instances")
    return "".join(f"/{name}/{uid}" for name, uid in zip(names[:depth], uids_of(path), strict=False))


def parts(response: Any) -> list[tuple[str, bytes]]:
    """Content type and bytes of each part, as Python's own reader of e-mail sees them."""
    head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
    message = message_from_bytes(head + response.content)
    assert message.is_multipart()
    return [(part["Content-Type"], part.get_payload(decode=True)) for part in message.get_payload()]  # type: ignore[union-attr]


# ---- QIDO-RS ----


@pytest.mark.parametrize(
    ("query", "patients"),
    [
        ("", ["P-2", "P-1", "P-0"]),  # the latest first
        ("?PatientID=P-1", ["P-1"]),
        ("?00100020=P-1", ["P-1"]),
        ("?PatientID=P-*", ["P-2", "P-1", "P-0"]),
        ("?PatientID=P_1", []),
        ("?PatientID=p-*", []),  # only names are matched whatever the case
        ("?StudyDescription=N?ck*", ["P-2", "P-1", "P-0"]),
        ("?StudyDescription=[N]*", []),
        ("?PatientID=P-?", ["P-2", "P-1", "P-0"]),
        ("?PatientID=", ["P-2", "P-1", "P-0"]),
        ("?PatientName=doe^jane", ["P-1"]),
        ("?PatientName=D*", ["P-1"]),
        ("?PatientName=*_x*", ["P-2"]),
        ("?PatientName=Müller*", ["P-0"]),
        ("?StudyDate=20260102", ["P-1"]),
        ("?StudyDate=20260102-", ["P-2", "P-1"]),
        ("?StudyDate=-20260102", ["P-1", "P-0"]),
        ("?StudyDate=20260102-20260102", ["P-1"]),
        ("?StudyTime=11-12", ["P-2", "P-1"]),
        ("?AccessionNumber=ACC0&PatientID=P-0", ["P-0"]),
        ("?AccessionNumber=ACC0&PatientID=P-1", []),
        ("?ModalitiesInStudy=CT", ["P-2", "P-1", "P-0"]),
        ("?ModalitiesInStudy=MR", []),
        ("?ModalitiesInStudy=MR,CT", ["P-2", "P-1", "P-0"]),  # so OHIF asks for more than one
        ("?ModalitiesInStudy=MR%5CSR", []),
        ("?ModalitiesInStudy=,", []),
        ("?limit=2", ["P-2", "P-1"]),
        ("?limit=2&offset=2", ["P-0"]),
        ("?limit=0", []),
    ],
)
def test_studies_are_found_by_what_is_asked(web: WebServer, query: str, patients: list[str]) -> None:
    answer = web.get(f"/studies{query}")
    assert values(found_in(answer), "00100020") == patients
    assert answer.headers.get("Content-Type") == ("application/dicom+json" if patients else None)


def test_a_study_says_what_is_in_it(web: WebServer, paths: list[Path]) -> None:
    (study,) = web.get("/studies?PatientID=P-0").json()
    assert study["00201206"]["Value"] == [1]
    assert study["00201208"]["Value"] == [6]
    assert study["00080061"]["Value"] == ["CT"]
    assert study["00081190"]["Value"] == [web.url + path_of(paths[0], 1)]
    assert study["00100010"]["Value"] == [{"Alphabetic": "Müller^Eva"}]


@pytest.mark.parametrize(
    ("headers", "authority"),
    [
        ({"Host": "localhost"}, "localhost:{port}"),
        ({"Host": "[::1]"}, "[::1]:{port}"),
        ({"Host": "localhost:1234"}, "localhost:1234"),  # as through a tunnel
        ({"Host": "localhost", "X-Forwarded-For": "192.0.2.1"}, "localhost"),  # a proxy at port 80
    ],
)
def test_addresses_in_answers_are_those_by_which_the_node_was_called(
    web: WebServer, headers: dict[str, str], authority: str
) -> None:
    (study,) = requests.get(f"{web.url}/studies?PatientID=P-0", headers=headers, timeout=20).json()
    root = f"http://{authority.format(port=web.port)}/dicom-web"
    assert study["00081190"]["Value"] == [f"{root}/studies/{study['0020000D']['Value'][0]}"]


def test_behind_a_trusted_proxy_its_name_is_the_whole_address(held: Index) -> None:
    server = WebServer(Config(web=WebConfig(trusted_proxy=TrustedProxy(addresses=("127.0.0.1",)))), held)
    headers = {"Host": "ct.example", "X-Remote-User": "eva"}
    (study,) = requests.get(f"{server.url}/studies?PatientID=P-0", headers=headers, timeout=20).json()
    server.stop()
    assert study["00081190"]["Value"][0].startswith("http://ct.example/dicom-web/")


def test_the_dicomweb_client_of_others_finds_where_answers_lead(web: WebServer, paths: list[Path]) -> None:
    """It leaves the port out of Host."""
    client = DICOMwebClient(web.url)
    (study,) = client.search_for_studies(search_filters={"PatientID": "P-0"})
    assert study["00081190"]["Value"] == [web.url + path_of(paths[0], 1)]
    metadata = client.retrieve_instance_metadata(*uids_of(paths[0]))
    assert client.retrieve_bulkdata(metadata["7FE00010"]["BulkDataURI"]) == [dcmread(paths[0]).PixelData]


def test_series_and_instances_of_a_study(web: WebServer, paths: list[Path]) -> None:
    (series,) = web.get(path_of(paths[0], 1) + "/series").json()
    assert series["0008103E"]["Value"] == ["bone 0"]
    assert series["00201209"]["Value"] == [6]
    instances = web.get(path_of(paths[0], 2) + "/instances").json()
    assert values(instances, "00200013") == [1, 2, 3, 4, 5, 6]
    assert values(instances, "00080018") == [uids_of(path)[2] for path in paths[:6]]
    assert len(web.get("/instances").json()) == 18
    assert len(web.get("/series?PatientID=P-1&Modality=CT").json()) == 1
    uids = f"{uids_of(paths[0])[2]},{uids_of(paths[7])[2]}"
    assert len(web.get(f"/instances?SOPInstanceUID={uids}").json()) == 2


def test_fields_that_are_not_kept_are_read_when_they_are_asked_for(web: WebServer, paths: list[Path]) -> None:
    query = path_of(paths[0], 2) + "/instances?includefield=SliceThickness,00280030&includefield=all"
    first = web.get(query).json()[0]
    assert first["00180050"]["Value"] == [1.0]
    assert first["00280030"]["Value"] == [0.75, 1.0]


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("?limit=-1", "limit"),
        ("?offset=many", "offset"),
        ("?KVP=120", "KVP cannot be matched"),
        ("?StudyDate=2026-01-01", "no range"),
        ("?includefield=Nonsense", "Nonsense"),
    ],
)
def test_a_query_that_cannot_be_answered_says_why(web: WebServer, query: str, why: str) -> None:
    answer = web.get(f"/studies{query}")
    assert answer.status_code == 400
    assert why in answer.json()["error"]


def test_fuzzy_matching_is_answered_literally_with_a_warning(web: WebServer) -> None:
    answer = web.get("/studies?fuzzymatching=true&PatientID=P-1")
    assert answer.headers["Warning"] == (
        '299 cspine: "The fuzzymatching parameter is not supported. Only literal matching has been performed."'
    )
    assert len(answer.json()) == 1


@pytest.mark.parametrize(
    ("query", "num_left"),
    [
        ("/instances?limit=5&offset=2", 11),
        ("/instances?limit=16&offset=2", 0),
        ("/studies?limit=2", 1),
        ("/series?limit=1&PatientID=P-1", 0),
        ("/studies?limit=2&offset=9", 0),
    ],
)
def test_who_gets_less_than_there_is_is_told_so(web: WebServer, query: str, num_left: int) -> None:
    warning = web.get(query).headers.get("Warning", "")
    assert warning == (f'299 cspine: "There are {num_left} additional results that can be requested"' * bool(num_left))


def test_who_names_no_limit_is_told_of_the_rest(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qido, "DEFAULT_LIMIT", 4)
    answer = web.get("/instances?fuzzymatching=true")
    assert len(answer.json()) == 4
    assert "fuzzymatching" in answer.headers["Warning"]
    assert "14 additional results" in answer.headers["Warning"]


def test_what_has_come_or_been_made_is_found_at_once(index: Index) -> None:
    ct = make_ct_series(index.data_dir / "instances" / "more", num_slices=3)
    server = WebServer(Config(), index)
    try:
        assert server.get(path_of(ct[0], 2)).status_code == 404
        hold(index, ct)
        assert len(server.get(path_of(ct[0], 2) + "/instances").json()) == 3
        study, series, _ = uids_of(ct[0])
        folder = index.data_dir / "cases" / series / "0123"
        (result,) = make_ct_series(folder, num_slices=1, study_instance_uid=study)
        case = index.case(series)
        assert case is not None
        index.queue(case)
        claimed = index.claim_next()
        assert claimed is not None
        assert index.finish(claimed, folder, summary="", sop_instance_uids=[uids_of(result)[2]], destinations=[])
        assert len(server.get(f"/studies/{study}/series").json()) == 2
        assert server.get(path_of(result), INSTANCES).status_code == 200
    finally:
        server.stop()


def test_answers_are_those_of_orthanc(web: WebServer, paths: list[Path], tmp_path: Path) -> None:
    """Attribute by attribute; ours may tell more."""
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    try:
        for path in paths:
            orthanc.client.upload_file(str(path))
        key = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}
        # Orthanc says where things are, and how it holds them, in its own way.
        apart = {"00081190", "00080005", "00081196"}
        for level in ("studies", "series", "instances"):
            for query in ("", "?PatientID=P-1", "?PatientName=*e*", "?StudyDate=20260102-20260103"):
                theirs = _by(orthanc.get_dicomweb(f"/{level}{query}"), key[level])
                ours = _by(found_in(web.get(f"/{level}{query}")), key[level])
                assert ours.keys() == theirs.keys(), query
                for uid, item in theirs.items():
                    expected = {tag: value for tag, value in item.items() if tag not in apart}
                    told = {tag: ours[uid].get(tag) for tag in expected}
                    assert told == expected, (level, query)
    finally:
        orthanc.stop()


def _by(answer: list[dict[str, Any]], tag: str) -> dict[str, dict[str, Any]]:
    return {item[tag]["Value"][0]: item for item in answer}


# ---- WADO-RS ----


def test_instances_stored_as_they_are_wanted_come_byte_for_byte(web: WebServer, paths: list[Path]) -> None:
    answer = web.get(path_of(paths[0], 2), INSTANCES)
    assert [data for _, data in parts(answer)] == [path.read_bytes() for path in paths[:6]]
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert {kind for kind, _ in parts(answer)} == {f"application/dicom; transfer-syntax={ExplicitVRLittleEndian}"}


@pytest.mark.parametrize("start", [6, 12])
def test_other_transfer_syntaxes_are_transcoded_unless_taken_as_stored(
    web: WebServer, paths: list[Path], start: int
) -> None:
    path = paths[start]
    (_, given), *_ = parts(web.get(path_of(path, 2), INSTANCES))
    ds, stored = dcmread(BytesIO(given)), dcmread(path)
    assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert ds.SOPInstanceUID == stored.SOPInstanceUID
    assert np.array_equal(ds.pixel_array, stored.pixel_array)
    as_stored = web.get(path_of(path, 2), INSTANCES + "; transfer-syntax=*")
    assert parts(as_stored)[0][1] == path.read_bytes()


def test_one_instance_can_come_without_multipart(web: WebServer, paths: list[Path]) -> None:
    answer = web.get(path_of(paths[0]), "application/dicom")
    assert answer.headers["Content-Type"] == "application/dicom"
    assert answer.content == paths[0].read_bytes()


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("", 200),
        ("*/*", 200),
        (INSTANCES + "; transfer-syntax=" + RLELossless, 406),
        ("text/html", 406),
        ("text/html, " + INSTANCES + ";q=0.5", 200),
        (INSTANCES + ";q=0", 406),
        ("multipart/related; type=application/dicom; transfer-syntax=*", 200),
        ('multipart/related; type="image/jpeg"', 406),
    ],
)
def test_what_is_accepted_decides(web: WebServer, paths: list[Path], accept: str, status: int) -> None:
    assert web.get(path_of(paths[0], 2), accept).status_code == status


def test_headers_that_come_twice_are_one_list(web: WebServer) -> None:
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT_S) as client:
        accepts = "Accept: text/html\r\nAccept: application/dicom+json"
        client.sendall(f"GET /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\n{accepts}\r\n\r\n".encode())
        assert client.recv(1024).startswith(b"HTTP/1.1 200")


def test_metadata_is_the_dataset_without_its_pixels(web: WebServer, paths: list[Path]) -> None:
    told = web.get(path_of(paths[0], 2) + "/metadata").json()
    assert len(told) == 6
    pixels = told[0].pop("7FE00010")
    ds = dcmread(paths[0])
    assert web.get(pixels["BulkDataURI"].removeprefix(web.url), "application/octet-stream").content == ds.PixelData
    del ds.PixelData
    assert Dataset.from_json(told[0]) == Dataset.from_json(ds.to_json_dict())


def test_frames_are_pixels_or_what_was_compressed(web: WebServer, paths: list[Path]) -> None:
    ds = dcmread(paths[12])
    ((kind, pixels),) = parts(web.get(path_of(paths[12]) + "/frames/1", OCTETS))
    assert np.array_equal(np.frombuffer(pixels, "<u2").reshape(ds.Rows, ds.Columns), ds.pixel_array)
    assert kind.endswith(ExplicitVRLittleEndian)
    ((kind, compressed),) = parts(web.get(path_of(paths[12]) + "/frames/1", OCTETS + "; transfer-syntax=*"))
    assert kind.endswith(JPEGLSLossless)
    assert compressed.rstrip(b"\0") in ds.PixelData
    ((kind, same),) = parts(web.get(path_of(paths[12]) + "/frames/1", 'multipart/related; type="image/jls"'))
    assert (kind.split(";")[0], same) == ("image/jls", compressed)


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg"])
def test_a_rendered_slice_is_a_windowed_picture(web: WebServer, paths: list[Path], media_type: str) -> None:
    answer = web.get(path_of(paths[0]) + "/rendered?window=300,600", media_type)
    assert answer.headers["Content-Type"] == media_type
    picture = np.asarray(Image.open(BytesIO(answer.content)), float)
    ds = dcmread(paths[0])
    hu = ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept
    expected = np.asarray(
        Image.fromarray(np.rint(np.clip((hu - 299.5) / 599 + 0.5, 0, 1) * 255).astype(np.uint8)).resize(
            picture.shape[::-1]
        ),
        float,
    )
    assert np.abs(picture - expected).mean() < 6


@pytest.mark.parametrize("path", ["/", "/dicom-web/studies", "/dicom-web{study}", "/dicom-web{series}/metadata", "/x"])
def test_head_is_answered_as_get_without_the_body(web: WebServer, paths: list[Path], path: str) -> None:
    url = web.root + path.format(study=path_of(paths[0], 1), series=path_of(paths[0], 2))
    with requests.Session() as session:
        head, get = session.head(url, timeout=20), session.get(url, timeout=20)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers.keys() == get.headers.keys()
    assert head.headers["Content-Length"] == get.headers["Content-Length"]


@pytest.mark.parametrize("path", ["//studies", "/studies/", "/{study}/series//", "{study}/", "{series}/instances/"])
def test_a_slash_too_many_changes_nothing(web: WebServer, paths: list[Path], path: str) -> None:
    path = path.format(study=path_of(paths[0], 1), series=path_of(paths[0], 2))
    meant = "/" + "/".join(filter(None, path.split("/")))
    kept, wanted = web.get(path), web.get(meant)
    assert (kept.status_code, kept.headers["Content-Length"]) == (200, wanted.headers["Content-Length"])
    asked = requests.post(f"{web.url}/studies/", data=b"--x--", timeout=WAIT_S)
    assert "multipart/related is needed" in asked.text
    for removed in (path_of(paths[0], 1) + "/", path_of(paths[0], 1) + "//series"):
        assert requests.delete(web.url + removed, timeout=WAIT_S).status_code == 405


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/studies", "GET, HEAD, POST"),
        ("/series", "GET, HEAD"),
        ("{study}", "GET, HEAD, POST, DELETE"),
        ("{series}", "GET, HEAD, DELETE"),
        ("{instance}", "GET, HEAD"),
    ],
)
def test_an_address_says_what_can_be_done_there(web: WebServer, paths: list[Path], path: str, methods: str) -> None:
    names = {name: path_of(paths[0], depth) for depth, name in enumerate(("study", "series", "instance"), start=1)}
    url = web.url + path.format(**names)
    for method, status in (("OPTIONS", 204), ("PUT", 405)):
        answer = requests.request(method, url, timeout=WAIT_S)
        assert (answer.status_code, answer.headers["Allow"]) == (status, f"OPTIONS, {methods}")


def test_thumbnails_are_small(web: WebServer, paths: list[Path]) -> None:
    for depth in (1, 2, 3):
        answer = web.get(path_of(paths[0], depth) + "/thumbnail")
        assert max(Image.open(BytesIO(answer.content)).size) <= 128
    small = web.get(path_of(paths[0]) + "/rendered?viewport=10,10", "image/png")
    assert max(Image.open(BytesIO(small.content)).size) == 10


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/studies/1.2.3", 404),
        ("/studies/1.2.3/metadata", 404),
        ("/studies/..%2f..%2fetc", 404),
        ("/studies/1.2.3%0d%0aX-Injected:1", 404),
        ("{instance}/frames/2", 404),
        ("{instance}/frames/0", 404),
        ("{instance}/frames/one", 400),
        ("{instance}/frames/99999999999", 400),
        ("{instance}/frames/1,1", 400),
        ("{instance}/frames/1,01/rendered", 400),
        ("{instance}/bulkdata/00100010", 404),
        ("{instance}/bulkdata/..%2f..", 404),
        ("{instance}/rendered?window=1", 400),
        ("{instance}/rendered?window=nan,nan", 400),
        ("{instance}/rendered?viewport=9999,1", 400),
        ("{instance}/rendered?quality=0", 400),
        ("{instance}/rendered?annotation=", 400),
        ("{instance}/rendered?annotation=patient,nurse", 400),
        ("{instance}/thumbnail?viewport=64,64,1,1,9,9", 400),
        ("/nothing", 404),
    ],
)
def test_what_is_not_there_or_not_understood_says_so(web: WebServer, paths: list[Path], path: str, status: int) -> None:
    answer = web.get(path.format(instance=path_of(paths[0])))
    assert answer.status_code == status
    assert "X-Injected" not in answer.headers
    assert "Traceback" not in answer.text


def test_the_dicomweb_client_of_others_works(web: WebServer, paths: list[Path]) -> None:
    client = DICOMwebClient(web.url)
    study, series, instance = uids_of(paths[0])
    assert len(client.search_for_studies(search_filters={"PatientID": "P-0"})) == 1
    assert len(client.retrieve_series(study, series)) == 6
    assert len(client.retrieve_series_metadata(study, series)) == 6
    ds = client.retrieve_instance(study, series, instance)
    assert ds.pixel_array.tobytes() == dcmread(paths[0]).pixel_array.tobytes()
    (frame,) = client.retrieve_instance_frames(study, series, instance, [1])
    assert frame == dcmread(paths[0]).PixelData
    assert client.retrieve_instance_rendered(study, series, instance, media_types=("image/png",))
    assert json.dumps(client.search_for_instances(study, series))
