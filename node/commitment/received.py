"""Reports that come to us, of commitments that deliveries asked for (`node/deliver/commitment.py`)."""

import logging

from pynetdicom import evt

from node.index import Index
from node.status import meaning_of

log = logging.getLogger(__name__)

_SUCCESS, _CANNOT_PROCESS = 0x0000, 0x0110


def note_report(index: Index, event: evt.Event) -> tuple[int, None]:
    """Handles an N-EVENT-REPORT, over whichever association it came; returns the status.

    A report that nobody awaits (any more) is answered with success too, or the peer would send it for ever.
    """
    try:
        report = event.event_information
        transaction_uid = str(report.TransactionUID)
        committed = [str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence", [])]
        failed = {
            str(item.ReferencedSOPInstanceUID): _why(item.get("FailureReason"))
            for item in report.get("FailedSOPSequence", [])
        }
    except (AttributeError, ValueError, TypeError, KeyError):
        log.warning("action=commitment-report-refused: it cannot be read")
        return _CANNOT_PROCESS, None
    noted = index.report_commitment(transaction_uid, committed, failed)
    log.info(
        "action=commitment-report transaction=%.64s committed=%d failed=%d%s",
        transaction_uid,
        len(committed),
        len(failed),
        "" if noted else ": nobody awaits it",
    )
    return _SUCCESS, None


def _why(failure_reason: int | None) -> str:
    if failure_reason is None:
        return "taken, but not committed to"
    return f"taken, but not committed to: status 0x{failure_reason:04X} ({meaning_of(failure_reason).meaning})"
