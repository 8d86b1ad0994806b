"""Files that the kernel sends: an ASGI extension, and uvicorn's HTTP protocol with it.

ASGI's `http.response.pathsend` is a body of one file, and uvicorn has not got it. This one sends files as the next
pieces of a body, so that the Instances of a multipart answer do not pass through Python. It is there only where the
kernel can do it: without TLS, which has to encrypt, and with a uvicorn that is built as the tests know it. Where it is
not, or a file system cannot, a file is read and sent like anything else.

`loop.sendfile` does the same for one file, with more system calls and Python for each: with it a Series of 300 files
took 1.3 to 1.6 times as long.
"""

import errno
import os
import socket
from asyncio import AbstractEventLoop, Event, sleep, timeout, to_thread
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from io import FileIO

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

Pieces = Sequence[bytes | FileIO]
SendPieces = Callable[[Pieces], Awaitable[None]]

READ_TIMEOUT_S = 60.0  # a client that takes nothing of its answer for so long is taken for dead
_EXTENSION = "cspine.http.response.pieces"
_NEEDED = ("expected_content_length", "transport")
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without sendfile
_MORE = getattr(socket, "MSG_MORE", 0)  # the head of a part waits for the file that follows


def send_pieces_of(scope: Scope) -> SendPieces | None:
    """What sends bytes and whole files, and closes these, as the next pieces of an answer whose Content-Length has been
    sent.

    It returns when the kernel has taken all, or the client has gone. None: this connection has no such thing.
    """
    found: SendPieces | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("send")
    return found


class KernelFilesProtocol(HttpToolsProtocol):
    """uvicorn's, with the extension in the scope of each GET."""

    def on_headers_complete(self) -> None:
        """Called by the parser; what answers the request has not begun to run when it returns."""
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope or not all(hasattr(cycle, name) for name in _NEEDED):
            return
        if (self.scheme, self.scope["method"]) == ("http", "GET"):
            self.scope["extensions"] = {_EXTENSION: {"send": partial(_send_pieces, self.loop, cycle)}}


def close_files(pieces: Pieces) -> None:
    """Closes the files among these pieces, sent or not."""
    for piece in pieces:
        if isinstance(piece, FileIO):
            piece.close()


async def _send_pieces(loop: AbstractEventLoop, cycle: RequestResponseCycle, pieces: Pieces) -> None:
    try:
        await _send(loop, cycle, pieces)
    finally:
        close_files(pieces)


async def _send(loop: AbstractEventLoop, cycle: RequestResponseCycle, pieces: Pieces) -> None:
    transport = cycle.transport
    with suppress(TimeoutError):
        async with timeout(READ_TIMEOUT_S):  # too little is left for the protocol to be told that nobody reads
            while transport.get_write_buffer_size() and not transport.is_closing():  # that goes out first
                await sleep(0.01)
    if transport.get_write_buffer_size():
        transport.abort()
    if transport.is_closing():
        await sleep(0)  # then uvicorn knows, and takes no more
        return
    # A descriptor of its own, since a loop lets nobody wait for that of a transport.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
        connection.setblocking(False)
        try:
            for index, piece in enumerate(pieces):
                if isinstance(piece, FileIO):
                    num_bytes = await _send_file(loop, connection, piece)
                else:
                    num_bytes = await _send_bytes(loop, connection, piece, is_last=index == len(pieces) - 1)
                cycle.expected_content_length -= num_bytes
        except OSError:  # the client has gone in the middle, or takes no more, or a file has been cut
            transport.abort()
            await sleep(0)


async def _send_file(loop: AbstractEventLoop, connection: socket.socket, file: FileIO) -> int:
    num_bytes, at = os.fstat(file.fileno()).st_size, 0
    while at < num_bytes:
        try:
            num_sent = os.sendfile(connection.fileno(), file.fileno(), at, num_bytes - at)
        except BlockingIOError:  # the client reads no faster
            await _wait_for(loop, connection)
            continue
        except OSError as error:
            if at or error.errno not in _CANNOT:
                raise
            return await _send_bytes(loop, connection, await to_thread(file.readall), is_last=True)
        if not num_sent:
            raise OSError(errno.EIO, "the file has become shorter")
        at += num_sent
    return num_bytes


async def _send_bytes(loop: AbstractEventLoop, connection: socket.socket, data: bytes, *, is_last: bool) -> int:
    """is_last: nothing follows that could go into the same segment."""
    left = memoryview(data)
    while left:
        try:
            left = left[connection.send(left, 0 if is_last else _MORE) :]
        except BlockingIOError:
            await _wait_for(loop, connection)
    return len(data)


async def _wait_for(loop: AbstractEventLoop, connection: socket.socket) -> None:
    """Until the kernel takes more, or the client has gone.

    Raises:
        TimeoutError: it takes no more, since the client does not read.
    """
    ready = Event()
    loop.add_writer(connection, ready.set)
    try:
        async with timeout(READ_TIMEOUT_S):
            await ready.wait()
    finally:
        loop.remove_writer(connection)
