"""A notice as an e-mail in plain text, over SMTP with TLS where it is configured."""

import smtplib
import ssl
from email.message import EmailMessage
from email.utils import format_datetime

from node.notify.errors import NotifyError
from node.notify.notice import NOTICE, Event, Notice, suspected_levels
from node.notify.trust import trusting
from node.targets import MailTarget

_SUBJECTS = {
    Event.POSITIVE: "fracture suspected",
    Event.NEGATIVE: "no fracture suspected",
    Event.UNDETERMINED: "no fracture suspected, but not all levels could be judged",
    Event.NOT_ANALYSED: "a CT Series was not analysed",
    Event.FAILED: "a case failed",
}


def send(notice: Notice, target: MailTarget) -> None:
    """Hands the message to the mail server.

    Raises:
        NotifyError: the server does not take it.
    """
    server = f"mail server {target.host}:{target.port}"
    password = target.read_secret()
    tls = trusting(target.ca_file)
    try:
        with (
            smtplib.SMTP_SSL(target.host, target.port, timeout=target.timeout_s, context=tls)
            if target.encryption == "tls"
            else smtplib.SMTP(target.host, target.port, timeout=target.timeout_s)
        ) as smtp:
            if target.encryption == "starttls":
                smtp.starttls(context=tls)
            if target.user:
                smtp.login(target.user, password)
            refused = smtp.send_message(compose(notice, target))
    except smtplib.SMTPNotSupportedError as error:  # says which
        problem = f"{server} lacks what is configured: {str(error).rstrip('.')}; check port, encryption and user"
        raise NotifyError(problem, permanent=True) from error
    except smtplib.SMTPAuthenticationError as error:
        problem = f"{server} refuses user {target.user!r} ({error.smtp_code}); check user and password"
        raise NotifyError(problem, permanent=_is_final(error.smtp_code)) from error
    except smtplib.SMTPRecipientsRefused as error:
        codes = sorted({code for code, _ in error.recipients.values()})
        problem = f"{server} refuses every recipient ({', '.join(map(str, codes))}); check notify.targets.to"
        raise NotifyError(problem, permanent=all(map(_is_final, codes))) from error
    except smtplib.SMTPResponseException as error:
        problem = f"{server} answered {error.smtp_code}; see its log"
        raise NotifyError(problem, permanent=_is_final(error.smtp_code)) from error
    except ssl.SSLError as error:
        raise NotifyError(f"{server} has a certificate that is not trusted here", permanent=True) from error
    except (OSError, smtplib.SMTPException) as error:
        raise NotifyError(f"{server} does not answer ({type(error).__name__}); check that it runs") from error
    if refused:  # the others have it, and would get it again
        who = ", ".join(f"{address} ({code})" for address, (code, _) in refused.items())
        raise NotifyError(f"{server} took it, but not for {who}; check notify.targets.to", permanent=True)


def _is_final(code: int) -> bool:
    """Whether the same would be answered again. 4yz may pass: greylisting, a full disk. Reference: RFC 5321 4.2.1."""
    return 500 <= code < 600


def compose(notice: Notice, target: MailTarget) -> EmailMessage:
    """The message. Its Message-ID is the same each time it is sent, so that a repeat can be told."""
    message = EmailMessage()
    levels = suspected_levels(notice.findings) if notice.findings else []
    message["Subject"] = f"C-Spine Node: {_SUBJECTS[notice.event]}" + (f" ({', '.join(levels)})" if levels else "")
    message["From"], message["To"] = target.sender, ", ".join(target.to)
    message["Date"] = format_datetime(notice.at)
    message["Message-ID"] = f"<{notice.notice_id}@cspine-node>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(_body(notice))
    return message


def _body(notice: Notice) -> str:
    lines = [notice.text, ""]
    if notice.patient:
        patient = notice.patient
        lines += [f"Patient     {patient.name} ({patient.patient_id})", f"Accession   {patient.accession_number}"]
    lines += [
        f"Study       {notice.study_instance_uid}",
        f"Series      {notice.series_instance_uid}",
        f"Case        {notice.case_id}, from {notice.calling_ae_title}, {notice.at_utc}",
    ]
    if notice.findings:
        lines += ["", *(_level_line(name, level) for name, level in notice.findings["levels"].items())]
        model = notice.findings["model"]
        lines += ["", f"Model {model['name']} {model['version']}: {model['trained_on']}"]
    return "\n".join([*lines, "", NOTICE, ""])


def _level_line(name: str, level: dict[str, object]) -> str:
    probability = level["probability"]
    number = f"{100 * probability:5.1f} %" if isinstance(probability, float) else "      -"
    return f"{name}   {number}   {level['finding']}"
