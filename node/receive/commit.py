"""Rows of Instances into the index, as many in a transaction as wait for one: group commit."""

import threading
from collections import deque

from node.index import Index, NewInstance


class _Waiting:
    def __init__(self, instance: NewInstance) -> None:
        self.instance = instance
        self.is_new: bool | None = None
        self.error: Exception | None = None


class GroupCommit:
    """Safe to use from several threads: that is its point.

    Whoever gets the lock writes everything that waits by then. An Instance that is alone is written at once, by the
    thread that brings it; while a transaction waits for the disk, or for its turn among the processes, the next one
    grows. Nobody returns before the transaction with its row has been committed (`synchronous=FULL`), so this is as
    safe as a transaction for each.
    """

    def __init__(self, index: Index, quiet_time_s: float) -> None:
        self._index = index
        self._quiet_time_s = quiet_time_s
        self._waiting: deque[_Waiting] = deque()
        self._turn = threading.Lock()

    def add(self, instance: NewInstance) -> bool:
        """Returns once the row is durable: True, or False if the UID was here before.

        Raises:
            SQLAlchemyError, OSError: the transaction failed; the row is not there.
        """
        mine = _Waiting(instance)
        self._waiting.append(mine)
        with self._turn:
            if mine.is_new is None and mine.error is None:
                self._write()
        if mine.error is not None:
            raise mine.error
        assert mine.is_new is not None
        return mine.is_new

    def _write(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            added = self._index.add_instances([one.instance for one in batch], quiet_time_s=self._quiet_time_s)
        except Exception as error:
            for one in batch:
                one.error = error
            raise
        for one, is_new in zip(batch, added, strict=True):
            one.is_new = is_new
