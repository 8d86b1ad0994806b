"""The door to delivery: results go to PACS and folders, and a retry survives a restart.

`clock.py` says what is due and notes how it went, `retry.py` how long to wait, and there is one module for each kind
of destination. Called by `node/service.py`; reads and writes the database and result folders, and makes no results.
"""

from node.deliver.clock import deliver_due
from node.deliver.folder import copy_results

__all__ = ["copy_results", "deliver_due"]
