"""One Instance to disk and index: written as it comes, checked, made durable, indexed; or refused with a status.

Knows no association and no socket; `lane.py` brings the pieces and answers.
"""

import errno
import logging
import os
import shutil
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.exc import SQLAlchemyError

from node.config import Config
from node.implementation import IMPLEMENTATION_CLASS_UID, implementation_version_name
from node.index import Index, NewInstance, StoredFile
from node.process import describe_error, sync
from node.receive.commit import GroupCommit
from node.receive.headers import NUM_PREFIX_BYTES, Announced, Encoded, HeaderReader, is_uid
from node.receive.sender import Source
from node.receive.spool import Spool
from node.receive.status import CANNOT_UNDERSTAND, CONFLICT, MISMATCH, OUT_OF_RESOURCES, RefusedError

log = logging.getLogger(__name__)

_COMPARED_BYTES = 2**20
_BEING_REMOVED = "the Instance here with this UID is just being removed"
_NUM_SYNCS = 16  # at the same time; with more associations some wait a little


class Store:
    """Where the Instances of one run of a receiver process go. Safe to use from several threads."""

    def __init__(self, config: Config, index: Index, run: str) -> None:
        self.index, self.run = index, run
        self.spool = Spool(index.data_dir / "instances" / run)
        self.headers = HeaderReader()
        self.commit = GroupCommit(index, config.complete.quiet_time_s)
        self.max_bytes = config.receive.max_instance_mb * 2**20
        self._min_free_mb = config.receive.min_free_disk_mb
        self._syncs = ThreadPoolExecutor(_NUM_SYNCS, thread_name_prefix="sync")

    def begin(self, announced: Announced, sender: Source) -> "Arriving":
        """An Instance that begins to arrive; to be ended by `finish` or `abandon`.

        Raises:
            RefusedError: it is not taken.
            OSError: it cannot be stored now.
        """
        if not is_uid(announced.sop_instance_uid):
            raise RefusedError(CANNOT_UNDERSTAND, "the announced SOPInstanceUID is not a UID (PS3.5 9.1)")
        free_mb = shutil.disk_usage(self.index.data_dir).free // 2**20
        if free_mb < self._min_free_mb:
            raise RefusedError(OUT_OF_RESOURCES, f"{free_mb} MB free, min_free_disk_mb is {self._min_free_mb}")
        return Arriving(self, announced, sender)

    def sync(self, file: FileIO) -> Future[None]:
        """Begins to make the bytes of a file durable, which is not to be closed before that has ended."""
        return self._syncs.submit(os.fdatasync, file.fileno())

    def close(self) -> None:
        """Removes what was made ahead, once nothing is being received."""
        self.spool.close()
        self._syncs.shutdown()


