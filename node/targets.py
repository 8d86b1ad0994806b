"""Who is notified of what: the settings of `notify.targets`, and which notices a target wants.

Settings only, read by `node/config.py`; `node/notify` sends.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from node.config_faults import written_like
from node.notify.notice import Event, Notice, suspected_levels
from node.secret import WithSecret
from node.settings import Port, Section, check_names

Level = Literal["C1", "C2", "C3", "C4", "C5", "C6", "C7"]


class Rule(Section):
    """What must be true of a notice; what is left out is true of all.

    events: any of these. levels: a fracture is suspected at one of them. min_probability: of the patient, 0..1.
    calling_ae_titles: patterns with `*` and `?`, of who sent the Series.
    """

    events: tuple[Event, ...] = Field(default=(Event.POSITIVE, Event.FAILED), min_length=1)
    levels: tuple[Level, ...] = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
    min_probability: float = Field(default=0.0, ge=0, le=1)
    calling_ae_titles: tuple[str, ...] = ("*",)

    def wants(self, notice: Notice) -> bool:
        """Whether all of it is true of the notice. Levels and probability are asked of positive ones only."""
        if notice.event not in self.events:
            return False
        if not any(fnmatchcase(notice.calling_ae_title, pattern) for pattern in self.calling_ae_titles):
            return False
        if notice.event is not Event.POSITIVE or notice.findings is None:
            return True
        probability = notice.findings["patient_overall"]["probability"] or 0.0
        suspected = suspected_levels(notice.findings)
        at_level = not suspected or any(name in self.levels for name in suspected)
        return probability >= self.min_probability and at_level


class _Target(Section):
    """What every target has.

    patient_data: whether patient ID, name, birth date, sex and accession number go along; without it none does.
    """

    name: str = Field(min_length=1)
    when: Rule = Rule()
    patient_data: bool = False
    timeout_s: float = Field(default=15.0, gt=0, le=300)


class _WithSecret(_Target, WithSecret):
    """A target that is told who we are."""


def _check_namespace(value: str) -> str:
    """A namespace ID (HL7 v2.5.1 2.A.33, HD.1) as a message can hold it."""
    if len(value) > 20 or not value.isprintable() or set(value) & set("|^~\\&"):
        raise ValueError("a name in an HL7 header has at most 20 printable characters, and none of | ^ ~ \\ &")
    return value


HL7Name = Annotated[str, AfterValidator(_check_namespace)]
WebAddress = Annotated[str, written_like(r"https?://[^\s@]+", "https://chat.example.org/hook, without a user in it")]
MailAddress = Annotated[str, written_like(r"[^@\s]+@[^@\s]+", "trauma@example.org")]


class WebhookTarget(_WithSecret):
    """JSON by HTTP POST, signed where there is a secret."""

    type: Literal["webhook"]
    url: WebAddress


class MailTarget(_WithSecret):
    """An e-mail. The secret is the password of `user`."""

    type: Literal["mail"]
    host: str = Field(min_length=1)
    port: Port = 587
    encryption: Literal["starttls", "tls", "none"] = "starttls"
    ca_file: Path | None = None
    user: str | None = Field(default=None, min_length=1)
    sender: MailAddress
    to: tuple[MailAddress, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_user(self) -> Self:
        if (self.user is not None) != self.has_secret:
            raise ValueError("give user and secret_file (or secret_env) together, or none of them")
        if self.user is not None and self.encryption == "none":
            raise ValueError("encryption none would send the password in clear; use starttls or tls")
        return self


class Hl7Target(_Target):
    """ORU^R01 (HL7 v2.5.1) over MLLP. processing_id: P production, T training, D debugging (HL7 table 0103)."""

    type: Literal["hl7"]
    host: str = Field(min_length=1)
    port: Port = 2575
    tls: bool = False
    ca_file: Path | None = None
    sending_facility: HL7Name = ""
    receiving_application: HL7Name = ""
    receiving_facility: HL7Name = ""
    processing_id: Literal["P", "T", "D"] = "P"
    when: Rule = Rule(events=(Event.POSITIVE, Event.NEGATIVE, Event.UNDETERMINED))


class FhirTarget(_WithSecret):
    """A FHIR R4 transaction, to a server's base URL or into a folder. The secret is a bearer token."""

    type: Literal["fhir"]
    url: WebAddress | None = None
    path: Path | None = None
    when: Rule = Rule(events=(Event.POSITIVE, Event.NEGATIVE, Event.UNDETERMINED))

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.url is None) == (self.path is None):
            raise ValueError("give url (a FHIR server) or path (a folder), one of them")
        return self


Target = Annotated[WebhookTarget | MailTarget | Hl7Target | FhirTarget, Field(discriminator="type")]


class NotifyConfig(Section):
    """Who is told what became of a case. A notification never holds up a case."""

    targets: tuple[Target, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        check_names("targets", (target.name for target in self.targets))
        return self
