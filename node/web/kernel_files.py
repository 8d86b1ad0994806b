"""Files that the kernel sends: an ASGI extension, and uvicorn's HTTP protocol with it.

ASGI's `http.response.pathsend` is a body of one file, and uvicorn has not got it. This one sends a file as the next
piece of a body, so that the Instances of a multipart answer do not pass through Python. It is there only where the
kernel can do it: without TLS, which has to encrypt, and with a uvicorn that is built as the tests know it. Where it is
not, or an event loop has no `sendfile` (uvloop), the file is read and sent like anything else.
"""

from asyncio import AbstractEventLoop, sleep, to_thread
from collections.abc import Awaitable, Callable
from functools import partial
from io import FileIO

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SendFile = Callable[[FileIO], Awaitable[None]]

_EXTENSION = "cspine.http.response.file"
_NEEDED = ("expected_content_length", "send", "transport")


def send_file_of(scope: Scope) -> SendFile | None:
    """What sends a whole file, and closes it, as the next piece of an answer whose Content-Length has been sent.

    It returns when the kernel has taken all, or the client has gone. None: this connection has no such thing.
    """
    found: SendFile | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("send")
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
            self.scope["extensions"] = {_EXTENSION: {"send": partial(_send_file, self.loop, cycle)}}


async def _send_file(loop: AbstractEventLoop, cycle: RequestResponseCycle, file: FileIO) -> None:
    with file:
        if cycle.transport.is_closing():
            await sleep(0)  # then uvicorn knows, and takes no more
            return
        try:  # waits until what was written before has gone out, then as long as the client does not read
            cycle.expected_content_length -= await loop.sendfile(cycle.transport, file, fallback=False)
        except RuntimeError:  # nothing was sent: this loop or file system cannot do it, or the client has gone
            data = await to_thread(file.readall)
            await cycle.send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:  # the client has gone in the middle
            cycle.transport.abort()
            await sleep(0)
