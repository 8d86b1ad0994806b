"""What is logged of jobs of the scheduler that broke; they run again at their next time. `service.py` has it listen."""

import logging
import threading
import time
from collections.abc import Callable

from apscheduler.events import JobExecutionEvent
from sqlalchemy.exc import OperationalError

from node.index import why_unusable
from node.process import describe_error
from node.reminder import Reminder

log = logging.getLogger(__name__)

_REMIND_S = 60.0


class BrokenJobs:
    """Faults of ours, each with its job; of a database that cannot be used, and when it can again. A line a minute.

    where: the database, as a person reads it. name_of: the name of a job by its id. Safe to use from several threads.
    """

    def __init__(self, where: str, name_of: Callable[[str], str]) -> None:
        self._where, self._name_of = where, name_of
        self._waiting: set[str] = set()  # ids of jobs that broke for the database, and have not run since
        self._since = self._told_at = 0.0  # monotonic, s
        self._reminder = Reminder(_REMIND_S)
        self._lock = threading.Lock()

    def on_error(self, event: JobExecutionEvent) -> None:
        """A job broke."""
        error = event.exception
        trouble = why_unusable(error)
        if trouble is None:
            what = describe_error(error)
            if isinstance(error, OperationalError):  # its text has names of tables and columns, and no values
                what += f" ({error.orig})"
            if self._reminder.is_due((event.job_id, what)):
                log.error("action=job-broke job=%s: %s", self._name_of(event.job_id), what)
            return
        with self._lock:
            now = time.monotonic()
            if not self._waiting:
                self._since = now
            elif now < self._told_at + _REMIND_S:
                self._waiting.add(event.job_id)
                return
            self._waiting.add(event.job_id)
            self._told_at = now
        log.error(
            "action=database-away job=%s: the database %s cannot be reached or used, for %.0f s now: %s. It is tried "
            "again; this is said once a minute",
            self._name_of(event.job_id),
            self._where,
            now - self._since,
            trouble,
        )

    def on_executed(self, event: JobExecutionEvent) -> None:
        """A job ran to its end: one that broke for the database has reached it again."""
        with self._lock:
            if event.job_id not in self._waiting:
                return
            self._waiting.clear()
            away_s = time.monotonic() - self._since
        log.warning("action=database-back job=%s: it was away for %.0f s", self._name_of(event.job_id), away_s)
