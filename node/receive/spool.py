"""Files for Instances that arrive: made ahead, so that their names survive a power cut before they are needed.

A new file costs an fsync of its folder besides its own, or a crash may leave its bytes without a name. Here a batch of
empty files is made and the folder synced once for all of them; an Instance then needs `fdatasync` of its file only,
which covers bytes and length (POSIX: what is needed to retrieve the data). The folder belongs to one run of one
receiver process, so no name is ever claimed twice, and what a dead run left behind can be told by its folder.
"""

import contextlib
import threading
from collections import deque
from io import FileIO
from pathlib import Path

from node.process import sync

_NUM_IN_BATCH = 32
_NUM_LOW = 16  # left when the next batch is made
_NUM_BATCHES_IN_FOLDER = 128


class Spool:
    """The files of one run of a receiver process: `<folder>/<number>/<batch>-<number>.dcm`. Safe to use from threads.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        sync(folder.parent)
        self._num_batches = 0
        self._ready: deque[Path] = deque()
        self._making = threading.Lock()
        self._is_closed = False

    def take(self) -> tuple[Path, FileIO]:
        """An empty file that nobody else has and whose name is durable, open for writing; to be closed by the caller.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        while True:
            try:
                path = self._ready.popleft()
                break
            except IndexError:
                with self._making:
                    if not self._ready:
                        self._make()
        if len(self._ready) < _NUM_LOW and not self._making.locked():
            threading.Thread(target=self._make_ahead, name="spool", daemon=True).start()
        return path, FileIO(path, "r+")

    def close(self) -> None:
        """Removes the files that nobody took."""
        with self._making:
            self._is_closed = True
            while self._ready:
                self._ready.pop().unlink(missing_ok=True)

    def _make_ahead(self) -> None:
        """While Instances arrive: on a busy disk each new name waits for the journal."""
        with self._making, contextlib.suppress(OSError):  # who finds no file made tries it, and says what is wrong
            if len(self._ready) < _NUM_LOW and not self._is_closed:
                self._make()

    def _make(self) -> None:
        folder, batch = divmod(self._num_batches, _NUM_BATCHES_IN_FOLDER)
        self._num_batches += 1  # a batch that failed is not tried again
        place = self.folder / f"{folder:04d}"
        if not place.exists():
            place.mkdir()
            sync(self.folder)
        made = [place / f"{batch:03d}-{number:02d}.dcm" for number in range(_NUM_IN_BATCH)]
        for path in made:
            FileIO(path, "x").close()
        sync(place)
        self._ready.extend(made)
