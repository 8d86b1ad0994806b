"""STOW-RS: the parts of a request go to disk as they arrive, by the same way as C-STORE (`node/receive/store.py`).

200 goes out only when every Instance is safely on disk and in the index. Several parts are made durable at the same
time, so that their transactions can be one.

Reference: PS3.18 10.5 (Store), table I.2-1 (the answer), I.2-2 (Failure Reasons).
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from typing import Any

from pydicom import dcmread
from sqlalchemy.exc import SQLAlchemyError

from model import PARSE_ERRORS
from node.process import describe_error
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.receive.headers import Announced
from node.receive.sender import Source
from node.receive.status import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, RefusedError
from node.receive.store import Arriving, Store
from node.web.multipart import MultipartReader, PartBegins, PartData, PartEnds

log = logging.getLogger(__name__)

_PREAMBLE_BYTES = 144  # preamble, prefix, and the element that gives the length of the File Meta Information
_MAX_META_BYTES = 65536
# Failure Reasons that C-STORE has no need for: it refuses the presentation context (PS3.18 table I.2-2).
_NO_SOP_CLASS, _NO_TRANSFER_SYNTAX = 0x0122, 0xC122
_MAX_PENDING = 8  # parts that are being made durable at the same time


class TooLargeError(Exception):
    """The request is larger than is taken; the message says how large one may be."""


@dataclass
class Stored:
    """What became of the parts of a request."""

    taken: list[Announced] = field(default_factory=list)
    failed: list[tuple[Announced | None, int, str]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Of HTTP (PS3.18 table 10.5.3-1)."""
        if not self.failed:
            return 200
        return 202 if self.taken else 409

    def to_json(self, root: str) -> dict[str, Any]:
        """The Store Instances Response Module as DICOM JSON. root: the address of the service."""
        answer: dict[str, Any] = {}
        if self.taken:
            items = [
                _reference(announced) | {"00081190": {"vr": "UR", "Value": [f"{root}/{_path(announced)}"]}}
                for announced in self.taken
            ]
            answer["00081199"] = {"vr": "SQ", "Value": items}
        if self.failed:
            failures = [
                (_reference(announced) if announced else {})
                | {"00081197": {"vr": "US", "Value": [status]}, "00000902": {"vr": "LO", "Value": [comment[:64]]}}
                for announced, status, comment in self.failed
            ]
            answer["00081198"] = {"vr": "SQ", "Value": failures}
        return answer


def _reference(announced: Announced) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [announced.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [announced.sop_instance_uid]},
    }


def _path(announced: Announced) -> str:
    return f"instances?SOPInstanceUID={announced.sop_instance_uid}"


