"""What a client may cost before it has said who it is: time, bytes, connections; and how slowly a body may come.

uvicorn bounds none of these. `server.py` takes the protocol, `app.py` the bound on bodies.
"""

import asyncio
import logging
import math
from asyncio import TimerHandle
from collections.abc import AsyncIterator

from node.web import kernel_files
from node.web.kernel_files import KernelFilesProtocol

log = logging.getLogger(__name__)

_HEAD_TIMEOUT_S = 20.0  # from the connection, or the answer before, to the end of a request's head
_MAX_HEAD_BYTES = 64 * 1024
_MAX_CONNECTIONS = 256  # a browser opens six
_MIN_BYTES_PER_S = 16 * 1024  # of a body; as of a PDU (node/receive/lane.py)
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class LimitedProtocol(KernelFilesProtocol):
    """Closes a connection with no end of a request's head in time, too large a head, or an answer that is not read.

    Where too many are open, the one that has waited longest for a request makes room. One with a request that is being
    answered stays open, however long that takes.
    """

    _reading: TimerHandle | None = None  # runs while some of an answer has not been taken
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
        self._stop_reading()
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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        self._stop_reading()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reading()
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

    def _await_reading(self, before: int | None = None) -> None:
        """Breaks the connection when nothing more is taken of what is to be sent: none of it since it was `before`."""
        self._stop_reading()
        if (left := self.transport.get_write_buffer_size()) == before:
            self.transport.abort()
        elif left:
            self._reading = self.loop.call_later(kernel_files.READ_TIMEOUT_S, self._await_reading, left)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

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
