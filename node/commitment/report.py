"""What is said of a request: which Instances are held, and the N-EVENT-REPORT that says so. Sends over a given
association; `scp.py` and `clock.py` say which."""

from pydicom import Dataset
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from node.index import Commitment, HeldInstance, Index, is_whole
from node.status import Outcome, meaning_of

NO_SUCH_OBJECT = 0x0112
CLASS_INSTANCE_CONFLICT = 0x0119
DUPLICATE_TRANSACTION = 0x0131

FAILURE_REASONS = {
    NO_SUCH_OBJECT: "no such object instance: it is not here, or its file has been purged, lost or cut off",
    CLASS_INSTANCE_CONFLICT: "class / instance conflict: it is here with another SOP Class",
    DUPLICATE_TRANSACTION: "duplicate transaction UID: an earlier request had it; for all Instances",
}
"""Failure Reasons (PS3.3 C.14.1.1) that are given."""

_ALL_HELD, _SOME_NOT = 1, 2  # Event Types (PS3.4 table J.3-2)


class ReportError(Exception):
    """The requester did not take the report; the message says why."""


def judge(index: Index, commitment: Commitment) -> list[tuple[str, str, int]]:
    """SOP Class UID, SOP Instance UID and Failure Reason (0 if it is held) of every Instance of a request."""
    if commitment.is_duplicate:
        return [(sop_class, uid, DUPLICATE_TRANSACTION) for sop_class, uid in commitment.references]
    held = index.held_instances([uid for _, uid in commitment.references])
    judged = []
    for sop_class, uid in commitment.references:
        reason = 0
        if uid not in held or not _is_kept(held[uid]):
            reason = NO_SUCH_OBJECT
        elif held[uid].sop_class_uid != sop_class:
            reason = CLASS_INSTANCE_CONFLICT
        judged.append((sop_class, uid, reason))
    return judged


def _is_kept(instance: HeldInstance) -> bool:
    """Whether its file is there, and as long as it came; one that cannot be looked at is not vouched for."""
    try:
        return is_whole(instance.path, instance.num_bytes)
    except OSError:
        return False


def event_information(transaction_uid: str, judged: list[tuple[str, str, int]]) -> tuple[int, Dataset]:
    """Event Type ID and Event Information (PS3.4 table J.3-2)."""
    ds = Dataset()
    ds.TransactionUID = transaction_uid
    held: list[Dataset] = []
    failed: list[Dataset] = []
    for sop_class, uid, reason in judged:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        if reason:
            item.FailureReason = reason
        (failed if reason else held).append(item)
    if held:
        ds.ReferencedSOPSequence = held
    if failed:
        ds.FailedSOPSequence = failed
    return (_SOME_NOT if failed else _ALL_HELD), ds


def send_report(association: Association, index: Index, commitment: Commitment) -> str:
    """Sends the report; returns how it reads, for the log.

    Raises:
        ReportError: the requester gave no answer, or refused it.
    """
    judged = judge(index, commitment)
    event_type, ds = event_information(commitment.transaction_uid, judged)
    try:
        answer, _ = association.send_n_event_report(
            ds, event_type, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
    except (RuntimeError, ValueError) as error:  # the association ended; or no context for it was accepted
        raise ReportError("the association does not take it") from error
    if "Status" not in answer:
        raise ReportError("it did not answer the report")
    if meaning_of(answer.Status).outcome not in (Outcome.TAKEN, Outcome.REMARKED):
        raise ReportError(f"it refused the report with status 0x{answer.Status:04X}")
    num_failed = sum(bool(reason) for _, _, reason in judged)
    return f"committed={len(judged) - num_failed} failed={num_failed}"
