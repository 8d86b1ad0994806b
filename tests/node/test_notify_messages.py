"""Notifications as their receivers get them: real servers on loopback, read by libraries that are not ours."""

import asyncio
import json
import socketserver
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email import message_from_bytes
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import hl7
import pytest
from aiosmtpd.controller import Controller
from fhir.resources.R4B.bundle import Bundle

from model import LEVELS
from model.bundle import DEFAULT_BUNDLE, read_bundle
from node.notify import fhir, hl7_oru, mail, webhook
from node.notify.errors import NotifyError
from node.notify.notice import Event, Notice, Patient, event_of
from node.targets import FhirTarget, Hl7Target, MailTarget, Rule, WebhookTarget
from tests.serving import Quiet, serving

PATIENT = Patient(
    patient_id="P-4711", issuer="HOSP", name="Doe^Jane", birth_date="19700131", sex="F", accession_number="ACC-9"
)


def findings(**probabilities: float | None) -> dict[str, Any]:
    """As in findings.json; a level not named is judged intact, None is undetermined."""
    levels = {}
    for name in LEVELS:
        probability = probabilities.get(name, 0.02)
        finding = "undetermined" if probability is None else "present" if probability >= 0.5 else "absent"
        levels[name] = {"probability": probability, "finding": finding}
    judged = [level["probability"] for level in levels.values() if level["probability"] is not None]
    highest = max(judged, default=None)
    rest = "absent" if len(judged) == len(LEVELS) else "undetermined"
    overall = "present" if highest is not None and highest >= 0.5 else rest
    return {
        "model": {"name": "m", "version": "1.2", "trained_on": "Phantoms only.", "operating_point": 0.5},
        "patient_overall": {"probability": highest, "finding": overall},
        "levels": levels,
    }


POSITIVE = Notice(
    event=Event.POSITIVE,
    at=datetime(2026, 11, 25, 12, 30, tzinfo=UTC),
    case_id=7,
    study_instance_uid="1.2.3",
    series_instance_uid="1.2.3.4",
    calling_ae_title="CT1",
    text="Fracture suspected: C5 (87 %). Not judged: C1.",
    findings=findings(C5=0.87, C1=None),
)
REFUSED = replace(POSITIVE, event=Event.NOT_ANALYSED, text="Series 1.2.3.4 has 5 slices.", findings=None)
WITH_PATIENT = replace(POSITIVE, patient=PATIENT)


# ---- what is said ----


def test_no_kind_of_notification_names_a_patient_unless_told_to() -> None:
    mail_target = MailTarget(type="mail", name="m", host="h", sender="a@b", to=("c@d",))
    hl7_target = Hl7Target(type="hl7", name="h", host="h")

    def said(notice: Notice) -> list[str]:
        return [
            json.dumps(notice.to_dict()),
            mail.compose(notice, mail_target).as_string(),
            json.dumps(fhir.transaction(notice)),
            hl7_oru.compose(notice, hl7_target),
        ]

    for with_patient, without in zip(said(WITH_PATIENT), said(POSITIVE), strict=True):
        assert "P-4711" in with_patient
        assert "ACC-9" in with_patient
        assert not any(word in without for word in ("P-4711", "Doe", "ACC-9", "19700131"))


def test_every_kind_of_notification_says_it_is_research_and_what_the_model_was_trained_on() -> None:
    target = Hl7Target(type="hl7", name="h", host="h")
    mail_target = MailTarget(type="mail", name="m", host="h", sender="a@b", to=("c@d",))
    for said in (
        json.dumps(POSITIVE.to_dict()),
        mail.compose(POSITIVE, mail_target).get_content(),
        json.dumps(fhir.transaction(POSITIVE)),
        hl7_oru.compose(POSITIVE, target),
    ):
        assert "not a medical device" in said
        assert "Phantoms only." in said


@pytest.mark.parametrize(
    ("probabilities", "event"),
    [
        ({"C5": 0.87, "C1": None}, Event.POSITIVE),
        ({}, Event.NEGATIVE),
        ({"C7": None}, Event.UNDETERMINED),  # which may be broken
        (dict.fromkeys(LEVELS), Event.UNDETERMINED),
    ],
)
def test_only_a_neck_that_was_judged_as_a_whole_is_negative(
    probabilities: dict[str, float | None], event: Event
) -> None:
    assert event_of(findings(**probabilities)) is event


def test_a_notice_keeps_its_id_however_often_it_is_sent() -> None:
    assert replace(POSITIVE).notice_id == POSITIVE.notice_id
    assert replace(POSITIVE, text="Other.").notice_id != POSITIVE.notice_id


