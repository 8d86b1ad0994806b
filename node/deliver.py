"""Delivery of a case's results to its destinations: C-STORE to a PACS, or files into a folder.

What is due, and when it is tried again, stands in the database; the clock that calls `deliver_due` is APScheduler's.
Each destination has a job of its own there, so a slow or dead one holds up no other.
"""

import logging
import shutil
import time
from pathlib import Path

from node.case import Delivery, DeliveryState
from node.config import Config, DicomDestination, FolderDestination
from node.index import Index
from node.process import sync
from node.send import SendError, send_files

log = logging.getLogger(__name__)


def deliver_due(index: Index, config: Config, destination: DicomDestination | FolderDestination) -> None:
    """Tries every delivery to this destination that is due, and notes how each went."""
    while (delivery := index.next_delivery(destination.name)) is not None:
        where = f"case={delivery.case_id} series={delivery.series_instance_uid} destination={destination.name!r}"
        try:
            _deliver(delivery, config, destination)
        except (SendError, OSError) as error:
            permanent = isinstance(error, SendError) and error.permanent
            if permanent or delivery.attempts >= config.deliver.max_attempts:
                reason = f"given up after {delivery.attempts} attempt(s): {error}"
                index.settle_delivery(delivery, DeliveryState.FAILED, reason)
            else:
                wait_s = retry_wait_s(delivery.attempts, config.deliver.retry_first_s, config.deliver.retry_max_s)
                reason = f"attempt {delivery.attempts} failed, next in {wait_s:g} s: {error}"
                index.settle_delivery(delivery, DeliveryState.PENDING, reason, time.time() + wait_s)
            log.warning("action=not-delivered %s: %s", where, reason)
        else:
            index.settle_delivery(delivery, DeliveryState.DONE)
            log.info("action=delivered %s attempts=%d", where, delivery.attempts)


def retry_wait_s(attempts: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after that many failed attempts: `first_s`, then twice as long each time, up to `longest_s`."""
    return min(first_s * 2.0 ** min(attempts - 1, 64), longest_s)


def _deliver(delivery: Delivery, config: Config, destination: DicomDestination | FolderDestination) -> None:
    """Takes one result set to one destination.

    Raises:
        SendError: a DICOM peer cannot be reached or refuses an object, or the results are gone.
        OSError: a folder cannot be written.
    """
    paths = sorted(delivery.result_dir.glob("*.dcm"))
    if not paths:
        raise SendError(f"{delivery.result_dir} holds no results; send the Series again", permanent=True)
    if isinstance(destination, FolderDestination):
        target = destination.path / delivery.study_instance_uid / delivery.series_instance_uid
        copy_results(delivery.result_dir, target)
        return
    refused = send_files(paths, destination, calling_ae_title=config.receive.ae_title)
    if refused:
        reasons = "; ".join(item.reason for item in refused)
        raise SendError(reasons, permanent=all(item.permanent for item in refused))


def copy_results(source: Path, target: Path) -> None:
    """Copies the result files, each appearing whole under its name; results no longer made are removed there.

    Raises:
        OSError: the folder cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in source.iterdir())
    for name in names:
        draft = target / f".{name}.draft"
        shutil.copyfile(source / name, draft)
        sync(draft)
        draft.rename(target / name)
    sync(target)
    for path in (*target.glob("*.seg.dcm"), *target.glob("*.sr.dcm")):  # of our names only: others may keep files there
        if path.name not in names:
            path.unlink()
