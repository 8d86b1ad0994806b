"""Files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary paths to write; they take the place of `paths` once all are written, and vanish after an error."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=paths[0].parent) as folder:
        written = tuple(Path(folder) / path.name for path in paths)
        yield written
        for source, path in zip(written, paths, strict=True):
            source.replace(path)
