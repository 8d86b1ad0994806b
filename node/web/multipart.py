"""multipart/related as DICOMweb uses it: read as a stream, without ever holding a part, and written as one.

`MultipartReader` is fed what arrives, in pieces of any size, and says what it saw; it opens no file and no socket.

Reference: RFC 2046 5.1, RFC 2387; PS3.18 8.6.1.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

_MAX_HEADER_BYTES = 8192
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")


class MultipartError(ValueError):
    """The body is not what its Content-Type says; the message says why."""


class TooManyPartsError(MultipartError):
    """The body has more parts than are taken."""


class MediaTypeError(MultipartError):
    """The body is no multipart/related."""


@dataclass(frozen=True)
class PartBegins:
    """A part's headers, names in lower case."""

    headers: dict[str, str]


@dataclass(frozen=True)
class PartData:
    """The next bytes of the part that began last; only valid until more is fed."""

    data: bytes | memoryview


@dataclass(frozen=True)
class PartEnds:
    """The part is complete."""


Event = PartBegins | PartData | PartEnds


def parse_content_type(value: str) -> tuple[str, dict[str, str]]:
    """Media type and parameters of a Content-Type, or of one choice of an Accept header; `("", {})` for no such thing.

    Type and names of parameters are in lower case, their values as they come.
    """
    if not value.isprintable():
        return "", {}
    message = Message()
    message["Content-Type"] = value
    kind, *parameters = message.get_params(failobj=[("", "")])
    return kind[0].strip().lower(), {name.lower(): text for name, text in parameters}


def boundary_of(content_type: str) -> str:
    """The boundary of a multipart/related body.

    Raises:
        MediaTypeError: it is not one.
        MultipartError: it has no usable boundary.
    """
    kind, parameters = parse_content_type(content_type)
    if kind != "multipart/related":
        raise MediaTypeError(f"Content-Type is {kind or 'missing'}; multipart/related is needed")
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise MultipartError("multipart/related has no boundary, or one that RFC 2046 does not allow")
    return boundary


class MultipartReader:
    """Reads one body. `feed` what arrives, then `close`.

    max_parts: more are an error.
    """

    def __init__(self, boundary: str, max_parts: int) -> None:
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._max_parts = max_parts
        # The first delimiter may stand at the very beginning, as if a line had ended before it.
        self._buffer = bytearray(b"\r\n")
        self._state = self._preamble
        self._num_parts = 0
        self._is_over = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """What the bytes bring.

        Raises:
            MultipartError: a part has no end to its headers.
            TooManyPartsError: there are too many parts.
        """
        self._buffer += data
        while not self._is_over:
            events, goes_on = self._state()
            yield from events
            if not goes_on:
                return
        self._buffer.clear()  # what follows the last delimiter is to be ignored

    def close(self) -> None:
        """The body has ended.

        Raises:
            MultipartError: in the middle of something, or without any part.
        """
        if not self._is_over:
            raise MultipartError("the body ends before its last boundary; it was cut, or the boundary is another")
        if self._num_parts == 0:
            raise MultipartError("the body has no part")

    # Each state takes what it can from the buffer; its events, and whether the next state can go on at once.

    def _preamble(self) -> tuple[list[Event], bool]:
        found = self._buffer.find(self._delimiter)
        if found < 0:
            del self._buffer[: max(0, len(self._buffer) - len(self._delimiter) + 1)]
            return [], False
        del self._buffer[: found + len(self._delimiter)]
        self._state = self._after_delimiter
        return [], True

    def _after_delimiter(self) -> tuple[list[Event], bool]:
        if len(self._buffer) < 2:
            return [], False
        if self._buffer.startswith(b"--"):
            self._is_over = True
            return [], True
        line_end = self._buffer.find(b"\r\n")
        if line_end < 0 and len(self._buffer) < _MAX_HEADER_BYTES:
            return [], False
        if line_end < 0 or self._buffer[:line_end].strip(b" \t"):
            raise MultipartError("a boundary is followed by other text on its line")
        del self._buffer[:line_end]  # the line's end is also that of an empty header
        self._state = self._headers
        return [], True

    def _headers(self) -> tuple[list[Event], bool]:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or end > _MAX_HEADER_BYTES:
            if end > 0 or len(self._buffer) > _MAX_HEADER_BYTES:
                raise MultipartError(f"the headers of a part are longer than {_MAX_HEADER_BYTES} bytes")
            return [], False
        self._num_parts += 1
        if self._num_parts > self._max_parts:
            raise TooManyPartsError(f"there are more than {self._max_parts} parts; send fewer at a time")
        begins = PartBegins(_parse_headers(bytes(self._buffer[:end])))
        # The empty line's end stays: a delimiter may follow it at once.
        del self._buffer[: end + 2]
        self._state = self._first_data
        return [begins], True

    def _first_data(self) -> tuple[list[Event], bool]:
        if len(self._buffer) < len(self._delimiter):
            return [], False
        if self._buffer.startswith(self._delimiter):  # an empty part
            return self._end_part(0, [])
        del self._buffer[:2]
        self._state = self._data
        return [], True

    def _data(self) -> tuple[list[Event], bool]:
        found = self._buffer.find(self._delimiter)
        if found >= 0:
            return self._end_part(found, [PartData(self._first(found))] if found else [])
        sure = len(self._buffer) - len(self._delimiter) + 1
        if sure <= 0:
            return [], False
        data = self._first(sure)
        del self._buffer[:sure]
        return [PartData(data)], False

    def _first(self, num_bytes: int) -> bytes:
        """Copied once: a slice of a bytearray would be a copy of its own."""
        with memoryview(self._buffer) as view:
            return bytes(view[:num_bytes])

    def _end_part(self, at: int, events: list[Event]) -> tuple[list[Event], bool]:
        del self._buffer[: at + len(self._delimiter)]
        self._state = self._after_delimiter
        return [*events, PartEnds()], True


def _parse_headers(text: bytes) -> dict[str, str]:
    """Header lines, each begun by a line end; one that has no colon is an error."""
    headers = {}
    for line in text.decode("latin-1").split("\r\n"):
        if not line.strip():
            continue
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name.strip()):
            raise MultipartError("a part has a header line without a name")
        headers[name.strip().lower()] = value.strip()
    return headers


def part_head(boundary: str, content_type: str, **headers: str) -> bytes:
    """What stands before a part's bytes, the delimiter included. headers: with underscores for hyphens."""
    lines = [f"--{boundary}", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def end_of(boundary: str) -> bytes:
    """What stands after the last part."""
    return f"\r\n--{boundary}--\r\n".encode("ascii")
