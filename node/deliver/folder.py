"""A folder as a destination. Called by `clock.py` and by `cspine analyze`."""

import shutil
from pathlib import Path

from node.process import sync


def copy_results(source: Path, target: Path) -> None:
    """Copies the result files, each appearing whole under its name; results no longer made are removed there.

    Raises:
        OSError: the folder cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in source.iterdir())
    for name in names:
        draft = target / f".{name}.draft"
        shutil.copyfile(source / name, draft)
        sync(draft)
        draft.rename(target / name)
    sync(target)
    for path in (*target.glob("*.seg.dcm"), *target.glob("*.sr.dcm")):  # of our names only: others may keep files there
        if path.name not in names:
            path.unlink()
