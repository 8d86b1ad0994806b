"""The receiver's side: takes N-ACTION requests, and reports over the same association while the requester keeps it."""

import logging
import re
import threading
import time

from pydicom import Dataset
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance
from sqlalchemy.exc import SQLAlchemyError

from node.commitment.report import ReportError, send_report
from node.index import Index
from node.process import describe_error

log = logging.getLogger(__name__)

SOP_CLASS = StorageCommitmentPushModel

_SUCCESS = 0x0000
_PROCESSING_FAILURE = 0x0110
_NO_SUCH_OBJECT = 0x0112
_INVALID_ARGUMENT = 0x0115
_NO_SUCH_ACTION = 0x0123
_RESOURCES = 0x0213

COMMITMENT_STATUSES = {
    _SUCCESS: "the request is noted; a report follows",
    _PROCESSING_FAILURE: "the dataset cannot be parsed; answered by pynetdicom",
    _NO_SUCH_OBJECT: "the Requested SOP Instance UID is not that of the Storage Commitment Push Model",
    _INVALID_ARGUMENT: "the Transaction UID, or a UID of a referenced Instance, is missing or not a UID",
    _NO_SUCH_ACTION: "the Action Type ID is not 1",
    _RESOURCES: "it cannot be noted now; send it again later",
}
"""Statuses of N-ACTION (PS3.4 J.3.2) and when they are given."""

REQUESTER_MAY_RELEASE_S = 0.5  # who wants the report over a new association releases this one by then
ANSWER_S = 30.0  # what the requester has to answer a report
CLOCK_WAITS_S = 3.0  # by then it has been tried over the same association


class CommitmentScp:
    """Answers N-ACTION; one for each receiver process."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def on_n_action(self, event: evt.Event) -> tuple[int, None]:
        """Notes a request; returns the status, one of `COMMITMENT_STATUSES`."""
        calling = event.assoc.requestor.ae_title
        status, commitment_id = self._note(event, calling)
        if commitment_id is None:
            log.warning(
                "action=commitment-refused calling=%r status=0x%04X: %s", calling, status, COMMITMENT_STATUSES[status]
            )
        else:
            threading.Thread(target=self._report, args=(event.assoc, commitment_id), daemon=True).start()
        return status, None

    def _note(self, event: evt.Event, calling: str) -> tuple[int, int | None]:
        if event.request.RequestedSOPInstanceUID != StorageCommitmentPushModelInstance:
            return _NO_SUCH_OBJECT, None
        if event.action_type != 1:
            return _NO_SUCH_ACTION, None
        asked = _parse(event)
        if asked is None:
            return _INVALID_ARGUMENT, None
        transaction_uid, references = asked
        try:
            commitment_id = self._index.add_commitment(
                transaction_uid=transaction_uid,
                calling_ae_title=calling,
                references=references,
                wait_s=CLOCK_WAITS_S,
            )
        except SQLAlchemyError as error:
            log.error("action=commitment-not-noted: %s", describe_error(error))
            return _RESOURCES, None
        log.info(
            "action=commitment-requested calling=%r transaction=%s instances=%d",
            calling,
            transaction_uid,
            len(references),
        )
        return _SUCCESS, commitment_id

    def _report(self, association: Association, commitment_id: int) -> None:
        """Reports over the requester's association; if that is gone or fails, the clock does it over another."""
        time.sleep(REQUESTER_MAY_RELEASE_S)
        if not association.is_established:
            self._index.hand_on_commitment(commitment_id)
            return
        commitment = self._index.claim_commitment(lease_s=ANSWER_S + CLOCK_WAITS_S, commitment_id=commitment_id)
        if commitment is None:
            return
        try:
            said = send_report(association, self._index, commitment)
        except ReportError as error:
            log.info(
                "action=commitment-not-reported transaction=%s same association: %s", commitment.transaction_uid, error
            )
            self._index.hand_on_commitment(commitment_id)
        else:
            self._index.settle_commitment(commitment, done=True)
            log.info("action=commitment-reported transaction=%s same association: %s", commitment.transaction_uid, said)


def _parse(event: evt.Event) -> tuple[str, list[tuple[str, str]]] | None:
    """Transaction UID and the referenced SOP Class and Instance UIDs; None if one of them is none."""
    try:
        ds: Dataset = event.action_information
        references = [
            (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in ds.ReferencedSOPSequence
        ]
        transaction_uid = str(ds.TransactionUID)
    except (AttributeError, ValueError, TypeError, OSError, KeyError):
        return None
    uids = [transaction_uid, *(uid for pair in references for uid in pair)]
    if not references or not all(re.fullmatch(r"[0-9.]{1,64}", uid) for uid in uids):
        return None
    return transaction_uid, references
