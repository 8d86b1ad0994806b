"""Who is at the other end of an association, and the association's row in the index; over HTTP, what stands for one."""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from node.index import Index
from node.process import describe_error
from node.receive.status import CANNOT_UNDERSTAND, OUT_OF_RESOURCES

log = logging.getLogger(__name__)


class Source(Protocol):
    """Who sends an Instance, whatever the way."""

    @property
    def ae_title(self) -> str:
        """As it calls itself."""

    def association_id(self) -> int:
        """The row of what the Instance came with."""


class Sender:
    """Of one association. name: gives its AE title. run: of the process that has it."""

    def __init__(self, name: Callable[[], str], index: Index, run: str) -> None:
        self._name, self._index, self._run = name, index, run
        self._id: int | None = None
        self._is_all_taken = True
        self._lock = threading.Lock()

    @property
    def ae_title(self) -> str:
        """As it calls itself."""
        return self._name()

    def association_id(self) -> int:
        """The row of the association, made with its first Instance: one that only sends C-ECHO leaves none."""
        with self._lock:
            if self._id is None:
                self._id = self._index.open_association(self.ae_title, self._run)
            return self._id

    def note_refusal(self, status: int) -> None:
        """An Instance was refused. One that could not be stored or parsed: however this ends, not all has come."""
        self._is_all_taken &= status not in (OUT_OF_RESOURCES, CANNOT_UNDERSTAND)

    def end(self, *, released: bool) -> None:
        """Notes that the association ended; when it has been noted, nothing."""
        with self._lock:
            ended, self._id = self._id, None
            if ended is None:
                return
            try:
                self._index.end_association(ended, released=released and self._is_all_taken)
            except (OSError, SQLAlchemyError) as error:
                log.error("action=end-not-noted association=%d: %s", ended, describe_error(error))