class _Part:
    """One part of the body: a DICOM file, of which the File Meta Information comes first."""

    def __init__(self, store: Store, source: Source, study_instance_uid: str) -> None:
        self._store, self._source, self._study = store, source, study_instance_uid
        self._head = bytearray()
        self._arriving: Arriving | None = None
        self.announced: Announced | None = None
        self.refusal: RefusedError | None = None

    def write(self, data: memoryview) -> None:
        """Takes the next bytes; what is refused is read on and thrown away."""
        try:
            if self.refusal is not None:
                return
            if self._arriving is None:
                self._head += data
                data = self._begin()
            if self._arriving is not None:
                self._arriving.write(data)
        except RefusedError as refusal:
            self.refusal, self._arriving = refusal, None

    def _begin(self) -> memoryview:
        """Reads the File Meta Information once it is here; what has come of the dataset.

        Raises:
            RefusedError: it is no DICOM file, or is not taken.
        """
        nothing = memoryview(b"")
        if len(self._head) < _PREAMBLE_BYTES:
            return nothing
        end = _PREAMBLE_BYTES + int.from_bytes(self._head[140:144], "little")
        if self._head[128:138] != b"DICM\x02\x00\x00\x00UL" or end > _MAX_META_BYTES:
            raise RefusedError(CANNOT_UNDERSTAND, "the part is not a DICOM file (PS3.10 7.1)")
        if len(self._head) < end:
            return nothing
        try:
            meta = dcmread(BytesIO(bytes(self._head[:end]))).file_meta
            self.announced = Announced(
                sop_class_uid=str(meta.MediaStorageSOPClassUID),
                sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
                transfer_syntax_uid=str(meta.TransferSyntaxUID),
                study_instance_uid=self._study,
            )
        except PARSE_ERRORS as error:
            raise RefusedError(CANNOT_UNDERSTAND, "its File Meta Information lacks a UID (PS3.10 7.1)") from error
        if self.announced.sop_class_uid not in CT_SOP_CLASSES:
            raise RefusedError(_NO_SOP_CLASS, "only CT is taken")
        if self.announced.transfer_syntax_uid not in _transfer_syntaxes():
            raise RefusedError(_NO_TRANSFER_SYNTAX, "its transfer syntax cannot be decoded here")
        self._arriving = self._store.begin(self.announced, self._source)
        rest = memoryview(bytes(self._head[end:]))
        self._head.clear()
        return rest

    def finish(self) -> None:
        """Makes it durable; called in a thread.

        Raises:
            RefusedError, OSError, SQLAlchemyError: it is not taken.
        """
        if self.refusal is not None:
            raise self.refusal
        if self._arriving is None:
            raise RefusedError(CANNOT_UNDERSTAND, "the part is not a DICOM file (PS3.10 7.1)")
        self._arriving.finish()

    def abandon(self) -> None:
        """The request broke off."""
        if self._arriving is not None:
            self._arriving.abandon()


@cache
def _transfer_syntaxes() -> frozenset[str]:
    return frozenset(decodable_transfer_syntaxes())


async def store_parts(
    body: AsyncIterator[bytes],
    reader: MultipartReader,
    store: Store,
    source: Source,
    *,
    study_instance_uid: str,
    max_bytes: int,
    timeout_s: float,
) -> Stored:
    """Stores what arrives; returns when the body has ended and everything that is taken is durable.

    study_instance_uid: Instances of another Study are refused; "" takes any.

    Raises:
        MultipartError: the body is broken. What was complete before is stored.
        TooLargeError: it is too large; likewise.
        TimeoutError: it stopped arriving; likewise.
    """
    stored = Stored()
    pending: set[asyncio.Task[None]] = set()
    part: _Part | None = None
    num_bytes = 0
    try:
        while chunk := await asyncio.wait_for(anext(body, b""), timeout_s):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise TooLargeError(f"a request may have {max_bytes >> 20} MB (web.max_body_mb)")
            for event in reader.feed(chunk):
                if isinstance(event, PartBegins):
                    part = _Part(store, source, study_instance_uid)
                elif isinstance(event, PartData):
                    assert part is not None
                    part.write(memoryview(event.data))
                elif isinstance(event, PartEnds):
                    assert part is not None
                    pending.add(asyncio.create_task(_finish(part, stored)))
                    part = None
            if len(pending) >= _MAX_PENDING:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        reader.close()
    finally:
        if part is not None:
            part.abandon()
        if pending:
            await asyncio.wait(pending)
    return stored


async def _finish(part: _Part, stored: Stored) -> None:
    """Makes a part durable and notes how that went."""
    cause = ""
    try:
        await asyncio.to_thread(part.finish)
        assert part.announced is not None
        stored.taken.append(part.announced)
        return
    except RefusedError as refusal:
        status, comment = refusal.status, str(refusal)
    except (OSError, SQLAlchemyError) as error:
        status, comment, cause = OUT_OF_RESOURCES, "cannot be stored now; send it again later", describe_error(error)
    except PARSE_ERRORS as error:
        status, comment, cause = CANNOT_UNDERSTAND, "the dataset cannot be parsed", describe_error(error)
    uid = part.announced.sop_instance_uid if part.announced else ""
    log.warning("action=instance-refused by=stow instance=%.64r status=0x%04X: %s %s", uid, status, comment, cause)
    stored.failed.append((part.announced, status, comment))
