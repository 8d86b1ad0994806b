"""What a client costs that never says who it is, or takes for ever: connections, heads of requests, bodies."""

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import requests

from node.config import Config
from node.index import Index
from node.web import limits
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
    """All that the server sends until it closes."""
    with client.makefile("rb") as incoming:
        return incoming.read()


def store_and_wait(client: socket.socket) -> None:
    """Begins a request; returns when it is being answered, its body awaited."""
    client.sendall(STORE + b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 100")


@pytest.mark.parametrize("allow", ["loopback", "tokens"])
@pytest.mark.parametrize("begun", [b"", GET, GET + b"Accept: */*\r\n\r\n" + GET])
def test_a_connection_without_a_whole_request_is_closed(
    serve: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch, allow: str, begun: bytes
) -> None:
    monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 0.3)
    with connect(serve(allow=allow)) as client:
        client.sendall(begun)
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
    monkeypatch.setattr(limits, "_HEAD_TIMEOUT_S", 0.2)
    with connect(serve(body_timeout_s=1)) as client:
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
            assert what_comes(client).startswith(b"HTTP/1.1 200")
        assert what_comes(idle[0]) == b""
        # Where all that are open are being answered, the one that comes is closed.
        store_and_wait(idle[1])
        store_and_wait(opened.enter_context(connect(server)))
        with connect(server) as client:
            assert client.recv(100) == b""


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
