"""A case: one received Series on its way through the node, and the states it can be in.

`TRANSITIONS` says how they follow each other, docs/states.md draws it. A late Instance takes a
case from any state back to RECEIVING; what was made of fewer Instances is then superseded. The state lives in the
database only (`index/`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any


def local_time(at: float) -> str:
    """A time in seconds since the epoch as people here read it."""
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


class CaseState(StrEnum):
    """Where a case stands."""

    RECEIVING = "receiving"  # Instances are arriving, or are awaited
    QUEUED = "queued"  # the Series is whole and waits for a worker
    ANALYSING = "analysing"  # a worker holds it
    DELIVERING = "delivering"  # results are on disk, at least one destination has not got them
    DONE = "done"  # every destination has the results
    SKIPPED = "skipped"  # the rules leave this Series out, or prefer another one of its Study; the reason says which
    REFUSED = "refused"  # this Series cannot be analysed; the reason says why
    FAILED = "failed"  # analysis or delivery was given up; the reason says why


FINISHED = frozenset({CaseState.DONE, CaseState.SKIPPED, CaseState.REFUSED, CaseState.FAILED})
"""Nothing more happens to these cases by itself; what is kept of them may be purged in time."""


TRANSITIONS: dict[CaseState, frozenset[CaseState]] = {
    # it is whole; the rules pass it over; it cannot be analysed
    CaseState.RECEIVING: frozenset({CaseState.QUEUED, CaseState.SKIPPED, CaseState.REFUSED}),
    # a worker is free; a Series that is preferred has come
    CaseState.QUEUED: frozenset({CaseState.ANALYSING, CaseState.SKIPPED, CaseState.RECEIVING, CaseState.REFUSED}),
    # results, with and without destinations; another attempt, or none left; it cannot be analysed
    CaseState.ANALYSING: frozenset(
        {
            CaseState.DELIVERING,
            CaseState.DONE,
            CaseState.QUEUED,
            CaseState.FAILED,
            CaseState.REFUSED,
            CaseState.RECEIVING,
        }
    ),
    # every destination has them, or one was given up
    CaseState.DELIVERING: frozenset({CaseState.DONE, CaseState.FAILED, CaseState.RECEIVING, CaseState.REFUSED}),
    # a delivery is tried again
    CaseState.DONE: frozenset({CaseState.DELIVERING, CaseState.RECEIVING, CaseState.REFUSED}),
    CaseState.FAILED: frozenset({CaseState.DELIVERING, CaseState.RECEIVING, CaseState.REFUSED}),
    CaseState.SKIPPED: frozenset({CaseState.RECEIVING, CaseState.REFUSED}),
    CaseState.REFUSED: frozenset({CaseState.RECEIVING}),
}
"""From each state to the next ones. From all to RECEIVING: a late Instance, `cspine retry`, or some Instances were lost
from the disk; from all to REFUSED: all of them were."""


class DeliveryState(StrEnum):
    """Where the delivery of one result set to one destination stands."""

    PENDING = "pending"  # objects are to be sent at next_attempt_at
    VERIFYING = "verifying"  # every object was taken; the destination is asked again at next_attempt_at
    DONE = "done"  # the destination has every object
    FAILED = "failed"  # given up; the reason says why
    SUPERSEDED = "superseded"  # not done when the case came to another end; not sent any more


class ObjectState(StrEnum):
    """Where one object of a delivery stands."""

    WAITING = "waiting"  # to be sent
    TAKEN = "taken"  # the destination took it; where it is not to be verified, that is the end
    VERIFIED = "verified"  # the destination was asked afterwards, and has it
    REFUSED = "refused"  # the destination will not take it


UNSETTLED = (DeliveryState.PENDING, DeliveryState.VERIFYING)
"""Something is still to be done about these deliveries."""

THERE = (ObjectState.TAKEN, ObjectState.VERIFIED)
"""The destination has these objects, as far as is known."""


@dataclass(frozen=True, kw_only=True)
class ObjectProgress:
    """How far one object is. reason: why not further, or what the destination remarked when it took it."""

    state: ObjectState
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A snapshot of one case. Times are seconds since the epoch; attempts counts analyses begun since it was complete.

    queued_at: since when it has been waiting for a worker, or had; None before it is whole. next_check_at: when
    completeness is judged next.

    attributes: what counts for the whole Series, by keyword, as its first Instance had it. result_dir: folder of the
    latest results, None before there are any. summary: what they say, in a few words. is_outdated: the case was refused
    or skipped since they were made. won_s: seconds won against the quiet time when the Series was found whole, None
    before. num_reopened: how often an Instance came after that.
    num_at_source: Instances that its source said it holds when it was taken as whole; None if it did not say.
    num_conflicts: how often an Instance was refused since one with its UID is here, of this Series, and not the same;
    last_conflict_at, last_conflict_from: when last, and from which calling AE title, None if never.
    is_asked_for: somebody had it started again, so it is analysed whatever the rules say.
    originals_purged_at, results_purged_at: when retention removed what was received, what was made; None while it is
    kept.
    """

    case_id: int
    series_instance_uid: str
    study_instance_uid: str
    calling_ae_title: str
    attributes: dict[str, Any]
    state: CaseState
    reason: str
    num_instances: int
    attempts: int
    first_received_at: float
    last_received_at: float
    queued_at: float | None
    changed_at: float
    next_check_at: float
    result_dir: Path | None
    summary: str
    is_outdated: bool
    won_s: float | None
    num_reopened: int
    num_at_source: int | None
    num_conflicts: int
    last_conflict_at: float | None
    last_conflict_from: str | None
    is_asked_for: bool
    originals_purged_at: float | None
    results_purged_at: float | None

    @property
    def valid_result_dir(self) -> Path | None:
        """Folder of results that may be shown: none that are outdated, which only a later report still refers to."""
        return None if self.is_outdated else self.result_dir

    @property
    def conflicts(self) -> str:
        """What was refused for the UID of an Instance that is here, in words; "" if nothing was."""
        if self.last_conflict_at is None:
            return ""
        refused = "1 Instance" if self.num_conflicts == 1 else f"{self.num_conflicts} Instances"
        return (
            f"{refused} refused: an Instance with the same UID is here, with other content or in another transfer "
            f"syntax. Last {local_time(self.last_conflict_at)}, from {self.last_conflict_from}"
        )


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """An association that carried Instances of a Series. Times in s since the epoch, ended_at None while it is open."""

    opened_at: float
    ended_at: float | None = None
    released: bool = False


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A snapshot of one result set on its way to one destination. Times are seconds since the epoch.

    attempts: begun since the results were made, or since it was retried by hand. objects: how far each is, by SOP
    Instance UID (file name where there is none); empty before the first attempt. sent_at: when the last object was
    taken. transaction_uid: of the storage commitment that is awaited, "" if none is. superseded: UIDs of objects of
    earlier results that the destination took. unreachable: the last attempt did not get through to the destination.
    """

    delivery_id: int
    case_id: int
    series_instance_uid: str
    study_instance_uid: str
    result_dir: Path
    destination: str
    state: DeliveryState
    reason: str
    attempts: int
    next_attempt_at: float
    changed_at: float
    objects: Mapping[str, ObjectProgress]
    sent_at: float
    transaction_uid: str
    superseded: tuple[str, ...]
    unreachable: bool


class About(StrEnum):
    """What a notification is about."""

    ANALYSED = "analysed"  # there are results
    NOT_ANALYSED = "not-analysed"  # the Series cannot be analysed
    FAILED = "failed"  # analysis or delivery was given up


class NotificationState(StrEnum):
    """Where a notification of one target stands."""

    PENDING = "pending"  # to be tried at next_attempt_at
    SENT = "sent"  # the target took it
    UNWANTED = "unwanted"  # the target's rule does not ask for it, or it is out of date
    FAILED = "failed"  # given up; the reason says why


@dataclass(frozen=True, kw_only=True)
class Notification:
    """Something that became of a case, to be told to one target. at: when it did; text: what, in a sentence or two.

    result_dir: folder of the results it is about, None if it is not about results.
    """

    notification_id: int
    case_id: int
    study_instance_uid: str
    series_instance_uid: str
    calling_ae_title: str
    target: str
    about: About
    result_dir: Path | None
    text: str
    at: float
    state: NotificationState
    attempts: int
    reason: str
