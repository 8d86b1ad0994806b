"""After a crash: what lies on disk and what the index says are made one again, both ways.

A file without a row was never acknowledged: it is removed, and its sender sends it again. A row without its whole file
was not either, unless a disk lost it: the two are synced at the same time, and a power cut may leave either alone. Then
the row goes too, so that the Instance is taken when it is sent again, and its case says what happened; of a Series that
is done with, the row stays, since the results stand, and what is sent again takes the place of the file (`store.py`). A
file may have its length before its bytes, so those of associations that were open are read; what came with the others
was acknowledged. A file that cannot be looked at, for a broken disk or a wrong owner, is named in the log and left as
it is: one file keeps no node from starting.
"""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path

from node.index import Index, is_whole
from node.process import sync

log = logging.getLogger(__name__)

_READ_BYTES = 2**20
_GONE = (FileNotFoundError, NotADirectoryError)


def reconcile(index: Index) -> int:
    """For the start of the node, when no receiver runs; returns how many files were removed."""
    root = index.data_dir / "instances"
    root.mkdir(exist_ok=True)
    sync(index.data_dir)
    _forget(index, (uid for uid, path, checksum in index.files_in_doubt() if _is_torn(path, checksum)))
    num_ended = index.end_lost_associations()
    known = index.paths_under(root)
    num_strays = sum(_remove_strays(folder, index.data_dir, known) for folder in root.iterdir() if folder.is_dir())
    if num_ended or num_strays:
        log.warning(
            "action=reconciled associations_ended=%d files_removed=%d that were never acknowledged",
            num_ended,
            num_strays,
        )
    _forget(index, (it.sop_instance_uid for it in index.needed_files() if _is_lost(it.path, it.num_bytes)))
    place = f"{index.data_dir}/"
    lost = Counter(series for series, path, num in index.settled_paths() if _is_lost(place + path, num))
    for series, num in lost.items():
        log.error(
            "action=instances-lost series=%s: %d of its files are missing or cut off; its results stand. Send the "
            "Series again before `cspine retry`",
            series,
            num,
        )
    return num_strays


def reconcile_run(index: Index, run: str) -> None:
    """For one run of a receiver that died, while others go on receiving."""
    _forget(index, (uid for uid, path, checksum in index.files_in_doubt(run) if _is_torn(path, checksum)))
    num_ended = index.end_lost_associations(run)
    folder = index.data_dir / "instances" / run
    num_strays = _remove_strays(folder, index.data_dir, index.paths_under(folder))
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
    except _GONE:
        return True
    except OSError as error:
        _tell(path, error)
        return False
    return found != checksum


def _remove_strays(folder: Path, data_dir: Path, known: Set[str]) -> int:
    """Removes files of a run that are not known, and folders that are empty then; how many files had content.

    known: files that rows name, relative to the data folder.
    """
    if not folder.is_dir():  # it died before it made one
        return 0
    num_with_content = 0
    strays = []
    for name, _, files in os.walk(folder):
        relative = os.path.relpath(name, data_dir)
        strays += [Path(name, file) for file in files if file.endswith(".dcm") and f"{relative}/{file}" not in known]
    for path in strays:
        try:
            has_content = path.stat().st_size > 0  # the others were made ahead
            path.unlink()
            num_with_content += has_content
        except OSError as error:
            _tell(path, error)
    for name, _, _ in os.walk(folder, topdown=False):
        place = Path(name)
        try:
            if not any(place.iterdir()):
                place.rmdir()
        except OSError as error:
            _tell(place, error)
    return num_with_content


def _is_lost(path: str | Path, num_bytes: int | None) -> bool:
    try:
        return not is_whole(path, num_bytes)
    except OSError as error:
        _tell(path, error)
        return False


def _tell(path: str | Path, error: OSError) -> None:
    log.error(
        "action=not-reconciled path=%s: %s. Check disk and owner. A case that needs it fails: `cspine retry` it once "
        "the file can be read, or `cspine delete` it and send the Series again",
        path,
        error.strerror,
    )
