"""Studies in parallel: a process does one after another, on one thread."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch


class ProcessDiedError(Exception):
    """A process ended on its own; the message says what to do."""


def in_processes(
    work: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], num_workers: int
) -> Iterator[tuple[str, Any]]:
    """Name and result of `work(*arguments)` for each job, as they are done. A single worker is this process itself.

    Raises:
        ProcessDiedError: a process died; what `work` raises comes as it is. Either way no further job begins.
    """
    if num_workers == 1:
        yield from ((name, work(*arguments)) for name, arguments in jobs.items())
        return
    # Spawned, not forked: a fork of a process whose torch has threads can hang.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start) as pool:
        names = {pool.submit(work, *arguments): name for name, arguments in jobs.items()}
        num_done = 0
        try:
            for job in as_completed(names):
                yield names[job], job.result()
                num_done += 1
        except BrokenProcessPool as error:
            raise ProcessDiedError(
                f"A process died after {num_done} of {len(jobs)} studies, for want of memory or of a damaged file. "
                "Run this again with fewer workers: it goes on where it stopped."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else the processes of a killed run would wait for work for ever, and hold their memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
