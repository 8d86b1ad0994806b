"""Delivery by STOW-RS to a small real HTTP server that answers as it is told, and is cut off, slow, or distrusted."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from node.case import CaseState, DeliveryState
from node.config import Config, DicomWebDestination, OrthancDestination
from node.index import Index
from tests.node.handed_over import Clock, deliver, hand_over, the_case, the_delivery, uids_of
from tests.serving import Quiet, serving

MakeConfig = Callable[..., Config]


class DicomWebServer(ThreadingHTTPServer):
    """Stores what is posted to /studies/UID, unless it is told another answer; answers QIDO-RS about it.

    answers: status and body of the next POSTs; None cuts the connection. lost: UIDs that it denies having.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, Any] | None] = []
        self.stored: dict[str, bytes] = {}
        self.lost: set[str] = set()
        self.num_posts = 0
        self.authorization: str | None = None
        self.wait_s = 0.0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: some of these connections are meant to break."""


class _Handler(Quiet, BaseHTTPRequestHandler):
    server: DicomWebServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        server.num_posts += 1
        server.authorization = self.headers["Authorization"]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
        parts = [part.get_payload(decode=True) for part in message.walk() if not part.is_multipart()]
        time.sleep(server.wait_s)
        answer = server.answers.pop(0) if server.answers else (200, None)
        if answer is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, content = answer
        refused = refused_uids(content)
        for part in parts if status < 300 else ():
            uid = str(dcmread(BytesIO(part)).SOPInstanceUID)
            if uid not in refused:
                server.stored[uid] = part
        self._reply(status, content)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?SOPInstanceUID=")
        there = query in self.server.stored and query not in self.server.lost and "/series/" in path
        self._reply(200, [{"00080018": {"vr": "UI", "Value": [query]}}] if there or "limit" in path else None)

    def _reply(self, status: int, content: Any) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def store_answer(*, stored: dict[str, int | None] | None = None, failed: dict[str, int] | None = None) -> Any:
    """A Store Instances Response: UIDs with a Warning Reason (or None), and with a Failure Reason."""

    def item(uid: str, tag: str, reason: int | None) -> Any:
        said = {} if reason is None else {tag: {"vr": "US", "Value": [reason]}}
        return {"00081155": {"vr": "UI", "Value": [uid]}, **said}

    return {
        "00081199": {"vr": "SQ", "Value": [item(uid, "00081196", why) for uid, why in (stored or {}).items()]},
        "00081198": {"vr": "SQ", "Value": [item(uid, "00081197", why) for uid, why in (failed or {}).items()]},
    }


def refused_uids(content: Any) -> set[str]:
    failed = content.get("00081198", {}).get("Value", []) if isinstance(content, dict) else []
    return {item["00081155"]["Value"][0] for item in failed}


@pytest.fixture
def server() -> Iterator[DicomWebServer]:
    running = DicomWebServer()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def web(server: DicomWebServer) -> DicomWebDestination:
    url = f"http://127.0.0.1:{server.server_port}/dicom-web/"
    return DicomWebDestination(type="dicomweb", name="web", url=url, timeout_s=30)


def test_all_objects_go_in_one_request_and_are_found_there(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination
) -> None:
    hand_over(index, results, "web")
    case = deliver(index, make_config(), web)
    assert (case.state, case.reason, server.num_posts) == (CaseState.DONE, "", 1)
    sent = {path.read_bytes() for path in results.glob("*.dcm")}
    assert set(server.stored.values()) == sent


def test_failures_that_may_pass_are_sent_again_alone_and_final_ones_are_told(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination, clock: Clock
) -> None:
    hand_over(index, results, "web")
    image, report = uids_of(results)["vertebrae.seg.dcm"], uids_of(results)["report.sr.dcm"]
    server.answers = [
        (202, store_answer(stored={image: None}, failed={report: 0xA700})),
        (202, store_answer(failed={report: 0x0122})),
    ]
    case = deliver(index, make_config(), web)
    assert case.state is CaseState.DELIVERING
    assert "refused report.sr.dcm with status 0xA700 (out of resources; is its disk full?)" in case.reason
    clock.now_s += 10
    case = deliver(index, make_config(), web)
    assert case.state is CaseState.FAILED
    assert "1 of 2 objects are there" in case.reason
    assert "status 0x0122 (SOP Class not supported; allow it there)" in case.reason
    assert set(server.stored) == {image}


def test_remarks_and_duplicates_count_as_stored(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination
) -> None:
    hand_over(index, results, "web")
    image, report = uids_of(results)["vertebrae.seg.dcm"], uids_of(results)["report.sr.dcm"]
    server.stored[report] = b"it was here"
    server.answers = [(202, store_answer(stored={image: 0xB000}, failed={report: 0x0111}))]
    case = deliver(index, make_config(), web)
    assert case.state is CaseState.DONE
    assert "took vertebrae.seg.dcm with status 0xB000" in case.reason
    assert "took report.sr.dcm with status 0x0111 (it has this Instance already)" in case.reason


def test_a_conflict_says_of_each_object_why(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination
) -> None:
    hand_over(index, results, "web")
    server.answers = [(409, store_answer(failed=dict.fromkeys(uids_of(results).values(), 0xA900)))]
    case = deliver(index, make_config(), web)
    assert case.state is CaseState.FAILED
    assert "0 of 2 objects are there" in case.reason
    assert "the dataset does not match its SOP Class" in case.reason


def test_what_is_too_large_together_is_sent_one_by_one_and_what_is_too_large_alone_is_told(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination
) -> None:
    hand_over(index, results, "web")
    server.answers = [(413, None), (413, None)]  # together; the Segmentation alone
    case = deliver(index, make_config(), web)
    assert case.state is CaseState.FAILED
    assert "answered 413" in case.reason
    assert "raise the limit there" in case.reason
    assert set(server.stored) == {uids_of(results)["report.sr.dcm"]}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (400, "it does not understand the request"),
        (401, "check auth"),
        (403, "give this user the right to store"),
        (404, "check url"),
        (415, "switch DICOM uploads on there"),
        (301, "put the final address into url"),
    ],
)
def test_an_answer_that_would_come_again_is_given_up_at_once_with_what_to_do(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    server: DicomWebServer,
    web: DicomWebDestination,
    status: int,
    told: str,
) -> None:
    hand_over(index, results, "web")
    server.answers = [(status, None)]
    case = deliver(index, make_config(), web)
    assert (case.state, server.num_posts) == (CaseState.FAILED, 1)
    assert f"answered {status} (" in case.reason
    assert told in case.reason


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((500, None), "answered 500 (Internal Server Error)"),
        ((503, None), "answered 503 (Service Unavailable)"),
        ((202, None), "did not say what it did not store"),
        (None, "broke the connection"),
    ],
)
def test_what_may_pass_is_tried_again(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    server: DicomWebServer,
    web: DicomWebDestination,
    clock: Clock,
    answer: tuple[int, Any] | None,
    told: str,
) -> None:
    hand_over(index, results, "web")
    server.answers = [answer]
    case = deliver(index, make_config(), web)
    assert case.state is CaseState.DELIVERING
    assert "attempt 1 failed, next in 10 s" in case.reason
    assert told in case.reason
    clock.now_s += 10
    assert deliver(index, make_config(), web).state is CaseState.DONE


def test_a_server_that_is_too_slow_is_tried_again(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination
) -> None:
    hand_over(index, results, "web")
    server.wait_s = 5.0
    case = deliver(index, make_config(), web.model_copy(update={"timeout_s": 0.1}))
    assert case.state is CaseState.DELIVERING
    assert "did not answer within 0.1 s" in case.reason


def test_a_server_that_is_not_there_is_tried_again(
    index: Index, make_config: MakeConfig, results: Path, web: DicomWebDestination, free_port: Callable[[], int]
) -> None:
    hand_over(index, results, "web")
    nowhere = web.model_copy(update={"url": f"http://127.0.0.1:{free_port()}"})
    case = deliver(index, make_config(), nowhere)
    assert case.state is CaseState.DELIVERING
    assert "cannot be reached: connection refused; check url, and that it runs" in case.reason


def test_what_a_server_took_and_lost_is_asked_for_and_then_sent_again(
    index: Index, make_config: MakeConfig, results: Path, server: DicomWebServer, web: DicomWebDestination, clock: Clock
) -> None:
    hand_over(index, results, "web")
    server.lost = {uids_of(results)["report.sr.dcm"]}
    assert deliver(index, make_config(), web).state is CaseState.DELIVERING
    assert the_delivery(index, "web").state is DeliveryState.VERIFYING
    clock.now_s += web.verify_timeout_s
    assert "web took report.sr.dcm, and 5 min later lacks it" in deliver(index, make_config(), web).reason
    server.lost = set()
    clock.now_s += 10
    assert deliver(index, make_config(), web).state is CaseState.DONE
    assert server.num_posts == 2


@pytest.mark.parametrize(
    ("auth", "header"),
    [
        ({"type": "basic", "user": "me", "secret_env": "CSPINE_SECRET"}, "Basic bWU6aHVudGVyMg=="),
        ({"type": "bearer", "secret_env": "CSPINE_SECRET"}, "Bearer hunter2"),
        ({"type": "bearer", "secret_file": "token"}, "Bearer hunter2"),
    ],
)
def test_the_secret_is_read_when_it_is_needed_and_shown_nowhere(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    server: DicomWebServer,
    web: DicomWebDestination,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    auth: dict[str, str],
    header: str,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.chdir(tmp_path)
    known = DicomWebDestination.model_validate(web.model_dump() | {"auth": auth})
    hand_over(index, results, "web")
    case = deliver(index, make_config(), known)
    assert case.state is CaseState.FAILED
    assert "the secret for" in case.reason
    (tmp_path / "token").write_text("hunter2\n", encoding="utf-8")
    monkeypatch.setenv("CSPINE_SECRET", "hunter2")
    server.answers = [(401, None)]
    assert index.retry_delivery(the_delivery(index, "web"))
    assert "check auth" in deliver(index, make_config(), known).reason
    assert index.retry_delivery(the_delivery(index, "web"))
    assert deliver(index, make_config(), known).state is CaseState.DONE
    assert server.authorization == header
    assert "hunter2" not in caplog.text + repr(known)


def test_an_untrusted_certificate_is_given_up_at_once_and_a_trusted_one_is_fine(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    server: DicomWebServer,
    web: DicomWebDestination,
    tmp_path: Path,
) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*new, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    secure = web.model_dump() | {"url": web.url.replace("http:", "https:")}
    hand_over(index, results, "web")
    case = deliver(index, make_config(), DicomWebDestination.model_validate(secure))
    assert case.state is CaseState.FAILED
    assert "its certificate cannot be trusted" in case.reason
    assert "name its authority under tls.ca" in case.reason
    assert index.retry_delivery(the_delivery(index, "web"))
    trusting = DicomWebDestination.model_validate(secure | {"tls": {"ca": certificate}})
    assert deliver(index, make_config(), trusting).state is CaseState.DONE


def test_proxies_of_the_environment_are_not_used(
    index: Index, make_config: MakeConfig, results: Path, web: DicomWebDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    hand_over(index, results, "web")
    deliver(index, make_config(), web)
    assert the_case(index).state is CaseState.DONE


@pytest.mark.parametrize("status", [200, 202, 409])
@pytest.mark.parametrize("reason", ["Cannot store", "A700H", [], None])
def test_a_reason_that_is_no_number_does_not_hold_up_what_waits_behind_it(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    server: DicomWebServer,
    web: DicomWebDestination,
    clock: Clock,
    status: int,
    reason: Any,
) -> None:
    hand_over(index, results, "web")
    report = uids_of(results)["report.sr.dcm"]
    answer = store_answer(stored=dict.fromkeys(uids_of(results).values()), failed={report: 0})
    answer["00081198"]["Value"][0]["00081197"]["Value"] = [reason]
    answer["00081199"]["Value"][0]["00081196"] = {"Value": [reason]}
    server.answers = [(status, answer)]
    case = deliver(index, make_config(), web)
    assert "attempt 1 failed, next in 10 s" in case.reason
    assert "refused report.sr.dcm with status 0x0110 (processing failure)" in case.reason


@pytest.mark.parametrize("content", ["[]", "null", '"Welcome"', "5", "{}", '{"a": "b"}', "<html>", "[" * 200_000])
def test_an_answer_that_is_not_orthancs_is_told_as_such(
    index: Index, make_config: MakeConfig, results: Path, content: str
) -> None:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content.encode())

    hand_over(index, results, "orthanc")
    with serving(Handler) as port:
        url = f"http://127.0.0.1:{port}"
        case = deliver(index, make_config(), OrthancDestination(type="orthanc", name="orthanc", url=url))
    assert case.state is CaseState.FAILED
    assert "does not answer like an Orthanc; check url" in case.reason
