"""Files and folders that appear whole or not at all, so that a kill at any moment leaves nothing half made."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class BusyError(Exception):
    """Another process works on the same folder; the message says which."""


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keeps a folder from being changed by two processes at once; when a process dies the system unlocks what it held.

    shared: for who only reads it; many may. The lock is a file beside the folder, which stays.

    Raises:
        BusyError: another process holds it.
    """
    path = folder.with_name(f".{folder.name}.lock")
    if shared and not path.parent.exists():
        yield  # there is nothing to read
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"Another run of cspine-train is at work with {folder}. Wait until it has ended, or end it."
            ) from None
        except OSError as error:  # some file systems of clusters have no locks
            logging.getLogger(__name__).warning(
                "%s cannot be locked (%s): run nothing else that uses it.", folder, error.strerror
            )
        yield


def dicom_files(folder: Path) -> list[Path]:
    """All files of a study, those that are not DICOM too: reading knows them."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with replacing_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_npz(path: Path, **arrays: Any) -> None:
    """Writes arrays whole or not at all."""
    with replacing_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A name to write to, beside the path; it takes the path's place at the end, and is gone after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write in, beside the path; it takes the path's place at the end, and is gone after an error.

    A kill between the two steps of the change leaves nothing at the path: it is made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    unfinished.mkdir()
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(path)
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed left behind; none may be at work here."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
