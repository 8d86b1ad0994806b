"""What the statuses of DICOM mean for a delivery: of DIMSE, and the Failure Reasons of STOW and of storage commitment.

They share one numbering. A table, so that the conformance statement can show what the code goes by.

Reference: PS3.7 Annex C, PS3.4 B.2.3 and GG.4.2, PS3.18 Table I.2-2, PS3.3 C.14.1.1.
"""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What a status says of an object."""

    TAKEN = "taken"
    REMARKED = "taken, with a remark"
    LATER = "not taken now; sent again later"
    NEVER = "not taken; sending it again would end the same"


@dataclass(frozen=True, kw_only=True)
class StatusMeaning:
    """A range of statuses, both ends included."""

    first: int
    last: int
    meaning: str
    outcome: Outcome


def _row(first: int, last: int, outcome: Outcome, meaning: str) -> StatusMeaning:
    return StatusMeaning(first=first, last=last, meaning=meaning, outcome=outcome)


STATUSES = (
    _row(0x0000, 0x0000, Outcome.TAKEN, "success"),
    _row(0x0001, 0x0001, Outcome.REMARKED, "optional attributes are not supported"),
    _row(0x0107, 0x0107, Outcome.REMARKED, "attributes were left out"),
    _row(0x0116, 0x0116, Outcome.REMARKED, "attribute values were out of range"),
    _row(0xB000, 0xBFFF, Outcome.REMARKED, "attributes were changed or discarded"),
    _row(0x0111, 0x0111, Outcome.REMARKED, "it has this Instance already"),
    _row(0x0110, 0x0110, Outcome.LATER, "processing failure"),
    _row(0x0112, 0x0112, Outcome.LATER, "it does not have this Instance"),
    _row(0x0117, 0x0117, Outcome.NEVER, "invalid Instance"),
    _row(0x0118, 0x0119, Outcome.NEVER, "SOP Class and Instance do not go together"),
    _row(0x0122, 0x0122, Outcome.NEVER, "SOP Class not supported; allow it there"),
    _row(0x0124, 0x0124, Outcome.NEVER, "not authorised; give this node the right to store there"),
    _row(0x0210, 0x0212, Outcome.NEVER, "the request is not understood"),
    _row(0x0213, 0x0213, Outcome.LATER, "resource limitation"),
    _row(0xA700, 0xA7FF, Outcome.LATER, "out of resources; is its disk full?"),
    _row(0xA900, 0xA9FF, Outcome.NEVER, "the dataset does not match its SOP Class"),
    _row(0xC000, 0xCFFF, Outcome.NEVER, "it cannot understand the object"),
)
_OTHER = _row(0x0000, 0xFFFF, Outcome.LATER, "unknown status")


def meaning_of(status: int) -> StatusMeaning:
    """What a status means; one that the Standard does not know is a failure that may pass."""
    return next((row for row in STATUSES if row.first <= status <= row.last), _OTHER)
