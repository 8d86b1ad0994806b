"""The receiver processes: started, watched, started again, stopped. Lives in the main process.

All of them accept from one listening socket, which is made here and never closed before the node stops. So whichever
process is free takes the next connection, and while one is being started again the connections that wait are taken by
the others, or keep waiting: none is refused, as those in the queue of a dead process with SO_REUSEPORT would be.
"""

import logging
import multiprocessing
import socket
import threading
import time
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from sqlalchemy.exc import SQLAlchemyError

from node.config import Config
from node.index import Index
from node.process import describe_error, describe_listen_error
from node.receive.reconcile import reconcile, reconcile_run
from node.receive.server import run
from node.restarts import Restarts

log = logging.getLogger(__name__)

_DIED = "a receiver died while starting"
_MAX_DEATHS = 3  # at the start of the node; later ones are replaced without end


class ReceiverError(Exception):
    """The receivers cannot be started; the message says why."""


class Receivers:
    """`receive.processes` processes that receive.

    Raises:
        ReceiverError: the address cannot be listened on.
    """

    def __init__(self, config: Config, index: Index) -> None:
        self._config, self._index = config, index
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[str, BaseProcess] = {}  # by the name of the run
        self._starting: dict[str, Connection] = {}  # of those, what says that a run serves, or why it cannot
        self._not_started: set[str] = set()  # runs that are over and never served
        self._restarts = Restarts("receiver")
        self._numbers = count()
        self._lock = threading.Lock()  # `watch` may still be at it, in another thread, when the node stops
        self._is_ending = False
        try:
            self._listener = listen(config)
        except OSError as error:
            where = f"{config.receive.host}:{config.receive.port}"
            raise ReceiverError(f"{where} cannot be listened on: {describe_listen_error(error)}") from error

    def start(self) -> None:
        """Makes disk and index agree, then starts all; returns when they serve.

        Raises:
            ReceiverError: one of them does not.
        """
        reconcile(self._index)
        for _ in range(self._config.receive.processes):
            self._start()
        num_died = 0
        while self._starting:
            name = next(iter(self._starting))
            problem = self._hear(name)
            if problem == _DIED and num_died < _MAX_DEATHS:
                num_died += 1
                self._processes.pop(name).join()
                self._start()
            elif problem:
                raise ReceiverError(problem)

    def watch(self) -> None:
        """Replaces those that died; what they had not acknowledged is removed."""
        with self._lock:
            if self._is_ending:
                return
            died = self._replace_dead()
        for name in died:
            try:
                reconcile_run(self._index, name)
            except (OSError, SQLAlchemyError) as error:
                log.error("action=not-reconciled run=%s: left for the next start (%s)", name, describe_error(error))

    def terminate(self) -> None:
        """Has them end: they take no more associations, and none is replaced."""
        with self._lock:
            self._is_ending = True
            for process in self._processes.values():
                process.terminate()

    def join(self, timeout_s: float) -> None:
        """Waits for their end, and makes it."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        for ready in self._starting.values():
            ready.close()
        self._listener.close()

    def _replace_dead(self) -> list[str]:
        """Starts another for each that died, as far as one can be started now; the names of their runs."""
        for name, ready in list(self._starting.items()):
            if not ready.poll():
                continue
            if problem := self._hear(name):
                self._not_started.add(name)
                self._restarts.note_failed(problem)
            else:
                self._restarts.note_started()
        died = []
        for name, process in list(self._processes.items()):
            if process.is_alive() or name in self._starting:  # then how it died is heard at the next look
                continue
            if not self._restarts.may_start():
                break
            try:
                self._start()
            except OSError as error:  # no memory, or too many processes
                self._restarts.note_failed(error.strerror or str(error))
                break
            if name not in self._not_started:
                log.error("action=receiver-died run=%s exitcode=%s; another is started", name, process.exitcode)
            self._not_started.discard(name)
            del self._processes[name]
            process.close()
            died.append(name)
        return died

    def _hear(self, name: str) -> str:
        """Waits for what a run says of its start: "" or why it does not serve."""
        with self._starting.pop(name) as ready:
            try:
                return str(ready.recv())
            except EOFError:
                return _DIED

    def _start(self) -> None:
        ready, far_end = self._context.Pipe(duplex=False)
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{next(self._numbers)}"
        process = self._context.Process(
            target=run, args=(self._config, self._listener, name, far_end), name="cspine-receiver"
        )
        process.start()
        self._processes[name] = process
        far_end.close()
        self._starting[name] = ready


def listen(config: Config) -> socket.socket:
    """A socket that listens at the configured address.

    Raises:
        OSError: it cannot.
    """
    host, port = config.receive.host, config.receive.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=config.receive.backlog)
    listener.setblocking(False)  # another process may be faster
    return listener
