"""The clock side of notifications: what has become of cases is noted, what is due is sent, how it went is noted.

APScheduler calls `notify_due` for each target; targets do not wait for each other, and no case waits for them.
"""

import contextlib
import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue

from model import PARSE_ERRORS
from node.case import About, Notification, NotificationState
from node.index import Index
from node.notify import fhir, mail, webhook
from node.notify.errors import NotifyError
from node.notify.notice import Event, Notice, Patient, event_of
from node.person_name import shortest_name
from node.process import describe_error
from node.profiles import FINDINGS_FILE
from node.retry import describe_wait, retry_wait_s
from node.targets import FhirTarget, Hl7Target, MailTarget, Target, WebhookTarget

log = logging.getLogger(__name__)

_RETRY_FIRST_S, _RETRY_MAX_S = 10.0, 3600.0
_MAX_ATTEMPTS = 33  # with these waits, about a day
_PATIENT_KEYWORDS = {
    "patient_id": "PatientID",
    "issuer": "IssuerOfPatientID",
    "name": "PatientName",
    "birth_date": "PatientBirthDate",
    "sex": "PatientSex",
    "accession_number": "AccessionNumber",
}


def notify_due(index: Index, target: Target) -> None:
    """Sends every notification of this target that is due, and notes how each went."""
    index.note_events(target.name)
    while (notification := index.next_notification(target.name)) is not None:
        where = f"case={notification.case_id} target={target.name!r} about={notification.about}"
        try:
            notice = make_notice(notification, index, target)
            if notice is None or not target.when.wants(notice):
                index.settle_notification(notification, NotificationState.UNWANTED)
                continue
            send(notice, target)
        except (NotifyError, OSError) as error:
            _note_failure(index, notification, error, where)
        except Exception as error:  # put off, so that the others do not wait for it
            _note_failure(index, notification, NotifyError(describe_error(error)), where)
            raise
        else:
            index.settle_notification(notification, NotificationState.SENT)
            log.info("action=notified %s event=%s", where, notice.event)


def _note_failure(index: Index, notification: Notification, error: NotifyError | OSError, where: str) -> None:
    now, attempts = index.now(), notification.attempts + 1
    if (isinstance(error, NotifyError) and error.permanent) or attempts >= _MAX_ATTEMPTS:
        reason = f"given up after {attempts} attempt(s): {error}"
        index.settle_notification(notification, NotificationState.FAILED, reason)
    else:
        wait_s = retry_wait_s(attempts, _RETRY_FIRST_S, _RETRY_MAX_S)
        reason = f"attempt {attempts} failed, next in {describe_wait(wait_s)}: {error}"
        index.settle_notification(notification, NotificationState.PENDING, reason, now + wait_s)
    log.warning("action=not-notified %s: %s", where, reason)


def send(notice: Notice, target: Target) -> None:
    """Sends a notice, whatever the target's rule.

    Raises:
        NotifyError: the target did not take it.
        OSError: its secret cannot be read.
    """
    if isinstance(target, WebhookTarget):
        webhook.send(notice, target)
    elif isinstance(target, MailTarget):
        mail.send(notice, target)
    elif isinstance(target, FhirTarget):
        fhir.send(notice, target)
    else:
        assert isinstance(target, Hl7Target)
        from node.notify import hl7_oru  # its library knows all of HL7, and takes its time to load

        hl7_oru.send(notice, target)


def make_notice(notification: Notification, index: Index, target: Target) -> Notice | None:
    """What to say; None when it is out of date: said after what came later, it would replace that at the receiver."""
    if index.is_overtaken(notification):
        return None
    findings = None
    if notification.result_dir is not None:
        findings = _read_findings(notification.result_dir)
        if findings is None:
            return None
    events = {About.NOT_ANALYSED: Event.NOT_ANALYSED, About.FAILED: Event.FAILED}
    return Notice(
        event=event_of(findings) if findings else events[notification.about],
        at=datetime.fromtimestamp(notification.at, UTC),
        case_id=notification.case_id,
        study_instance_uid=notification.study_instance_uid,
        series_instance_uid=notification.series_instance_uid,
        calling_ae_title=notification.calling_ae_title,
        text=notification.text,
        findings=findings,
        patient=read_patient(index.instance_paths(notification.series_instance_uid)) if target.patient_data else None,
    )


def _read_findings(result_dir: Path) -> dict[str, Any] | None:
    try:
        findings: dict[str, Any] = json.loads((result_dir / FINDINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        problem = f"{result_dir / FINDINGS_FILE} is damaged; analyse the Series again"
        raise NotifyError(problem, permanent=True) from error
    return findings


def read_patient(paths: Iterable[Path]) -> Patient | None:
    """Who a Series is about, as its first Instance says that can be parsed; None when none is here any more.

    Raises:
        OSError: an Instance cannot be read.
    """
    tags = ["SpecificCharacterSet", *_PATIENT_KEYWORDS.values()]
    for path in paths:
        with contextlib.suppress(InvalidDicomError, *PARSE_ERRORS):
            ds = dcmread(path, stop_before_pixels=True, specific_tags=[*tags])
            values = {name: _first_text(ds.get(keyword)) for name, keyword in _PATIENT_KEYWORDS.items()}
            return Patient(**values | {"name": shortest_name(values["name"])})
    return None


def _first_text(value: Any) -> str:
    """The value, of several (a backslash in an ID makes it two) the first, as result objects have it; "" for none."""
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return str(value or "")
