"""How often the log says the same thing: at once, then after a while again. For what goes on until somebody acts."""

import threading
import time
from collections.abc import Hashable

_MAX_KEPT = 1000


class Reminder:
    """`is_due` is true at most once in `every_s` for the same thing. Safe to use from several threads."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._said: dict[Hashable, float] = {}  # when it is due again, monotonic
        self._lock = threading.Lock()

    def is_due(self, what: Hashable) -> bool:
        """Whether it is to be said now; if so, it counts as said."""
        now = time.monotonic()
        with self._lock:
            if now < self._said.get(what, now):
                return False
            if len(self._said) > _MAX_KEPT:  # strangers may make up what is said of them
                self._said.clear()
            self._said[what] = now + self._every_s
        return True
