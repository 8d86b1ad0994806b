"""Processes that decode compressed frames: the codecs hold the GIL, so threads gain nothing (benchmarks/decode.py).

The analysis worker keeps one `DecodePool` for its life and hands it to `model.series.read_series`; a Series that needs
no codec never starts it. A codec that crashes on damaged pixels takes one of these processes with it, not the worker.
"""

import ctypes
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.decode import PIXEL_TAGS, DecodeError, FrameJob, decode_frame, read_instance

Frame = NDArray[np.int16]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
Slotted = tuple[int, FrameJob]  # with the place of its frame in the shared memory


class DecodePool:
    """Decodes on all cores. Use as a context manager, or `close` it.

    num_processes: None takes as many as there are cores for this process. initializer: what each process does first.
    """

    def __init__(
        self,
        num_processes: int | None = None,
        initializer: Callable[..., None] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        self.num_processes = num_processes or len(os.sched_getaffinity(0))
        self._initializer, self._initargs = initializer, initargs
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def decode(self, jobs: Sequence[FrameJob], frame_shape: tuple[int, int]) -> Iterator[tuple[int, Frame]]:
        """`(index, HU)` of every job, as they are done; frames are valid until the iteration ends.

        Raises:
            DecodeError: a frame cannot be decoded.
            BrokenProcessPool: a process died, of a codec or for want of memory.

        Whatever ends it early ends the processes, too; the next call starts new ones.
        """
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.num_processes,
                multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
                initializer=_start,
                initargs=(self._initializer, self._initargs),
            )
        with _shared_memory((len(jobs), *frame_shape)) as (path, frames):
            shares = self._shares(list(enumerate(jobs)))
            at_a_time = max(1, min(4, len(shares) // (4 * self.num_processes)))  # handing over costs, waiting too
            done = self._executor.map(_decode_share, repeat(path), repeat(frames.shape), shares, chunksize=at_a_time)
            try:
                for slots in done:
                    yield from ((jobs[slot].index, frames[slot]) for slot in slots)
            except BaseException:
                # Waits for what runs: by then the descriptor may be another file's, and would be written to.
                self.close()
                raise

    def _shares(self, jobs: Sequence[Slotted]) -> list[list[Slotted]]:
        """The jobs, each file's together; those of a file of many frames in two shares a process.

        Each share reads its file once.
        """
        by_path: dict[Path, list[Slotted]] = defaultdict(list)
        for slot, job in jobs:
            by_path[job.path].append((slot, job))
        shares = []
        for of_file in by_path.values():
            size = -(-len(of_file) // (2 * self.num_processes))
            shares += [of_file[start : start + size] for start in range(0, len(of_file), size)]
        return shares


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """The first thing in a process of the pool."""
    with suppress(AttributeError):  # not glibc
        # By default glibc gives buffers as large as a frame back to the kernel at each free: the page faults of getting
        # them again cost half as much CPU as decoding JPEG Lossless.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    if initializer:
        initializer(*initargs)


def _decode_share(memory: str, shape: tuple[int, ...], share: Sequence[Slotted]) -> list[int]:
    """In a process of the pool: decodes frames of one file, each into its slot of the memory; returns the slots."""
    frames = np.memmap(memory, np.int16, "r+", shape=shape)
    path = share[0][1].path
    ds = read_instance(path, PIXEL_TAGS)
    if ds is None:
        raise DecodeError(f"File {path} is no longer DICOM")
    for slot, job in share:
        frames[slot] = decode_frame(ds, job)
    return [slot for slot, _ in share]


@contextmanager
def _shared_memory(shape: tuple[int, ...]) -> Iterator[tuple[str, Frame]]:
    """An int16 array in memory, and the path by which other processes can map it.

    Frames sent through pipes cost half as much CPU again as decoding them; /dev/shm has 64 MB in a container.
    """
    descriptor = os.memfd_create("cspine-frames")
    try:
        os.truncate(descriptor, int(np.prod(shape)) * 2)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        yield path, np.memmap(path, np.int16, "r+", shape=shape)
    finally:
        os.close(descriptor)
