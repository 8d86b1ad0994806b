"""The clock side of delivery: what is due is tried, and how it went is noted.

What is due, and when it is tried again, stands in the database; the clock that calls `deliver_due` is APScheduler's.
Each destination has a job of its own there, so a slow or dead one holds up no other.
"""

import logging
import time

from node.case import Delivery, DeliveryState
from node.config import Config, DicomDestination, FolderDestination
from node.deliver.dicom import store_results
from node.deliver.folder import copy_results
from node.deliver.retry import retry_wait_s
from node.index import Index
from node.send import SendError

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
    store_results(paths, destination, calling_ae_title=config.receive.ae_title)
