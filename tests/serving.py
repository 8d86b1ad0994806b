"""A server of a test's own on loopback, in threads of this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from socketserver import BaseRequestHandler
from ssl import SSLContext


class Quiet:
    """Of a handler: it logs no request."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving(handler: type[BaseRequestHandler], tls: SSLContext | None = None) -> Iterator[int]:
    """Serves, over HTTP or whatever the handler speaks; gives the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
