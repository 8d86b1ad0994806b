"""The receiver: a C-ECHO and C-STORE SCP for CT, in a process of its own.

An Instance is written as it came, fsynced and indexed before the success status goes out. The receiver decides nothing
about Series: that is `complete/`, which reads what is noted here. Started and watched by `service.py`.

`contexts.py` says what is offered, `server.py` serves associations, `store.py` puts one Instance on disk and into the
index, `reconcile.py` makes the two agree after a crash.
"""

from node.receive.server import run

__all__ = ["run"]
