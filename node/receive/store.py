"""One Instance to disk and index: checked, written as it came, fsynced, indexed; or refused with a status.

Knows no association and no socket; `server.py` calls it and answers.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import dcmread

from model import HEADER_TAGS, slice_headers
from node.config import Config
from node.index import Index
from node.process import sync
from node.receive.attributes import SERIES_TAGS, series_attributes

# C-STORE statuses (PS3.4 B.2.3)
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
CONFLICT = 0xC111


class RefusedError(Exception):
    """An Instance is not taken: the C-STORE status (PS3.4 B.2.3) and a sentence for the sender."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Received:
    """One Instance as it came.

    encoded: File Meta Information and dataset. sop_class_uid, sop_instance_uid: as the C-STORE request announces them.
    association_id: gives the row of the association, which the first Instance makes.
    """

    encoded: bytes
    sop_class_uid: str
    sop_instance_uid: str
    calling_ae_title: str
    association_id: Callable[[], int]


@dataclass(frozen=True)
class Store:
    """Where Instances go. Safe to use from several threads."""

    config: Config
    index: Index

    def put(self, instance: Received) -> None:
        """Returns once the Instance is safely on disk and in the index, or was already.

        Raises:
            RefusedError: it is not taken.
            OSError, SQLAlchemyError: it cannot be stored now.
        """
        free_mb = shutil.disk_usage(self.index.data_dir).free // 2**20
        if free_mb < self.config.receive.min_free_disk_mb:
            raise RefusedError(
                OUT_OF_RESOURCES, f"{free_mb} MB free, min_free_disk_mb is {self.config.receive.min_free_disk_mb}"
            )
        headers, attributes = _read(instance)
        uid, series_uid = headers[0]["sop_instance_uid"], headers[0]["series_instance_uid"]
        if self.index.is_result(uid):
            raise RefusedError(MISMATCH, "this node made this Instance; results are never analysed")
        known = self.index.find_instance(uid)
        if known is not None:
            _check_same(known, instance.encoded)
            return
        path = self.index.data_dir / "instances" / series_uid / f"{uid}.dcm"
        _write_durably(path, instance.encoded)
        try:
            is_new = self.index.add_instance(
                association_id=instance.association_id(),
                calling_ae_title=instance.calling_ae_title,
                path=path,
                headers=headers,
                attributes=attributes,
                quiet_time_s=self.config.complete.quiet_time_s,
            )
            if not is_new:  # the same UID came in another Series at this moment
                raise RefusedError(CONFLICT, "another Instance with this UID is here; the first one is kept")
        except BaseException:
            path.unlink()
            raise


def _read(instance: Received) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Headers and attributes as `NewInstance` has them."""
    tags = [*HEADER_TAGS, *SERIES_TAGS.values()]
    ds = dcmread(BytesIO(instance.encoded), stop_before_pixels=True, specific_tags=tags)
    # RSNA's files lack SOPClassUID and Modality: what is missing comes from the request, what differs is refused.
    for keyword, announced in (
        ("SOPClassUID", instance.sop_class_uid),
        ("SOPInstanceUID", instance.sop_instance_uid),
    ):
        if ds.get(keyword, announced) != announced:
            raise RefusedError(MISMATCH, f"{keyword} in the dataset is not the announced one")
        setattr(ds, keyword, announced)
    modality = ds.get("Modality") or "CT"
    if modality != "CT":
        raise RefusedError(MISMATCH, f"Modality is {modality!r:.20}; only CT is taken")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        if not is_uid(ds.get(keyword, "")):
            raise RefusedError(CANNOT_UNDERSTAND, f"{keyword} is missing or not a UID (PS3.5 9.1)")
    headers = slice_headers(ds)
    if not headers:
        raise RefusedError(CANNOT_UNDERSTAND, "the Instance has no frames")
    return [header.to_dict() for header in headers], series_attributes(ds)


def is_uid(value: object) -> bool:
    """Whether the value has the form of a UID (PS3.5 9.1): safe as a file name. Leading zeros are let pass."""
    return len(str(value)) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", str(value)) is not None


def _check_same(known: Path, encoded: bytes) -> None:
    """Passes when the stored Instance is the received one; the group 2 header may differ.

    Raises:
        RefusedError: it is another.
    """
    stored = known.read_bytes()
    if _dataset_of(stored) != _dataset_of(encoded):
        raise RefusedError(CONFLICT, "another Instance with this UID is here; the first one is kept")


def _dataset_of(encoded: bytes) -> memoryview:
    """What follows the File Meta Information, whose length its first element gives (PS3.10 7.1)."""
    return memoryview(encoded)[144 + int.from_bytes(encoded[140:144], "little") :]


def _write_durably(path: Path, encoded: bytes) -> None:
    """Writes a new file that survives a power cut; leaves nothing behind when it fails.

    Raises:
        RefusedError: the file is there already: another association is storing the same UID at this moment.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    except FileExistsError as error:
        raise RefusedError(OUT_OF_RESOURCES, "the same Instance is arriving on another association") from error
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            view = memoryview(encoded)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        sync(path.parent)
    except BaseException:
        path.unlink()
        raise