def test_fhir_resources_are_valid_and_refer_to_each_other() -> None:
    bundle = Bundle.model_validate(fhir.transaction(WITH_PATIENT))
    report, *observations = [entry.resource for entry in bundle.entry]
    assert [entry.request.method for entry in bundle.entry] == ["PUT"] * 9
    assert {result.reference for result in report.result} == {entry.fullUrl for entry in bundle.entry[1:]}
    assert report.status == "preliminary"
    by_site = {observation.bodySite.coding[0].code: observation for observation in observations}
    c5, c1 = by_site["36978003"], by_site["14806007"]
    assert c5.valueCodeableConcept.coding[0].code == "52101004"
    assert float(c5.component[0].valueQuantity.value) == 87.0
    assert c1.valueCodeableConcept.coding[0].code == "373068000"
    assert c1.component[0].dataAbsentReason is not None
    assert report.subject.identifier.value == "P-4711"


@pytest.mark.parametrize("name", ["", "^", "Doe"])
def test_fhir_of_a_patient_of_whom_little_is_known_is_valid(name: str) -> None:
    notice = replace(POSITIVE, patient=Patient(name=name, patient_id=" ", accession_number=" "))
    report = Bundle.model_validate(fhir.transaction(notice)).entry[0].resource
    assert (report.subject.identifier.value, report.subject.display) == ("unknown", "Doe" if name == "Doe" else None)
    assert report.basedOn is None


def test_fhir_says_of_a_series_that_was_not_analysed_that_there_is_no_result() -> None:
    bundle = Bundle.model_validate(fhir.transaction(REFUSED))
    (report,) = [entry.resource for entry in bundle.entry]
    assert report.status == "cancelled"
    assert "has 5 slices" in report.conclusion
    assert report.subject is None


def test_an_hl7_library_that_is_not_ours_reads_the_message() -> None:
    target = Hl7Target(type="hl7", name="h", host="h", receiving_application="RIS", processing_id="T")
    read = hl7.parse(hl7_oru.compose(WITH_PATIENT, target))
    assert str(read.segment("MSH")[9]) == "ORU^R01^ORU_R01"
    assert str(read.segment("MSH")[5]) == "RIS"
    assert str(read.segment("PID")[3]) == "P-4711^^^HOSP"
    assert str(read.segment("PID")[5]) == "Doe^Jane"
    assert str(read.segment("OBR")[25]) == "P"
    rows = {(str(obx[3]).split("^")[0], str(obx[4])): str(obx[5]) for obx in read.segments("OBX")}
    assert rows["72704001", "C5"].startswith("52101004^Present")
    assert rows["111012", "C5"] == "87.0"
    assert rows["72704001", "C1"].startswith("373068000")
    assert ("111012", "C1") not in rows
    assert rows["72704001", "patient"].startswith("52101004")
    assert [int(str(obx[1])) for obx in read.segments("OBX")] == list(range(1, len(rows) + 1))


def test_hl7_delimiters_in_a_text_are_escaped() -> None:
    notice = replace(POSITIVE, text="a|b^c&d~e\\f")
    read = hl7.parse(hl7_oru.compose(notice, Hl7Target(type="hl7", name="h", host="h")))
    (conclusion,) = [str(obx[5]) for obx in read.segments("OBX") if "121077" in str(obx[3])]
    assert not set(conclusion) & set("|^&~")
    assert read.unescape(conclusion).startswith("a|b^c&d~e\\f")


def test_hl7_says_what_the_model_of_the_package_was_trained_on_in_full() -> None:
    trained_on = read_bundle(DEFAULT_BUNDLE).info.trained_on
    told = findings(C5=0.9)
    told["model"] |= {"trained_on": trained_on}
    text = "Series not analysed: " + "a long reason, " * 40
    message = hl7_oru.compose(replace(POSITIVE, findings=told, text=text), Hl7Target(type="hl7", name="h", host="h"))
    read = hl7.parse(message)
    values = {str(obx[3]).split("^")[0]: (str(obx[2]), read.unescape(str(obx[5]))) for obx in read.segments("OBX")}
    assert values["111001"] == ("TX", f"m 1.2: {trained_on}")
    assert values["121077"][1].startswith(text.strip())


