"""How tests wait: for what is to happen, however long a busy machine takes, not for a time.

What must not happen is not waited for; where a time is the promise, the node's own notes are looked at.
"""

import time
from collections.abc import Callable
from typing import Any

WAIT_S = 60.0
"""After that it will not happen: no promise, and only a test that fails takes so long."""


def wait_until(is_so: Callable[[], Any], said: Callable[[], str] | str = "waited in vain") -> None:
    """Returns once it is so. said: what to say if it never is, such as a log."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, said if isinstance(said, str) else said()
        time.sleep(0.02)
