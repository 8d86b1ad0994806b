"""Storage commitment as SCU: the destination is asked by N-ACTION to say what it will keep, and reports when it knows.

The report comes by N-EVENT-REPORT: over the same association, or over one that the destination opens to our receiver,
perhaps hours later. What is awaited stands in the database, so either process may be started again in between.

Reference: PS3.4 J (Storage Commitment Push Model).
"""

import threading
import time
from collections.abc import Sequence

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance, Verification

from node.commitment import note_report
from node.config import DicomDestination
from node.deliver.dicom import not_offered
from node.deliver.files import ResultFile
from node.index import Index
from node.send import SendError, associated
from node.status import Outcome, meaning_of

_REQUEST_COMMITMENT = 1  # Action Type ID, PS3.4 J.3.2
_SUCCESS = 0x0000
_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
_LINGER_S = 3.0  # for a report over the same association; many send it at once, others open their own


def request_commitment(
    destination: DicomDestination,
    files: Sequence[ResultFile],
    transaction_uid: str,
    index: Index,
    *,
    calling_ae_title: str,
) -> None:
    """Asks for commitment, and stays a moment for a report over the same association. The report goes to the index.

    Raises:
        SendError: it cannot be asked, or refuses; permanent where it does not offer storage commitment.
    """
    answering: list[threading.Thread] = []

    def on_report(event: evt.Event) -> tuple[int, None]:
        answering.append(threading.current_thread())
        return note_report(index, event)

    contexts = [(StorageCommitmentPushModel, _SYNTAXES), (Verification, _SYNTAXES)]
    handlers = [(evt.EVT_N_EVENT_REPORT, on_report)]
    with associated(destination, contexts, calling_ae_title=calling_ae_title, handlers=handlers) as association:
        offered = {context.abstract_syntax for context in association.accepted_contexts}
        if StorageCommitmentPushModel not in offered:
            raise not_offered(destination, StorageCommitmentPushModel, calling_ae_title)
        status, _ = association.send_n_action(
            _request(files, transaction_uid),
            _REQUEST_COMMITMENT,
            StorageCommitmentPushModel,
            StorageCommitmentPushModelInstance,
        )
        if "Status" not in status:
            raise SendError(f"{destination.where} broke the connection when it was asked to commit")
        if status.Status != _SUCCESS:
            found = meaning_of(status.Status)
            raise SendError(
                f"{destination.where} does not take a request for storage commitment "
                f"(status 0x{status.Status:04X}, {found.meaning})",
                permanent=found.outcome is Outcome.NEVER,
            )
        deadline = time.monotonic() + min(_LINGER_S, destination.timeout_s)
        while association.is_established and time.monotonic() < deadline and index.is_awaited(transaction_uid):
            time.sleep(0.02)
        # pynetdicom answers a report in a thread of its own; a release before that ends can wait for ever.
        for thread in answering:
            thread.join(destination.timeout_s)


def _request(files: Sequence[ResultFile], transaction_uid: str) -> Dataset:
    ds = Dataset()
    ds.TransactionUID = transaction_uid
    ds.ReferencedSOPSequence = []
    for file in files:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = file.sop_class_uid, file.key
        ds.ReferencedSOPSequence.append(item)
    return ds