@pytest.mark.parametrize(
    ("patient", "segment"),
    [
        (Patient(patient_id="A&B^C", name="O&Brien^J|n"), r"PID|1||A\T\B\S\C||O\T\Brien^J\F\n"),
        (Patient(patient_id="1", name="Yamada^Tarou=山田^太郎=やまだ^たろう"), "PID|1||1||Yamada^Tarou"),
        (Patient(patient_id="1", name="=山田^太郎"), "PID|1||1||山田^太郎"),
        (Patient(patient_id="1", birth_date="1970.01.31", name="A"), "PID|1||1||A"),
        (Patient(patient_id="1", name="A\r\nOBX|1^B"), r"PID|1||1||A OBX\F\1^B"),
        (
            Patient(patient_id="1", issuer="Universitätsklinikum zu Köln"),
            "PID|1||1^^^&Universitätsklinikum zu Köln&L||",
        ),
    ],
)
def test_odd_patients_fit_into_hl7(patient: Patient, segment: str) -> None:
    message = hl7_oru.compose(replace(POSITIVE, patient=patient), Hl7Target(type="hl7", name="h", host="h"))
    assert message.split("\r")[1] == segment
    assert all(line[:3] in ("MSH", "PID", "OBR", "OBX", "") for line in message.split("\r"))


def test_what_hl7_cannot_hold_is_given_up_and_names_no_patient() -> None:
    notice = replace(POSITIVE, patient=replace(PATIENT, sex="x" * 300))
    with pytest.raises(NotifyError, match="cannot be put into HL7") as caught:
        hl7_oru.send(notice, Hl7Target(type="hl7", name="h", host="127.0.0.1", port=9))
    assert caught.value.permanent
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "notice", "wanted"),
    [
        (Rule(), POSITIVE, True),
        (Rule(), REFUSED, False),
        (Rule(), replace(REFUSED, event=Event.FAILED), True),
        (Rule(), replace(POSITIVE, event=Event.NEGATIVE, findings=findings()), False),
        (Rule(levels=("C5", "C6")), POSITIVE, True),
        (Rule(levels=("C1", "C2")), POSITIVE, False),
        (Rule(min_probability=0.9), POSITIVE, False),
        (Rule(min_probability=0.9), replace(REFUSED, event=Event.FAILED), True),
        (Rule(calling_ae_titles=("CT*",)), POSITIVE, True),
        (Rule(calling_ae_titles=("MR*",)), POSITIVE, False),
    ],
)
def test_a_rule_wants_only_what_it_names(rule: Rule, notice: Notice, wanted: bool) -> None:
    assert rule.wants(notice) is wanted


# ---- how it gets there ----


class WebServer:
    """Keeps what is posted and answers with `status`."""

    def __init__(self) -> None:
        self.status, self.url = 200, ""
        self.got: list[tuple[dict[str, str], bytes]] = []

    @contextmanager
    def serving(self) -> Iterator["WebServer"]:
        outer = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

        with serving(Handler) as port:
            self.url = f"http://127.0.0.1:{port}/hook"
            yield self


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer().serving() as server:
        yield server


def test_a_webhook_carries_the_findings_and_a_signature_that_can_be_checked(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "s3cret")
    webhook.send(POSITIVE, WebhookTarget(type="webhook", name="w", url=web.url, secret_env="HOOK_SECRET"))
    ((headers, body),) = web.got
    told = json.loads(body)
    assert told["event"] == "positive"
    assert told["findings"]["levels"]["C5"]["probability"] == 0.87
    assert told["notice_id"] == headers["X-CSpine-Notice"]
    timestamp = int(headers["X-CSpine-Signature"].split(",")[0].removeprefix("t="))
    assert headers["X-CSpine-Signature"] == webhook.sign(body, "s3cret", timestamp)
    assert headers["X-CSpine-Signature"] != webhook.sign(body + b" ", "s3cret", timestamp)


@pytest.mark.parametrize(
    ("status", "permanent"), [(500, False), (503, False), (429, False), (401, True), (404, True), (302, True)]
)
def test_what_an_answer_means_for_another_try(web: WebServer, status: int, permanent: bool) -> None:
    web.status = status
    with pytest.raises(NotifyError) as caught:
        webhook.send(POSITIVE, WebhookTarget(type="webhook", name="w", url=web.url))
    assert caught.value.permanent is permanent
    assert len(web.got) == 1  # a redirect is not followed


