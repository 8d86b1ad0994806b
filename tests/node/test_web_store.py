"""STOW-RS: what is acknowledged is on disk and in the index; what is not leaves nothing behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom import Dataset, dcmread
from pydicom.uid import JPEGLSLossless, generate_uid

from node.case import CaseState
from node.config import Config
from node.index import Index
from node.web.multipart import end_of, part_head
from node.web.settings import WebConfig
from tests.factories import make_ct_series, make_report
from tests.waiting import WAIT_S, wait_until
from tests.web_server import WebServer

KIND = 'multipart/related; type="application/dicom"; boundary=xx'


@pytest.fixture
def serve(make_config: Callable[..., Config], index: Index) -> Iterator[Callable[..., WebServer]]:
    servers: list[WebServer] = []

    def start(**settings: object) -> WebServer:
        config = make_config().model_copy(update={"web": WebConfig(**settings)})
        servers.append(WebServer(config, index))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def web(serve: Callable[..., WebServer]) -> WebServer:
    return serve()


def body_of(parts: list[bytes]) -> bytes:
    return b"".join(part_head("xx", "application/dicom") + part for part in parts) + end_of("xx")


def stow(web: WebServer, parts: list[bytes], path: str = "/studies", **headers: str) -> requests.Response:
    more = {"Content-Type": KIND} | {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(web.url + path, data=body_of(parts), headers=more, timeout=WAIT_S)


def head_of(num_bytes: int) -> bytes:
    """The head of a request that announces a body of this size."""
    lines = (
        "POST /dicom-web/studies HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {KIND}",
        f"Content-Length: {num_bytes}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def read(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def items(answer: requests.Response, tag: str) -> list[dict[str, Any]]:
    return answer.json().get(tag, {}).get("Value", [])  # type: ignore[no-any-return]


def files(index: Index) -> list[Path]:
    """Instances on disk, without those that are made ahead."""
    return [path for path in index.data_dir.glob("instances/**/*.dcm") if path.stat().st_size]


def ends(index: Index) -> list[bool | None]:
    """How the requests that carried the one Series ended: whole, broken, or None while one runs."""
    (case,) = index.cases()
    carriers = index.stored_series(case.series_instance_uid).carriers
    return [carrier.released if carrier.ended_at else None for carrier in carriers]


def test_what_is_acknowledged_is_stored_as_it_came(web: WebServer, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=20)
    answer = stow(web, read(paths))
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/dicom+json"
    sent = {dcmread(path).SOPInstanceUID for path in paths}
    assert {item["00081155"]["Value"][0] for item in items(answer, "00081199")} == sent
    (case,) = index.cases()
    assert (case.num_instances, case.calling_ae_title, case.state) == (20, "STOW-RS", CaseState.RECEIVING)
    stored = [dcmread(path) for path in index.instance_paths(case.series_instance_uid)]
    assert len(stored) == 20
    for path in paths:
        ds = dcmread(path)
        (same,) = [other for other in stored if other.SOPInstanceUID == ds.SOPInstanceUID]
        assert same == ds
        assert same.file_meta.TransferSyntaxUID == ds.file_meta.TransferSyntaxUID
    item = items(answer, "00081199")[0]
    again = requests.get(item["00081190"]["Value"][0], headers={"Accept": "application/dicom"}, timeout=WAIT_S)
    assert dcmread(BytesIO(again.content)).SOPInstanceUID == item["00081155"]["Value"][0]


def test_a_request_that_ended_counts_as_a_released_association(web: WebServer, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=3)
    stow(web, read(paths))
    assert ends(index) == [True]


def test_the_same_again_is_taken_and_changes_nothing(web: WebServer, index: Index, tmp_path: Path) -> None:
    parts = read(make_ct_series(tmp_path / "in", num_slices=3, transfer_syntax_uid=JPEGLSLossless))
    assert stow(web, parts).status_code == stow(web, parts).status_code == 200
    assert stow(web, [parts[0], parts[0]]).status_code == 200
    assert index.cases()[0].num_instances == 3
    assert len(files(index)) == 3


def test_what_cannot_be_taken_is_named_and_the_rest_is_stored(web: WebServer, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=2)
    report = make_report(tmp_path / "report.dcm")
    good, other = read(paths)
    answer = stow(web, [good, b"not DICOM at all", report.read_bytes(), other[: len(other) // 2], b""])
    assert answer.status_code == 202
    assert len(items(answer, "00081199")) == 1
    failed = {item["00081155"]["Value"][0]: item["00081197"]["Value"][0] for item in items(answer, "00081198")}
    assert failed[dcmread(report).SOPInstanceUID] in (0xA900, 0x0122)
    assert failed[dcmread(paths[1]).SOPInstanceUID] == 0xC000
    assert len(failed) == len(items(answer, "00081198")) == 2
    assert [item["00081197"]["Value"][0] for item in items(answer, "0008119A")] == [0xC000] * 2  # name no Instance
    assert len(files(index)) == 1
    assert ends(index) == [False]  # not all has come, and the result will say so


def test_nothing_taken_is_a_conflict(web: WebServer, index: Index) -> None:
    answer = stow(web, [b"nothing"])
    assert answer.status_code == 409
    assert files(index) == []


def test_a_full_disk_asks_to_come_back(web: WebServer, index: Index, tmp_path: Path) -> None:
    web.store._min_free_mb = 10**9
    parts = read(make_ct_series(tmp_path / "in", num_slices=2))
    answer = stow(web, [*parts, b"nothing"])
    assert answer.status_code == 503
    assert [item["00081197"]["Value"][0] for item in items(answer, "00081198")].count(0xA700) == 2
    web.store._min_free_mb = 0
    assert stow(web, parts).status_code == 200


def test_another_instance_with_a_known_uid_is_refused(web: WebServer, index: Index, tmp_path: Path) -> None:
    (path,) = make_ct_series(tmp_path / "in", num_slices=1)
    assert stow(web, [path.read_bytes()]).status_code == 200
    ds = dcmread(path)
    ds.KVP = "80"
    ds.save_as(path)
    answer = stow(web, [path.read_bytes()])
    assert answer.status_code == 409
    assert items(answer, "00081198")[0]["00081197"]["Value"] == [0xC111]
    (case,) = index.cases()
    assert (case.num_conflicts, case.last_conflict_from) == (1, "STOW-RS")


def test_an_address_that_names_a_study_takes_no_other(web: WebServer, index: Index, tmp_path: Path) -> None:
    (path,) = make_ct_series(tmp_path / "in", num_slices=1)
    assert stow(web, [path.read_bytes()], f"/studies/{generate_uid()}").status_code == 409
    assert files(index) == []
    assert stow(web, [path.read_bytes()], f"/studies/{dcmread(path).StudyInstanceUID}").status_code == 200


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/dicom", b"x", 415),
        ("multipart/related; type=application/dicom", b"x", 400),
        (KIND, b"", 400),
        (KIND, b"--yy\r\n\r\nx\r\n--yy--", 400),
        (KIND, body_of([b"x"])[:-6], 400),
        ('multipart/related; type="application/dicom+json"; boundary=xx', body_of([b"x"]), 415),
        (KIND, b"--xx\r\nno colon\r\n\r\nx\r\n--xx--", 400),
    ],
)
def test_a_body_that_is_broken_is_refused(
    web: WebServer, index: Index, content_type: str, body: bytes, status: int
) -> None:
    answer = requests.post(f"{web.url}/studies", data=body, headers={"Content-Type": content_type}, timeout=WAIT_S)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert files(index) == []


def test_what_was_stored_before_a_body_broke_is_named_in_the_refusal(
    web: WebServer, index: Index, tmp_path: Path
) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=2)
    body = body_of(read(paths))
    answer = requests.post(f"{web.url}/studies", data=body[:-4], headers={"Content-Type": KIND}, timeout=20)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/dicom+json"
    assert "before its last boundary" in answer.headers["Warning"]
    named = {item["00081155"]["Value"][0] for item in items(answer, "00081199")}
    assert named == {dcmread(path).SOPInstanceUID for path in paths}
    assert len(files(index)) == 2
    assert ends(index) == [False]


def test_an_answer_is_the_module_of_the_standard_and_nothing_else(web: WebServer, tmp_path: Path) -> None:
    """PS3.18 I.1: an Error Comment is of the command group and has no place in it."""
    paths = [*make_ct_series(tmp_path / "a", num_slices=2), make_report(tmp_path / "report.dcm")]
    study = dcmread(paths[0]).StudyInstanceUID
    one = stow(web, [*read(paths), b"nothing"]).json()
    assert one["00081190"] == {"vr": "UR", "Value": [f"{web.url}/studies/{study}"]}
    assert one.keys() == {"00081190", "00081198", "00081199", "0008119A"}
    assert one["00081198"]["Value"][0].keys() == {"00081150", "00081155", "00081197"}
    assert one["0008119A"]["Value"][0].keys() == {"00081197"}
    two = read([paths[0], *make_ct_series(tmp_path / "b", num_slices=1)])
    assert stow(web, two).json()["00081190"] == {"vr": "UR"}
    assert stow(web, [b"nothing"]).json()["00081190"] == {"vr": "UR"}


def test_only_what_can_be_understood_and_answered_is_taken(web: WebServer, index: Index, tmp_path: Path) -> None:
    (part,) = read(make_ct_series(tmp_path / "in", num_slices=1))
    assert stow(web, [part], Accept="application/dicom+xml").status_code == 406
    assert stow(web, [part], Content_Encoding="gzip").status_code == 415
    other = part_head("xx", "application/dicom+json") + part
    headers = {"Content-Type": KIND}
    answer = requests.post(f"{web.url}/studies", data=other + end_of("xx"), headers=headers, timeout=20)
    assert (answer.status_code, len(items(answer, "0008119A"))) == (415, 1)
    assert files(index) == []
    answer = requests.post(f"{web.url}/studies", data=other + body_of([part]), headers=headers, timeout=20)
    assert (answer.status_code, len(items(answer, "0008119A")), len(items(answer, "00081199"))) == (202, 1, 1)
    assert stow(web, [part], Content_Encoding="identity", Accept="application/json").status_code == 200


def test_a_request_that_is_too_large_is_refused_before_it_is_read(
    serve: Callable[..., WebServer], index: Index
) -> None:
    web = serve(max_body_mb=1)
    with socket.create_connection(("127.0.0.1", web.port), WAIT_S) as client:
        client.sendall(head_of(10**10))
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    # Without a length, it is noticed when it comes.
    pieces = iter([part_head("xx", "application/dicom"), *[bytes(1 << 18)] * 8])
    answer = requests.post(f"{web.url}/studies", data=pieces, headers={"Content-Type": KIND}, timeout=WAIT_S)
    assert answer.status_code == 413
    assert files(index) == []


def test_too_many_parts_are_refused(serve: Callable[..., WebServer], index: Index) -> None:
    answer = stow(serve(max_parts=2), [b"a", b"b", b"c"])
    assert answer.status_code == 413
    assert "more than 2 parts" in answer.json()["error"]


def test_a_request_that_stops_is_given_up(serve: Callable[..., WebServer], index: Index, tmp_path: Path) -> None:
    web = serve(body_timeout_s=2)
    whole, half = read(make_ct_series(tmp_path / "in", num_slices=2))
    body = body_of([whole, half])[: -len(half) // 2]
    with socket.create_connection(("127.0.0.1", web.port), WAIT_S) as client:
        client.sendall(head_of(10**6) + body)
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    assert len(files(index)) == 1  # what was whole is kept; the sender will send it again, and that is the same
    assert ends(index) == [False]


def test_a_connection_that_breaks_leaves_only_what_was_whole(web: WebServer, index: Index, tmp_path: Path) -> None:
    whole, half = read(make_ct_series(tmp_path / "in", num_slices=2))
    with socket.create_connection(("127.0.0.1", web.port), WAIT_S) as client:
        client.sendall(head_of(10**6) + body_of([whole, half])[: -len(half) // 2])
    wait_until(lambda: index.cases() and ends(index) == [False])
    assert len(files(index)) == 1


def test_headers_cannot_be_smuggled_in(web: WebServer) -> None:
    with socket.create_connection(("127.0.0.1", web.port), WAIT_S) as client:
        head = b"GET /dicom-web/studies?PatientID=a%0d%0aSet-Cookie:x HTTP/1.1\r\nHost: localhost\r\n"
        client.sendall(head + b"Connection: close\r\n\r\n")
        answer = client.recv(4000)
    assert b"set-cookie" not in answer.lower()


def test_the_dicomweb_client_of_others_can_store(web: WebServer, index: Index, tmp_path: Path) -> None:
    datasets: list[Dataset] = [dcmread(path) for path in make_ct_series(tmp_path / "in", num_slices=3)]
    answer = DICOMwebClient(web.url).store_instances(datasets)
    assert len(answer.ReferencedSOPSequence) == 3
    assert index.cases()[0].num_instances == 3


def test_the_command_line_of_the_dicomweb_client_stores_finds_and_retrieves(web: WebServer, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=3)
    ds = dcmread(paths[0])
    command = [Path(sys.executable).with_name("dicomweb_client"), "--url", web.url]
    named = ["--study", ds.StudyInstanceUID, "--series", ds.SeriesInstanceUID]
    run([*command, "store", "instances", *paths])
    assert ds.SeriesInstanceUID in run([*command, "search", "series", "--study", ds.StudyInstanceUID])
    run([*command, "retrieve", "series", *named, "full", "--save", "--output-dir", tmp_path])
    for path in paths:
        stored = dcmread(path)
        assert dcmread(tmp_path / f"{stored.SOPInstanceUID}.dcm").PixelData == stored.PixelData


def test_curl_stores_and_retrieves(web: WebServer, index: Index, tmp_path: Path) -> None:
    if shutil.which("curl") is None and not os.environ.get("CSPINE_REQUIRE_SERVERS"):
        pytest.skip("curl is not installed")
    paths = make_ct_series(tmp_path / "in", num_slices=3, rows=512, columns=512)  # large: curl asks whether to go on
    ds = dcmread(paths[0])
    (tmp_path / "body").write_bytes(body_of(read(paths)))
    curl = ["curl", "--silent", "--show-error", "--fail", "--max-time", "30"]
    told = run(
        [*curl, "--header", f"Content-Type: {KIND}", "--data-binary", f"@{tmp_path / 'body'}", f"{web.url}/studies"]
    )
    assert len(json.loads(told)["00081199"]["Value"]) == 3
    address = f"{web.url}/studies/{ds.StudyInstanceUID}/series/{ds.SeriesInstanceUID}"
    run([*curl, "--header", "Accept: multipart/related; type=application/dicom", "--output", tmp_path / "got", address])
    got = (tmp_path / "got").read_bytes()
    assert [got.count(data) for data in read(files(index))] == [1, 1, 1]


def run(command: list[Any]) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_series_can_be_removed_and_is_gone(web: WebServer, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=3)
    stow(web, read(paths))
    ds = dcmread(paths[0])
    address = f"{web.url}/studies/{ds.StudyInstanceUID}"
    assert requests.delete(f"{address}/series/{generate_uid()}", timeout=WAIT_S).status_code == 404
    assert requests.delete(f"{address}/series/{ds.SeriesInstanceUID}", timeout=WAIT_S).status_code == 204
    assert requests.get(address, timeout=WAIT_S).status_code == 404
    assert index.cases() == []
    assert files(index) == []
