"""What a client costs that never says who it is, or takes for ever: connections, heads of requests, bodies."""

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
import requests

from node.config import Config
from node.index import Index
from node.web import kernel_files, limits
from node.web.settings import WebConfig
from tests.web_server import WebServer

SOON_S = 30  # until a connection must have been closed
GET = b"GET /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\n"
STORE = (
    b"POST /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: multipart/related; type=application/dicom; boundary=xx\r\n"
)


@pytest.fixture
def serve(make_config: Callable[..., Config], index: Index) -> Iterator[Callable[..., WebServer]]:
    servers: list[WebServer] = []

    def start(**settings: object) -> WebServer:
        servers.append(WebServer(make_config().model_copy(update={"web": WebConfig(**settings)}), index))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def connect(server: WebServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), SOON_S)


def what_comes(client: socket.socket) -> bytes:
    """All that the server sends until it closes; what we sent may have come after that."""
    came = b""
    with suppress(ConnectionError):
        while piece := client.recv(65536):
            came += piece
    return came


def store_and_wait(client: socket.socket) -> None:
    """Begins a request; returns when it is being answered, its body awaited."""
    client.sendall(STORE + b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 100")


def num_connections(server: WebServer) -> int:
    """How many sockets of connections it holds."""
    sockets = psutil.Process().net_connections("tcp")
    return sum(one.laddr[1:] == (server.port,) and one.status != psutil.CONN_LISTEN for one in sockets)


@pytest.mark.parametrize("allow", ["loopback", "tokens"])
@pytest.mark.parametrize("begun", [b"", GET, GET + b"Accept: */*\r\n\r\n" + GET])
def test_a_connection_without_a_whole_request_is_closed(
    serve: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch, allow: str, begun: bytes
) -> None:
    server = serve(allow=allow)
    if b"\r\n\r\n" not in begun:
        monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 0.3)
    with connect(server) as client:
        client.sendall(begun)
        monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 0.3)  # for a head after a whole request
        assert what_comes(client).count(b"HTTP/1.1") == begun.count(b"\r\n\r\n")


@pytest.mark.parametrize("begun", [GET, STORE + b"Content-Length: 1000000\r\n\r\n"])
def test_what_comes_byte_by_byte_keeps_no_connection_open(
    serve: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """Neither of a head, nor of a body that has been answered before it came."""
    monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 0.5)
    with connect(serve(allow="tokens")) as client:
        client.settimeout(0.05)
        client.sendall(begun)
        for _ in range(20 * SOON_S):
            try:
                client.sendall(b"x")
                if not client.recv(1000):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    pytest.fail("it is still open")


def test_a_request_may_take_longer_than_its_head(
    serve: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 2)
    with connect(serve(body_timeout_s=4)) as client:
        store_and_wait(client)
        assert what_comes(client).startswith(b"HTTP/1.1 408")


def test_a_head_of_64_kib_is_refused(serve: Callable[..., WebServer]) -> None:
    server = serve(allow="tokens")
    head = GET + b"X: "
    with connect(server) as client:
        client.sendall(head + b"x" * (64 * 1024 - len(head)))
        assert what_comes(client).startswith(b"HTTP/1.1 431")
    assert requests.get(f"{server.url}/studies", headers={"X": "x" * 60_000}, timeout=20).status_code == 401


def test_a_body_may_not_end_in_a_head_without_end(serve: Callable[..., WebServer]) -> None:
    with connect(serve(allow="tokens")) as client:
        client.sendall(STORE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: ")
        assert client.recv(1000).startswith(b"HTTP/1.1 401")
        client.sendall(b"x" * 64 * 1024)
        assert b"HTTP/1.1 431" in what_comes(client)


def test_connections_that_ask_for_nothing_make_room_for_others(
    serve: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_MAX_CONNECTIONS", 3)
    server = serve()
    with ExitStack() as opened:
        first = opened.enter_context(connect(server))
        store_and_wait(first)
        idle = [opened.enter_context(connect(server)) for _ in range(2)]
        with connect(server) as client:
            client.sendall(GET + b"Connection: close\r\n\r\n")
            assert what_comes(client).startswith(b"HTTP/1.1 204")
        assert what_comes(idle[0]) == b""
        # Where all that are open are being answered, the one that comes is closed.
        store_and_wait(idle[1])
        store_and_wait(opened.enter_context(connect(server)))
        with connect(server) as client:
            assert client.recv(100) == b""


@pytest.mark.parametrize("num_requests", [150, 2000])  # too few for answering to stop, and enough
def test_answers_that_are_not_read_keep_no_connection_open(
    make_config: Callable[..., Config], index: Index, monkeypatch: pytest.MonkeyPatch, num_requests: int
) -> None:
    monkeypatch.setattr(kernel_files, "READ_TIMEOUT_S", 0.3)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of each connection
    server = WebServer(make_config().model_copy(update={"web": WebConfig(allow="tokens")}), index, listening)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(SOON_S)
        client.connect(("127.0.0.1", server.port))
        client.sendall(GET + b"\r\n")
        assert client.recv(10) == b"HTTP/1.1 4"
        monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 1)
        client.settimeout(1)
        with suppress(TimeoutError, ConnectionError):
            client.sendall((GET + b"\r\n") * num_requests)
        until = time.monotonic() + SOON_S
        while num_connections(server):
            assert time.monotonic() < until, "it is still open"
            time.sleep(0.05)
    server.stop()


@pytest.mark.parametrize("piece", [b"", b"x"])
def test_a_body_that_comes_too_slowly_is_given_up(serve: Callable[..., WebServer], piece: bytes) -> None:
    server = serve(body_timeout_s=1)
    with connect(server) as client:
        store_and_wait(client)
        client.settimeout(0.1)
        for num_sent in itertools.count():
            assert num_sent < SOON_S * 10, "it is still awaited"
            client.sendall(piece)
            try:
                assert client.recv(100).startswith(b"HTTP/1.1 408")
                break
            except TimeoutError:
                continue