def test_fhir_is_posted_with_its_token(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    fhir.send(POSITIVE, FhirTarget(type="fhir", name="f", url=web.url, secret_file=tmp_path / "token"))
    ((headers, body),) = web.got
    assert headers["Authorization"] == "Bearer abc"
    assert headers["Content-Type"] == "application/fhir+json"
    assert Bundle.model_validate_json(body).type == "transaction"


def test_fhir_in_a_folder_is_one_file_however_often_it_is_written(tmp_path: Path) -> None:
    target = FhirTarget(type="fhir", name="f", path=tmp_path / "fhir")
    for _ in range(2):
        fhir.send(POSITIVE, target)
    (path,) = (tmp_path / "fhir").iterdir()
    assert Bundle.model_validate_json(path.read_bytes()).entry[0].resource.conclusion.startswith("Fracture suspected")


class Mailbox:
    """An SMTP handler that keeps what comes, or refuses it."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.answer = "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - named by aiosmtpd
        if self.answer.startswith("250"):
            self.messages.append(envelope.content)
        return self.answer


@pytest.fixture
def mailbox(free_port: Callable[[], int]) -> Iterator[tuple[Mailbox, int]]:
    box, port = Mailbox(), free_port()
    loop = asyncio.new_event_loop()
    controller = Controller(box, hostname="127.0.0.1", port=port, loop=loop)
    controller.start()
    yield box, port
    controller.stop()
    loop.close()


def test_a_mail_arrives_and_says_where_to_look(mailbox: tuple[Mailbox, int]) -> None:
    box, port = mailbox
    target = MailTarget(
        type="mail", name="m", host="127.0.0.1", port=port, encryption="none", sender="node@h", to=("a@h", "b@h")
    )
    mail.send(POSITIVE, target)
    (raw,) = box.messages
    message = message_from_bytes(raw)
    assert message["Subject"] == "C-Spine Node: fracture suspected (C5)"
    assert message["To"] == "a@h, b@h"
    text = str(message.get_payload())
    assert "C5    87.0 %   present" in text
    assert "1.2.3.4" in text


@pytest.mark.parametrize(("answer", "permanent"), [("451 later", False), ("554 never", True)])
def test_what_a_mail_servers_answer_means(mailbox: tuple[Mailbox, int], answer: str, permanent: bool) -> None:
    box, port = mailbox
    box.answer = answer
    target = MailTarget(
        type="mail", name="m", host="127.0.0.1", port=port, encryption="none", sender="n@h", to=("a@h",)
    )
    with pytest.raises(NotifyError) as caught:
        mail.send(POSITIVE, target)
    assert caught.value.permanent is permanent


@pytest.fixture
def mllp() -> Iterator[Callable[[str], tuple[int, list[bytes]]]]:
    """Starts an MLLP server that answers with this acknowledgement code, "" for rubbish; its port, what it got."""
    servers = ExitStack()

    def start(code: str) -> tuple[int, list[bytes]]:
        got: list[bytes] = []

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                frame = b""
                while not frame.endswith(b"\x1c\r"):
                    frame += self.rfile.read(1)
                got.append(frame)
                ack = hl7.parse(frame.strip(b"\x0b\x1c\r").decode()).create_ack(code) if code else "?"
                self.wfile.write(b"\x0b" + str(ack).encode() + b"\x1c\r")

        return servers.enter_context(serving(Handler)), got

    with servers:
        yield start


def test_an_acknowledged_message_is_sent(mllp: Callable[[str], tuple[int, list[bytes]]]) -> None:
    port, got = mllp("AA")
    hl7_oru.send(POSITIVE, Hl7Target(type="hl7", name="h", host="127.0.0.1", port=port))
    assert got[0].startswith(b"\x0bMSH|^~\\&|CSPINE|")


@pytest.mark.parametrize(("code", "permanent"), [("AE", False), ("AR", True), ("", False)])
def test_what_another_acknowledgement_means(
    mllp: Callable[[str], tuple[int, list[bytes]]], code: str, permanent: bool
) -> None:
    port, _ = mllp(code)
    with pytest.raises(NotifyError) as caught:
        hl7_oru.send(POSITIVE, Hl7Target(type="hl7", name="h", host="127.0.0.1", port=port))
    assert caught.value.permanent is permanent


@pytest.mark.parametrize("kind", ["webhook", "mail", "hl7", "fhir"])
def test_a_receiver_that_is_down_is_tried_again(kind: str, free_port: Callable[[], int]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    send: dict[str, Callable[[], None]] = {
        "webhook": partial(webhook.send, POSITIVE, WebhookTarget(type="webhook", name="x", url=url)),
        "mail": partial(
            mail.send,
            POSITIVE,
            MailTarget(type="mail", name="x", host="127.0.0.1", port=port, sender="a@b", to=("c@d",)),
        ),
        "hl7": partial(hl7_oru.send, POSITIVE, Hl7Target(type="hl7", name="x", host="127.0.0.1", port=port)),
        "fhir": partial(fhir.send, POSITIVE, FhirTarget(type="fhir", name="x", url=url)),
    }
    with pytest.raises(NotifyError, match="does not answer") as caught:
        send[kind]()
    assert not caught.value.permanent
