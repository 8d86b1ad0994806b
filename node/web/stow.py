"""STOW-RS: the parts of a request go to disk as they arrive, by the same way as C-STORE (`node/receive/store.py`).

200 goes out only when every Instance is safely on disk and in the index. Several parts are made durable at the same
time, so that their transactions can be one.

Reference: PS3.18 10.5 (Store), table I.2-1 (the answer), I.2-2 (Failure Reasons).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from model import PARSE_ERRORS
from node.index import NewInstance
from node.process import describe_error
from node.receive.headers import Announced
from node.receive.incoming import IncomingFile
from node.receive.sender import Source
from node.receive.status import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, RefusedError
from node.receive.store import Store
from node.web.multipart import (
    MediaTypeError,
    MultipartReader,
    PartBegins,
    PartData,
    PartEnds,
    boundary_of,
    parse_content_type,
)
from node.web.wado import DICOM, instance_url, study_url

log = logging.getLogger(__name__)

_MAX_PENDING = 8  # parts that are being made durable at the same time


class TooLargeError(Exception):
    """The request is larger than is taken; the message says how large one may be."""


@dataclass
class Stored:
    """What became of the parts of a request."""

    taken: list[tuple[Announced, NewInstance]] = field(default_factory=list)
    failed: list[tuple[Announced | None, int]] = field(default_factory=list)
    num_of_other_types: int = 0  # of those that failed

    @property
    def status(self) -> int:
        """Of HTTP (PS3.18 table 10.5.3-1). 409 would be the same again; 503 asks the sender to come back."""
        if not self.failed:
            return 200
        if self.taken:
            return 202
        if self.num_of_other_types == len(self.failed):
            return 415
        return 503 if any(status == OUT_OF_RESOURCES for _, status in self.failed) else 409

    def to_json(self, root: str) -> dict[str, Any]:
        """The Store Instances Response Module as DICOM JSON. root: the address of the service."""
        urls = sorted({study_url(instance, root) for _, instance in self.taken})
        # The Study's, without a value where that would be several or none.
        answer: dict[str, Any] = {"00081190": {"vr": "UR"} | ({"Value": urls} if len(urls) == 1 else {})}
        if self.taken:
            items = [
                _reference(announced) | {"00081190": {"vr": "UR", "Value": [instance_url(instance, root)]}}
                for announced, instance in self.taken
            ]
            answer["00081199"] = {"vr": "SQ", "Value": items}
        for announced, status in self.failed:
            # What names no Instance stands in Other Failures: the items of Failed SOP must.
            failures = answer.setdefault("00081198" if announced else "0008119A", {"vr": "SQ", "Value": []})
            failures["Value"].append(
                (_reference(announced) if announced else {}) | {"00081197": {"vr": "US", "Value": [status]}}
            )
        return answer


def _reference(announced: Announced) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [announced.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [announced.sop_instance_uid]},
    }


def boundary_of_request(headers: Mapping[str, str]) -> str:
    """The boundary of a request's body, by its headers.

    Raises:
        MediaTypeError: the body is not multipart/related of DICOM files, or is encoded.
        MultipartError: it has no usable boundary.
    """
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaTypeError(f"Content-Encoding is {encoding:.40}; a body is taken as it is")
    content_type = headers.get("content-type", "")
    _, parameters = parse_content_type(content_type)
    if (part_type := parameters.get("type", DICOM).lower()) != DICOM:
        raise MediaTypeError(f"the parts are {part_type:.40}; {DICOM} is taken")
    return boundary_of(content_type)


async def store_parts(
    body: AsyncIterator[bytes],
    reader: MultipartReader,
    store: Store,
    source: Source,
    stored: Stored,
    *,
    study_instance_uid: str,
    max_bytes: int,
) -> None:
    """Stores what arrives; returns when the body has ended and everything that is taken is durable.

    stored: is told what becomes of each part, also when an error ends the request. study_instance_uid: Instances of
    another Study are refused; "" takes any.

    Raises:
        MultipartError: the body is broken. What was complete before is stored.
        TooLargeError: it is too large; likewise.
        Exception: what `body` raises; likewise.
    """
    pending: set[asyncio.Task[None]] = set()
    part: IncomingFile | None = None
    num_bytes = 0
    try:
        async for chunk in body:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise TooLargeError(f"a request may have {max_bytes >> 20} MB (web.max_body_mb)")
            for event in reader.feed(chunk):
                if isinstance(event, PartBegins):
                    part = IncomingFile(store, source, study_instance_uid)
                    kind, _ = parse_content_type(event.headers.get("content-type", DICOM))
                    if kind != DICOM:
                        part.refusal = RefusedError(CANNOT_UNDERSTAND, f"the part is {kind:.40}; {DICOM} is taken")
                        stored.num_of_other_types += 1
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


async def _finish(part: IncomingFile, stored: Stored) -> None:
    """Makes a part durable and notes how that went."""
    cause = ""
    try:
        instance = await asyncio.to_thread(part.finish)
        assert part.announced is not None
        stored.taken.append((part.announced, instance))
        return
    except RefusedError as refusal:
        status, comment = refusal.status, str(refusal)
    except (OSError, SQLAlchemyError) as error:
        status, comment, cause = OUT_OF_RESOURCES, "cannot be stored now; send it again later", describe_error(error)
    except PARSE_ERRORS as error:
        status, comment, cause = CANNOT_UNDERSTAND, "the dataset cannot be parsed", describe_error(error)
    uid = part.announced.sop_instance_uid if part.announced else ""
    log.warning("action=instance-refused by=stow instance=%r status=0x%04X: %s %s", uid[:64], status, comment, cause)
    stored.failed.append((part.announced, status))
