"""WADO-RS answers whose files the kernel sends: the same bytes with it and without, whatever the client does."""

import asyncio
import http.client
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from node.config import Config
from node.index import Index
from node.web import kernel_files, wado
from node.web.settings import WebConfig, WebTls
from tests.certificates import Authority
from tests.factories import make_ct_series
from tests.waiting import wait_until
from tests.web_server import WebServer, hold

HEADERS = {"Accept": 'multipart/related; type="application/dicom"'}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """A node that holds a Series of 20 MB, more than sockets take while nobody reads."""

    def enlarge(_i: int, ds: Dataset) -> None:
        ds.Rows = ds.Columns = 1024
        ds.PixelData = os.urandom(2 * 1024 * 1024)

    index = Index(tmp_path_factory.mktemp("held"))
    hold(index, make_ct_series(index.data_dir / "instances", num_slices=10, rows=2, columns=2, edit=enlarge))
    yield index
    index.close()


@pytest.fixture(scope="module")
def files(held: Index) -> list[bytes]:
    return [path.read_bytes() for path in sorted(held.data_dir.glob("instances/*.dcm"))]


@pytest.fixture(scope="module")
def address(held: Index) -> str:
    ds = dcmread(next(held.data_dir.glob("instances/*.dcm")), stop_before_pixels=True)
    return f"/dicom-web/studies/{ds.StudyInstanceUID}/series/{ds.SeriesInstanceUID}"


@pytest.fixture(scope="module")
def web(held: Index) -> Iterator[WebServer]:
    server = WebServer(Config(), held)
    yield server
    server.stop()


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the kernel has sent each time."""
    sent: list[int] = []
    sendfile = os.sendfile

    def spy(*values: Any) -> int:
        sent.append(sendfile(*values))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", spy)
    return sent


def content_of(answer: http.client.HTTPResponse) -> bytes:
    content = answer.read()
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(content)))
    return content


def times_in(content: bytes, files: list[bytes]) -> set[int]:
    """How often each of the files is in it."""
    return {content.count(file) for file in files}


def test_the_kernel_sends_every_file_and_the_connection_goes_on(
    web: WebServer, address: str, files: list[bytes], by_kernel: list[int]
) -> None:
    """Fails, too, with a uvicorn that does not have what the extension needs."""
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=30)
    contents = []
    for _ in range(2):
        connection.request("GET", address, headers=HEADERS)
        contents.append(content_of(connection.getresponse()))
    connection.close()
    assert [times_in(content, files) for content in contents] == [{1}, {1}]
    assert sum(by_kernel) == 2 * sum(map(len, files))


def test_requests_that_come_together_are_answered_one_after_the_other(
    web: WebServer, address: str, files: list[bytes]
) -> None:
    lines = f"GET {address} HTTP/1.1\r\nHost: localhost\r\nAccept: {HEADERS['Accept']}\r\n"
    with socket.create_connection(("127.0.0.1", web.port), timeout=30) as client:
        client.sendall(f"{lines}\r\n{lines}Connection: close\r\n\r\n".encode())
        with client.makefile("rb") as incoming:
            content = incoming.read()
    assert times_in(content, files) == {2}
    assert content.count(b"HTTP/1.1 200 OK") == 2


def _cannot(*_: object) -> int:
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("lack", ["file system", "uvicorn"])
def test_without_the_kernel_files_are_read(
    lack: str, web: WebServer, address: str, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sendfile", _cannot)
    if lack == "uvicorn":
        monkeypatch.setattr(kernel_files, "_NEEDED", ("of_another_version",))
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=30)
    connection.request("GET", address, headers=HEADERS)
    assert times_in(content_of(connection.getresponse()), files) == {1}
    connection.close()


def test_with_tls_files_are_read(
    held: Index, address: str, files: list[bytes], authority: Authority, by_kernel: list[int]
) -> None:
    certificate = authority.sign("web")
    tls = WebTls(certificate=certificate.certificate, key=certificate.key)
    web = WebServer(Config().model_copy(update={"web": WebConfig(tls=tls)}), held)
    trusting = ssl.create_default_context(cafile=str(authority.certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", web.port, timeout=30, context=trusting)
    connection.request("GET", address, headers=HEADERS)
    content = content_of(connection.getresponse())
    connection.sock.unwrap().close()
    web.stop()
    assert times_in(content, files) == {1}
    assert not by_kernel


def test_a_client_that_does_not_read_holds_up_nobody(web: WebServer, address: str, files: list[bytes]) -> None:
    slow = http.client.HTTPConnection("127.0.0.1", web.port, timeout=30)
    slow.request("GET", address, headers=HEADERS)
    time.sleep(0.2)
    assert web.get("/studies").ok
    assert times_in(content_of(slow.getresponse()), files) == {1}
    slow.close()


def test_a_client_that_leaves_in_the_middle_leaves_nothing_open(
    web: WebServer, address: str, caplog: pytest.LogCaptureFixture, by_kernel: list[int]
) -> None:
    assert web.get("/studies").ok
    before = num_open_files()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", web.port), timeout=30) as client:
            begin(client, address)
    wait_until(lambda: num_open_files() <= before)
    assert by_kernel
    assert caplog.text == ""


def test_for_a_client_that_reads_no_more_nothing_stays_open(
    web: WebServer, address: str, monkeypatch: pytest.MonkeyPatch, by_kernel: list[int]
) -> None:
    monkeypatch.setattr(kernel_files, "READ_TIMEOUT_S", 0.3)
    assert web.get("/studies").ok
    before = num_open_files()
    with socket.create_connection(("127.0.0.1", web.port), timeout=30) as client:
        client.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\nAccept: {HEADERS['Accept']}\r\n\r\n".encode())
        client.recv(1000)
        until = time.monotonic() + 20
        while num_open_files() > before + 1 and time.monotonic() < until:  # the client's own is one
            time.sleep(0.02)
        assert num_open_files() <= before + 1
    assert by_kernel


def test_for_a_client_that_does_not_even_take_the_head_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a later answer, when an earlier one has filled what the kernel holds for it."""
    monkeypatch.setattr(kernel_files, "READ_TIMEOUT_S", 0.2)

    async def send() -> bool:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, ours)
            with suppress(BlockingIOError):
                while True:
                    ours.send(bytes(65536))
            transport.write(b"HTTP/1.1 200 OK")
            cycle: Any = SimpleNamespace(transport=transport, expected_content_length=1)
            await asyncio.wait_for(kernel_files._send_pieces(loop, cycle, [b"x"]), 10)
            return bool(transport.is_closing())

    assert asyncio.run(send())


def test_for_a_client_that_has_left_no_more_is_opened(
    web: WebServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    open_file = wado._open
    monkeypatch.setattr(wado, "_NUM_OPEN", 1)
    monkeypatch.setattr(wado, "_open", lambda path: opened.append(path) or open_file(path))
    with socket.create_connection(("127.0.0.1", web.port), timeout=30) as client:
        begin(client, address)
    until = time.monotonic() + 2
    while len(opened) < 10 and time.monotonic() < until:
        time.sleep(0.02)
    assert 0 < len(opened) < 10


def begin(client: socket.socket, address: str) -> None:
    """Asks, and reads some of the first file."""
    client.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\nAccept: {HEADERS['Accept']}\r\n\r\n".encode())
    num_bytes = 0
    while num_bytes < 100_000:
        num_bytes += len(client.recv(10_000))


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
