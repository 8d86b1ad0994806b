"""The process of the HTTP side: started, watched, started again, stopped. Lives in the main process.

What the process needs, FastAPI among it, is imported there and not here.
"""

import logging
import multiprocessing
import threading
import time
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from node.config import Config
from node.index import Index
from node.receive.reconcile import reconcile_run
from node.restarts import Restarts

log = logging.getLogger(__name__)


class WebError(Exception):
    """The HTTP side cannot be started; the message says why."""


class WebProcess:
    """Serves HTTP from `start` to `join`."""

    def __init__(self, config: Config, index: Index) -> None:
        self._config, self._index = config, index
        self._numbers = count()
        self._process: BaseProcess | None = None
        self._run_name = ""
        self._is_serving = False  # as far as it is known: until its end is seen
        self._restarts = Restarts("web")
        self._lock = threading.Lock()  # `watch` may still be at it, in another thread, when the node stops
        self._is_ending = False

    def start(self) -> None:
        """Starts it; returns when it serves.

        Raises:
            WebError: it does not.
        """
        try:
            with self._lock:
                if self._is_ending:
                    return
                ready = self._start()
        except OSError as error:  # no memory, or too many processes
            raise WebError(f"the HTTP side cannot be started: {error.strerror}") from error
        with ready:
            try:
                problem: str = ready.recv()
            except EOFError:
                problem = "the HTTP side died while starting"
        if problem:
            raise WebError(problem)
        self._is_serving = True
        self._restarts.note_started()

    def watch(self) -> None:
        """Replaces it when it died; what it had not acknowledged is removed."""
        with self._lock:
            if self._is_ending or self._process is None or self._process.is_alive() or not self._restarts.may_start():
                return
            exitcode = self._process.exitcode
        if self._is_serving:
            log.error("action=web-died run=%s exitcode=%s; starting it again", self._run_name, exitcode)
        self._is_serving = False
        reconcile_run(self._index, self._run_name)
        try:
            self.start()
        except WebError as error:
            self._restarts.note_failed(str(error))

    def terminate(self) -> None:
        """Has it end: it takes no more requests, and is not replaced."""
        with self._lock:
            self._is_ending = True
            if self._process is not None:
                self._process.terminate()

    def join(self, timeout_s: float) -> None:
        """Waits for its end, and makes it."""
        if self._process is not None:
            self._process.join(timeout_s)
            self._process.kill()
            self._process.join()

    def _start(self) -> Connection:
        """Starts a process; what it will say over: that it serves, or why it cannot."""
        context = multiprocessing.get_context("spawn")
        ready, far_end = context.Pipe(duplex=False)
        self._run_name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-web{next(self._numbers)}"
        process = context.Process(target=_run, args=(self._config, self._run_name, far_end), name="cspine-web")
        process.start()
        self._process = process
        far_end.close()
        return ready


def _run(config: Config, run_name: str, ready: Connection) -> None:
    from node.web.server import run

    run(config, run_name, ready)
