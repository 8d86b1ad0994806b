"""The receiver: a C-ECHO and C-STORE SCP for CT, in processes of its own.

An Instance is written as it comes, synced and indexed before the success status goes out. The receiver decides nothing
about Series: that is `complete/`, which reads what is noted here. Started and watched by `service.py`.

From the outside in: `supervisor.py` runs the processes, `server.py` is one of them, `contexts.py` says what is offered,
`request.py` looks over who asks for an association, `lane.py` reads C-STORE from the socket and `command.py` its
command sets, `store.py` takes one Instance with `headers.py`, `spool.py` and `commit.py`, `reconcile.py` makes disk and
index agree after a crash.
"""

from node.receive.supervisor import ReceiverError, Receivers

__all__ = ["ReceiverError", "Receivers"]
