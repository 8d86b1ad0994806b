"""A folder as a destination. Called by `clock.py` and by `cspine analyze`."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from node.case import ObjectProgress, ObjectState
from node.deliver.courier import Note
from node.deliver.files import ResultFile
from node.process import sync, try_write
from node.profiles import RESULT_PATTERNS


class FolderCourier:
    """The sub-folder of one Series. names: of all files that belong there; other results there are removed."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self._folder = folder
        self._names = names

    def send(self, files: Sequence[ResultFile], note: Note) -> None:
        _copy([file.path for file in files], self._folder, self._names)
        for file in files:
            note(file, ObjectProgress(state=ObjectState.TAKEN))

    def find(self, files: Sequence[ResultFile]) -> set[str]:
        return {file.key for file in files if _is_same(file.path, self._folder / file.path.name)}

    def remove(self, keys: Collection[str]) -> bool:
        return True  # `send` has replaced what was there.

    def check(self) -> str:
        try_write(self._folder)
        return "can be written"

    def close(self) -> None:
        pass


def copy_results(source: Path, target: Path) -> None:
    """Copies a whole result folder; results no longer made are removed from the target.

    Raises:
        OSError: the folder cannot be written.
    """
    paths = sorted(source.iterdir())
    _copy(paths, target, [path.name for path in paths])


def _copy(paths: Sequence[Path], target: Path, keep: Collection[str]) -> None:
    """Copies files, each appearing whole under its name; of what else has a name of ours, only `keep` stays."""
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        draft = target / f".{path.name}.draft"
        shutil.copyfile(path, draft)
        sync(draft)
        draft.rename(target / path.name)
    sync(target)
    for path in (found for pattern in RESULT_PATTERNS for found in target.glob(pattern)):
        if path.name not in keep:
            path.unlink()


def _is_same(one: Path, other: Path) -> bool:
    try:
        return other.read_bytes() == one.read_bytes()
    except FileNotFoundError:
        return False
