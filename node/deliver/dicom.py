"""A PACS as a destination: C-STORE of every object over one association. Called by `clock.py`."""

from collections.abc import Sequence
from pathlib import Path

from node.config import DicomDestination
from node.send import SendError, send_files


def store_results(paths: Sequence[Path], destination: DicomDestination, *, calling_ae_title: str) -> None:
    """Sends the objects.

    Raises:
        SendError: the peer cannot be reached, or does not take all of them; permanent if nothing would change that.
    """
    refused = send_files(paths, destination, calling_ae_title=calling_ae_title)
    if refused:
        reasons = "; ".join(item.reason for item in refused)
        raise SendError(reasons, permanent=all(item.permanent for item in refused))
