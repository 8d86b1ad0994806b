"""Stands before a server and holds back what it answers: for what a client is to be killed in the middle of."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable

from tests.waiting import WAIT_S


class Gate(socketserver.ThreadingTCPServer):
    """Passes on what comes for a port on loopback; of all answers together `num_bytes` until it is opened.

    port: where it listens itself.
    """

    daemon_threads = True

    def __init__(self, port_behind: int, num_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.port = int(self.server_address[1])
        self.port_behind, self._num_left = port_behind, num_bytes
        self._opened = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def open(self) -> None:
        self._opened.set()

    def stop(self) -> None:
        self.open()
        self.shutdown()
        self.server_close()

    def hold_back(self, num_bytes: int) -> None:
        """Returns when so much more may be passed on."""
        self._num_left -= num_bytes
        if self._num_left < 0:
            self._opened.wait(WAIT_S)


class _Passage(socketserver.BaseRequestHandler):
    server: Gate

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port_behind)) as behind:
            back = threading.Thread(target=self._pass_on, args=(behind, self.request, self.server.hold_back))
            back.start()
            self._pass_on(self.request, behind, lambda _: None)
            back.join()

    def _pass_on(self, here: socket.socket, there: socket.socket, before: Callable[[int], None]) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(65536):
                before(len(data))
                there.sendall(data)
        with contextlib.suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)
