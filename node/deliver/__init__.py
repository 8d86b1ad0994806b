"""The door to delivery: results go to PACS and folders, arrive or are said not to, and retries survive restarts.

`clock.py` tries what is due, `policy.py` decides what becomes of it, `files.py` says which files go, and a courier
(`courier.py`) takes them: `dicom.py` with `commitment.py`, `dicomweb.py` and `orthanc.py` on `http.py`, `folder.py`.
Called by `node/service.py`; reads result folders and the database, and makes no results.
"""

from node.deliver.clock import deliver_due
from node.deliver.folder import copy_results
from node.deliver.kinds import open_courier

__all__ = ["copy_results", "deliver_due", "open_courier"]
