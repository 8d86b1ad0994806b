"""multipart/related: read in pieces of any size, written as the standard has it, and never taken for what it is not."""

import random
from email import message_from_bytes

import pytest

from node.web.multipart import (
    MultipartError,
    MultipartReader,
    PartBegins,
    PartData,
    boundary_of,
    end_of,
    parse_content_type,
    part_head,
)


def body_of(parts: list[bytes], boundary: str = "xx") -> bytes:
    return b"".join(part_head(boundary, "application/dicom") + part for part in parts) + end_of(boundary)


def read(body: bytes, *, boundary: str = "xx", size: int = 1 << 20, max_parts: int = 100) -> list[bytes]:
    """The parts of a body that arrives in pieces of this size."""
    reader = MultipartReader(boundary, max_parts)
    parts: list[bytes] = []
    for start in range(0, len(body), size):
        for event in reader.feed(body[start : start + size]):
            if isinstance(event, PartBegins):
                parts.append(b"")
            elif isinstance(event, PartData):
                parts[-1] += bytes(event.data)
    reader.close()
    return parts


PARTS = [b"", b"\r\n", b"-xx", b"\r\n--x", b"a\r\n\r\nb", bytes(range(256)) * 5, b"\r\n--xy--\r\n", b"-"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 1000, 1 << 20])
def test_parts_come_back_whatever_the_pieces(size: int) -> None:
    assert read(body_of(PARTS), size=size) == PARTS


def test_random_parts_come_back_from_random_pieces() -> None:
    rng = random.Random(7)
    for _ in range(200):
        parts = [
            b"".join(rng.choice([b"\r\n", b"--", b"xx", b"\r", b"q"]) for _ in range(rng.randrange(12)))
            for _ in range(rng.randrange(1, 5))
        ]
        if any(b"\r\n--xx" in b"\r\n" + part for part in parts):
            continue  # no boundary for such a part
        assert read(body_of(parts), size=rng.randrange(1, 9)) == parts


def test_an_independent_reader_agrees() -> None:
    head = b"Content-Type: multipart/related; boundary=xx\r\n\r\n"
    message = message_from_bytes(head + body_of([b"one", b"two"]))
    assert [part.get_payload() for part in message.get_payload()] == ["one", "two"]  # type: ignore[union-attr]


def test_what_stands_before_the_first_and_after_the_last_boundary_is_ignored() -> None:
    assert read(b"preamble" + body_of([b"one"]) + b"epilogue --xx") == [b"one"]


def test_the_first_boundary_may_begin_the_body() -> None:
    assert read(b"--xx\r\nA: b\r\n\r\none\r\n--xx--") == [b"one"]
    assert read(b"--xx\r\n\r\none\r\n--xx--") == [b"one"]  # no headers


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "cut"),
        (b"--xx", "cut"),
        (b"--xx--", "no part"),
        (b"--yy\r\n\r\none\r\n--yy--", "cut"),
        (body_of([b"one"])[:-8], "cut"),
        (b"--xxy\r\n\r\none\r\n--xx--", "other text"),
        (b"--xx\r\nno colon\r\n\r\none\r\n--xx--", "without a name"),
        (b"--xx\r\nA: " + b"b" * 9000 + b"\r\n\r\n", "longer than"),
        (body_of([b"one"] * 101), "more than 100 parts"),
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_what_is_wrong_is_said(body: bytes, why: str, size: int) -> None:
    with pytest.raises(MultipartError, match=why):
        read(body, size=size)


def test_mutated_bodies_end_in_parts_or_in_one_kind_of_error() -> None:
    rng = random.Random(11)
    good = body_of([b"one" * 10, b"two\r\n--x", b""])
    for _ in range(3000):
        body = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(body))
            if rng.random() < 0.5:
                body[at] = rng.randrange(256)
            else:
                del body[at : at + rng.randrange(4)]
        try:
            parts = read(bytes(body), size=rng.randrange(1, 40), max_parts=10)
        except MultipartError:
            continue
        assert sum(map(len, parts)) <= len(body)


def test_little_is_held_however_long_a_part_is() -> None:
    reader = MultipartReader("xx", 10)
    list(reader.feed(part_head("xx", "application/dicom")))
    for _ in range(100):
        list(reader.feed(b"z" * 65536))
        assert len(reader._buffer) < 100


@pytest.mark.parametrize(
    "value",
    [
        "",
        "application/dicom",
        "multipart/related",
        "multipart/related; boundary=",
        "multipart/related; boundary=" + "b" * 71,
        'multipart/related; boundary="a\r\nb"',
        "multipart/form-data; boundary=xx",
    ],
)
def test_a_body_without_a_usable_boundary_is_refused(value: str) -> None:
    with pytest.raises(MultipartError):
        boundary_of(value)


@pytest.mark.parametrize(
    "value",
    [
        "multipart/related; type=application/dicom; boundary=xx",
        'Multipart/Related; type="application/dicom"; boundary="xx"',
        "multipart/related;boundary=xx;type=application/dicom",
    ],
)
def test_boundaries_are_found_quoted_or_not(value: str) -> None:
    assert boundary_of(value) == "xx"


def test_parameters_keep_their_case() -> None:
    assert parse_content_type('Application/DICOM; Transfer-Syntax=1.2; Type="A/b"') == (
        "application/dicom",
        {"transfer-syntax": "1.2", "type": "A/b"},
    )
