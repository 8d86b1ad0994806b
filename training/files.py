"""Files and folders that appear whole or not at all, so that a kill at any moment leaves nothing half made."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def dicom_files(folder: Path) -> list[Path]:
    """All files of a study, those that are not DICOM too: reading knows them."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with replacing_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