class Arriving:
    """One Instance on its way to disk. After an error it is abandoned already: no part of it stays."""

    def __init__(self, store: Store, announced: Announced, sender: Source) -> None:
        self._store, self._announced, self._sender = store, announced, sender
        self._prefix = bytearray()
        self._num_bytes = self._checksum = 0
        self._syncing: Future[None] | None = None
        self._path, self._file = store.spool.take()
        meta = file_meta(announced)
        self._start = len(meta)
        self._write(memoryview(meta))

    def write(self, piece: memoryview) -> None:
        """Takes the next piece of the dataset.

        Raises:
            RefusedError: it grew larger than an Instance may be.
            OSError: the disk is full or cannot be written.
        """
        self._num_bytes += len(piece)
        if self._num_bytes > self._store.max_bytes:
            self.abandon()
            raise RefusedError(CANNOT_UNDERSTAND, f"larger than max_instance_mb ({self._store.max_bytes >> 20})")
        if (num_wanted := NUM_PREFIX_BYTES - len(self._prefix)) > 0:
            self._prefix += piece[:num_wanted]
        self._write(piece)

    def finish(self) -> NewInstance:
        """What came, once it is safely on disk and in the index, or was already.

        File and row go to disk at the same time, one sync in place of two that wait for each other. Should the row get
        there alone, the Instance was not acknowledged, and `reconcile.py` finds it by its checksum.

        Raises:
            RefusedError: it is not taken.
            OSError, SQLAlchemyError: it cannot be stored now.
            Exception: it cannot be parsed.
        """
        try:
            self._syncing = self._store.sync(self._file)
            instance = self._examined()
            is_new = self._store.commit.add(instance)
            try:
                self._syncing.result()
            except BaseException:
                if is_new:
                    self._store.index.forget_instances([instance.sop_instance_uid])
                raise
            if not is_new:
                if self._store.index.is_result(instance.sop_instance_uid):
                    raise RefusedError(MISMATCH, "this node made this Instance; results are never analysed")
                known = self._store.index.stored_file(instance.sop_instance_uid)
                if known is None:
                    raise RefusedError(OUT_OF_RESOURCES, _BEING_REMOVED)
                if not known.is_whole():
                    self._replace(known, instance)
                elif not _is_same(known.path, self._path):
                    raise self._conflict(known, "another Instance with this UID is here; the first one is kept")
                self.abandon()
            self._file.close()
            return instance
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Removes what has come of it."""
        if self._syncing is not None:
            wait([self._syncing])
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _replace(self, lost: StoredFile, instance: NewInstance) -> None:
        """Puts what came, which is safely on disk, in the place of a stored file that was lost or cut off.

        First the row: should the file not get there, it is still one that is not as its row says.

        Raises:
            RefusedError: the Instance was of another Series, or went away at this moment.
            OSError: it cannot be put there.
        """
        if instance.series_instance_uid != lost.series_instance_uid:
            raise self._conflict(lost, "another Instance with this UID was here, in another Series")
        if not self._store.index.replace_instance(instance):
            raise RefusedError(OUT_OF_RESOURCES, _BEING_REMOVED)
        lost.path.parent.mkdir(parents=True, exist_ok=True)
        self._path.replace(lost.path)
        for folder in (lost.path.parent, lost.path.parent.parent, self._store.index.data_dir / "instances"):
            sync(folder)
        log.warning("action=instance-restored series=%s instance=%s", lost.series_instance_uid, lost.sop_instance_uid)

    def _conflict(self, known: StoredFile, comment: str) -> RefusedError:
        """The refusal, noted for the Series of the Instance that is known; it stands if that cannot be noted."""
        try:
            self._store.index.note_conflict(known.series_instance_uid, self._sender.ae_title)
        except (OSError, SQLAlchemyError) as error:
            log.warning("action=conflict-not-noted series=%s: %s", known.series_instance_uid, describe_error(error))
        return RefusedError(CONFLICT, comment)

    def _examined(self) -> NewInstance:
        """What the index is to know of it, if it is taken."""
        encoded = Encoded(prefix=bytes(self._prefix), num_bytes=self._num_bytes, path=self._path, start=self._start)
        read = self._store.headers.read(encoded, self._announced)
        study_uid = self._announced.study_instance_uid
        if study_uid and study_uid != read.headers[0]["study_instance_uid"]:
            raise RefusedError(MISMATCH, "StudyInstanceUID in the dataset is not the announced one")
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "somebody removed the file", str(self._path))
        return NewInstance(
            association_id=self._sender.association_id(),
            calling_ae_title=self._sender.ae_title,
            path=self._path,
            num_bytes=self._start + self._num_bytes,
            checksum=self._checksum,
            headers=read.headers,
            attributes=read.attributes,
        )

    def _write(self, piece: memoryview) -> None:
        try:
            self._checksum = zlib.crc32(piece, self._checksum)
            while piece:
                piece = piece[self._file.write(piece) :]
        except BaseException:
            self.abandon()
            raise


def _is_same(known: Path, received: Path) -> bool:
    """Whether the stored Instance is the received one, and it is on disk then; the group 2 header may differ."""
    with known.open("rb") as one, received.open("rb") as other:
        os.fdatasync(one.fileno())  # whoever brings it may be waiting for that, too
        sizes = [_seek_dataset(file) for file in (one, other)]
        is_same = sizes[0] == sizes[1]
        while is_same and (piece := one.read(_COMPARED_BYTES)):
            is_same = piece == other.read(_COMPARED_BYTES)
    return is_same


def _seek_dataset(file: BinaryIO) -> int:
    """Goes behind the File Meta Information, whose length its first element gives (PS3.10 7.1); what follows, bytes."""
    start = 144 + int.from_bytes(file.read(144)[140:], "little")
    return file.seek(0, os.SEEK_END) - file.seek(start)


def file_meta(announced: Announced) -> bytes:
    """Preamble and File Meta Information as pydicom writes them, by the name that an association announces.

    Reference: PS3.10 7.1.
    """
    elements = b"\x02\0\x01\0OB\0\0\x02\0\0\0\0\x01" + b"".join(
        struct.pack("<HH2sH", 2, number, vr, len(value)) + value
        for number, vr, value in (
            (0x0002, b"UI", _even(announced.sop_class_uid, b"\0")),
            (0x0003, b"UI", _even(announced.sop_instance_uid, b"\0")),
            (0x0010, b"UI", _even(announced.transfer_syntax_uid, b"\0")),
            (0x0012, b"UI", _even(IMPLEMENTATION_CLASS_UID, b"\0")),
            (0x0013, b"SH", _even(implementation_version_name(), b" ")),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(elements)) + elements


def _even(text: str, padding: bytes) -> bytes:
    value = text.encode("ascii")
    return value + padding * (len(value) % 2)
