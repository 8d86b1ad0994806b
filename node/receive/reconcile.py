"""After a crash: what lies on disk and what the index says are made one again, both ways.

A file without a row was never acknowledged: it is removed, and its sender sends it again. A row without its whole file
was not either, unless a disk lost it: the two are synced at the same time, and a power cut may leave either alone. Then
the row goes too, so that the Instance is taken when it is sent again, and its case says what happened. A file may have
its length before its bytes, so those of associations that were open are read; what came with the others was
acknowledged.
"""

import logging
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from node.index import Index
from node.process import sync

log = logging.getLogger(__name__)

_READ_BYTES = 2**20


def reconcile(index: Index) -> int:
    """For the start of the node, when no receiver runs; returns how many files were removed."""
    root = index.data_dir / "instances"
    root.mkdir(exist_ok=True)
    sync(index.data_dir)
    _forget(index, (uid for uid, path, checksum in index.files_in_doubt() if _is_torn(path, checksum)))
    num_ended = index.end_lost_associations()
    num_strays = sum(_remove_strays(index, folder) for folder in root.iterdir() if folder.is_dir())
    if num_ended or num_strays:
        log.warning(
            "action=reconciled associations_ended=%d files_removed=%d that were never acknowledged",
            num_ended,
            num_strays,
        )
    _forget(index, (uid for uid, path, num_bytes in index.needed_files() if _is_lost(path, num_bytes)))
    return num_strays


def reconcile_run(index: Index, run: str) -> None:
    """For one run of a receiver that died, while others go on receiving."""
    _forget(index, (uid for uid, path, checksum in index.files_in_doubt(run) if _is_torn(path, checksum)))
    num_ended = index.end_lost_associations(run)
    num_strays = _remove_strays(index, index.data_dir / "instances" / run)
    if num_ended or num_strays:
        log.warning(
            "action=reconciled run=%s associations_ended=%d files_removed=%d that were never acknowledged",
            run,
            num_ended,
            num_strays,
        )


def _forget(index: Index, lost: Iterable[str]) -> None:
    if uids := list(lost):
        for series, reason in index.forget_instances(uids).items():
            log.error("action=instances-lost series=%s: %s", series, reason)


def _is_torn(path: Path, checksum: int | None) -> bool:
    """Whether it is not what was received; a file that is, is safely on disk from now on."""
    if checksum is None:
        return False
    try:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            found = 0
            while piece := file.read(_READ_BYTES):
                found = zlib.crc32(piece, found)
    except FileNotFoundError:
        return True
    return found != checksum


def _remove_strays(index: Index, folder: Path) -> int:
    """Removes files of a folder that no row names, and folders that are empty then; how many files had content."""
    if not folder.is_dir():  # it died before it made one
        return 0
    strays = set(folder.rglob("*.dcm")) - index.paths_under(folder)
    num_with_content = sum(path.stat().st_size > 0 for path in strays)  # the others were made ahead
    for path in strays:
        path.unlink()
    for place in (*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder):
        if not any(place.iterdir()):
            place.rmdir()
    return num_with_content


def _is_lost(path: Path, num_bytes: int | None) -> bool:
    try:
        return num_bytes is not None and path.stat().st_size != num_bytes
    except FileNotFoundError:
        return True
