"""Instances of one Series that come from an archive, on their way to disk and index as those of the receiver are."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from model import PARSE_ERRORS
from node.process import describe_error
from node.receive.incoming import IncomingFile
from node.receive.sender import Sender
from node.receive.status import OUT_OF_RESOURCES, RefusedError
from node.receive.store import Store
from node.send import SendError

log = logging.getLogger(__name__)

_MAX_PROBLEMS = 3
_Instance = TypeVar("_Instance")


class StoppingError(Exception):
    """The node stops."""


class NotStoredError(SendError):
    """What an archive gives cannot be stored now, whatever it is."""


class Taking:
    """For the index all of them are one association. Safe to use from several threads; `end` it.

    ae_title: stands for the archive where a sender's AE title would. answered: the SOP Instance UIDs of those that are
    safely here, or will never be.
    """

    def __init__(self, source: str, where: str, ae_title: str, store: Store, stopping: threading.Event) -> None:
        self.answered: set[str] = set()
        self._source, self._where, self._store, self._stopping = source, where, store, stopping
        self._sender = Sender(lambda: ae_title, store.index, store.run)

    def begin(self) -> IncomingFile:
        """An Instance that begins to come; to be ended by `finish`, or abandoned."""
        return IncomingFile(self._store, self._sender)

    def write(self, file: IncomingFile, piece: bytes | memoryview) -> None:
        """Takes the next piece.

        Raises:
            StoppingError, OSError: it cannot be taken now.
        """
        if self._stopping.is_set():
            raise StoppingError
        file.write(memoryview(piece))

    def finish(self, file: IncomingFile, sop_instance_uid: str = "") -> None:
        """Returns when the Instance is safely here, or will never be. sop_instance_uid: as the archive calls it.

        Raises:
            NotStoredError, OSError, SQLAlchemyError: it cannot be taken now.
        """
        reason = ""
        try:
            file.finish()
        except RefusedError as refusal:
            if refusal.status == OUT_OF_RESOURCES:
                raise NotStoredError(f"what {self._where} has cannot be stored now: {refusal}") from refusal
            reason = str(refusal)
        except (OSError, SQLAlchemyError):
            file.abandon()
            raise
        except PARSE_ERRORS as error:
            reason = f"it cannot be parsed: {describe_error(error)}"
        uid = file.announced.sop_instance_uid if file.announced else sop_instance_uid
        self.answered.add(sop_instance_uid or uid)
        if reason:
            log.warning("action=instance-refused by=watch source=%r instance=%r: %s", self._source, uid[:64], reason)

    def take(self, pieces: Iterable[bytes], sop_instance_uid: str) -> None:
        """Takes a whole file, and returns as `finish` does; what breaks off is raised as it came.

        Raises:
            StoppingError, NotStoredError, OSError, SQLAlchemyError: it cannot be taken now.
        """
        file = self.begin()
        try:
            for piece in pieces:
                self.write(file, piece)
                if file.refusal is not None:
                    break
        except BaseException:
            file.abandon()
            raise
        self.finish(file, sop_instance_uid)

    def take_each(
        self, instances: Iterable[_Instance], fetch: Callable[[_Instance], Exception | None], num_at_a_time: int
    ) -> None:
        """Fetches Instances, several at the same time.

        fetch: returns what is wrong with that one, if it does not concern the others. These are fetched all the same,
        unless there are many such: a neck with a slice missing can be analysed, one that ends there cannot.

        Raises:
            Exception: as `fetch`, or the first that it returned.
        """
        problems: list[Exception] = []
        is_over = threading.Event()  # set by who finds out: this thread may be slow to look at what came of each

        def fetch_next(instance: _Instance) -> None:
            if is_over.is_set():
                return
            try:
                problem = fetch(instance)
            except BaseException:
                is_over.set()
                raise
            if problem is not None:
                problems.append(problem)
                if len(problems) > _MAX_PROBLEMS:  # each may have cost a timeout
                    is_over.set()

        with ThreadPoolExecutor(num_at_a_time, "watch") as pool:
            for _ in pool.map(fetch_next, instances):
                pass
        if problems:
            raise problems[0]

    def end(self, *, is_whole: bool) -> None:
        """Notes that no more come."""
        self._sender.end(released=is_whole)
