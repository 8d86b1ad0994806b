"""A notice: one thing that became of a case, as every kind of notification tells it.

Plain data; `webhook.py`, `mail.py`, `hl7_oru.py` and `fhir.py` put it into their own words. A patient is in it only
where the target's configuration asks for that.
"""

import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

NOTICE = "Research software, not a medical device. Not for diagnosis. Not reviewed by a person."
_NAMESPACE = uuid.UUID("8d1f6f8e-41f1-5f0e-9d0c-6f2a4f1f6c11")


class Event(StrEnum):
    """What became of a case."""

    POSITIVE = "positive"  # at least one level is suspected of a fracture
    NEGATIVE = "negative"  # all levels were judged, and none is
    UNDETERMINED = "undetermined"  # analysed, but not all levels could be judged, and none of those that were is
    NOT_ANALYSED = "not-analysed"  # the Series cannot be analysed
    FAILED = "failed"  # analysis or delivery was given up


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Who it is about, as the source Instances say; "" where they do not.

    name: as DICOM writes it, `Family^Given`, without delimiters at the end. birth_date: `YYYYMMDD`. sex: M, F or O.
    """

    patient_id: str = ""
    issuer: str = ""
    name: str = ""
    birth_date: str = ""
    sex: str = ""
    accession_number: str = ""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One event of one case. at: when it happened. findings: as in `findings.json`, None if there are none.

    text: what happened in a sentence or two, without naming a patient.
    """

    event: Event
    at: datetime
    case_id: int
    study_instance_uid: str
    series_instance_uid: str
    calling_ae_title: str
    text: str
    findings: dict[str, Any] | None = field(default=None, repr=False)
    patient: Patient | None = field(default=None, repr=False)

    @property
    def notice_id(self) -> str:
        """A UUID that is the same whenever this notice is sent again, and for no other."""
        return derive_uuid(self.series_instance_uid, self.event, self.text, self.at_utc)

    @property
    def at_utc(self) -> str:
        """ISO 8601, to the second."""
        return self.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what a webhook carries (docs/notifications.md)."""
        told = {
            "notice_id": self.notice_id,
            "event": self.event,
            "at": self.at_utc,
            "case_id": self.case_id,
            "study_instance_uid": self.study_instance_uid,
            "series_instance_uid": self.series_instance_uid,
            "calling_ae_title": self.calling_ae_title,
            "text": self.text,
            "notice": NOTICE,
            "findings": self.findings,
        }
        return told | ({"patient": asdict(self.patient)} if self.patient else {})


def derive_uuid(*parts: str) -> str:
    """A UUID that is the same for the same parts and for no others."""
    return str(uuid.uuid5(_NAMESPACE, "\n".join(parts)))


def suspected_levels(findings: dict[str, Any]) -> list[str]:
    """The levels whose finding is present, from C1 down."""
    return [name for name, level in findings["levels"].items() if level["finding"] == "present"]


def event_of(findings: dict[str, Any]) -> Event:
    """What became of a case that was analysed."""
    events = {"present": Event.POSITIVE, "absent": Event.NEGATIVE, "undetermined": Event.UNDETERMINED}
    return events[findings["patient_overall"]["finding"]]
