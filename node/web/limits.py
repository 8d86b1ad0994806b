"""What a client may cost before it has said who it is: time, bytes, connections; and how slowly a body may come.

uvicorn bounds none of these. `server.py` takes the protocol, `app.py` the bound on bodies.
"""

import asyncio
import logging
import math
from asyncio import TimerHandle
from collections.abc import AsyncIterator

from node.web.kernel_files import KernelFilesProtocol

log = logging.getLogger(__name__)

_HEAD_TIMEOUT_S = 20.0  # from the connection, or the answer before, to the end of a request's head
_MAX_HEAD_BYTES = 64 * 1024
_MAX_CONNECTIONS = 256  # a browser opens six
_MIN_BYTES_PER_S = 16 * 1024  # of a body; as of a PDU (node/receive/lane.py)
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class LimitedProtocol(KernelFilesProtocol):
    """Closes a connection whose request has no end of its head in time, or too large a head.

    Where too many are open, the one that has waited longest for a request makes room. One with a request that is being
    answered stays open, however long that takes.
    """

    _timer: TimerHandle | None = None  # runs while a head is awaited
    _num_bytes = 0  # that came since a head was complete or some of a body came; trailers count like heads

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > _MAX_CONNECTIONS:
            log.warning("action=http-too-many-connections: one is closed, more than %d are open", _MAX_CONNECTIONS)
            ours = (one for one in self.connections if isinstance(one, LimitedProtocol))
            min(ours, key=LimitedProtocol._waits_until)._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            room = _MAX_HEAD_BYTES - self._num_bytes
            piece, data = data[:room], data[room:]
            self._num_bytes += len(piece)
            super().data_received(piece)
            if self._num_bytes >= _MAX_HEAD_BYTES:
                if self.cycle is None or self.cycle.response_complete:  # else an answer is under way
                    self.transport.write(_TOO_LARGE)
                self._close()

    def on_headers_complete(self) -> None:
        self._num_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request has come meanwhile
            self._await_head()

    def _await_head(self) -> None:
        """What is still to come of a body that has been answered has that time, too."""
        self._stop_timer()
        if not self.transport.is_closing():
            self._timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._close)

    def _waits_until(self) -> float:
        return self._timer.when() if self._timer is not None else math.inf

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._stop_timer()
        self.connections.discard(self)
        self.transport.close()


async def in_time(body: AsyncIterator[bytes], patience_s: float) -> AsyncIterator[bytes]:
    """The pieces of a body.

    patience_s: how far they may be behind the least rate, in time that was spent waiting for them.

    Raises:
        TimeoutError: they are further behind.
    """
    loop = asyncio.get_running_loop()
    left_s = patience_s
    while True:
        began = loop.time()
        async with asyncio.timeout(left_s):
            piece = await anext(body, b"")
        if not piece:
            return
        left_s = min(patience_s, left_s - (loop.time() - began) + len(piece) / _MIN_BYTES_PER_S)
        yield piece
