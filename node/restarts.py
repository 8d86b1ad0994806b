"""When a process that cannot be started is tried again, and how often the log says so. For receivers and HTTP side."""

import logging
import time

from node.reminder import Reminder
from node.retry import retry_wait_s

log = logging.getLogger(__name__)

_FIRST_S, _LONGEST_S = 0.5, 15.0  # whoever calls meanwhile waits in the queue of the port
_REMIND_S = 60.0


class Restarts:
    """Of one kind of process. name: as the log calls it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_failed = 0  # since one was started
        self._wait_until = 0.0  # monotonic
        self._reminder = Reminder(_REMIND_S)

    def may_start(self) -> bool:
        """Whether it is time to try."""
        return time.monotonic() >= self._wait_until

    def note_failed(self, problem: str) -> None:
        """One could not be started: the next waits, each time for longer."""
        self._num_failed += 1
        self._wait_until = time.monotonic() + retry_wait_s(self._num_failed, _FIRST_S, _LONGEST_S)
        if self._reminder.is_due(problem):
            log.error(
                "action=%s-not-started: %s. It is tried again, at least every %.0f s; this is said once a minute",
                self._name,
                problem.removesuffix("."),
                _LONGEST_S,
            )

    def note_started(self) -> None:
        """One serves."""
        self._num_failed = 0
