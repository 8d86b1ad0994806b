"""Receivers of notifications that answer oddly, and settings that cannot work: what is said, and is it tried again?"""

import asyncio
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from pydantic import ValidationError
from pydicom import Dataset

from node.case import NotificationState
from node.index import Index
from node.notify import hl7_oru, mail
from node.notify.clock import notify_due, read_patient
from node.notify.errors import NotifyError
from node.targets import Hl7Target, MailTarget, Rule, WebhookTarget
from tests.factories import make_ct_series
from tests.node.handed_over import SERIES
from tests.node.test_notify import analysing, finish
from tests.node.test_notify_messages import POSITIVE
from tests.serving import serving
from tests.waiting import WAIT_S


class MailServer:
    """refused: what it answers to a recipient or a user instead of taking it. taken: recipients of each message."""

    def __init__(self, port: int) -> None:
        self.refused: dict[str, str] = {}
        self.taken: list[list[str]] = []
        self.port = port

    def authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        answer = self.refused.get(data.login.decode())
        return AuthResult(success=answer is None, handled=False, message=answer)

    async def handle_RCPT(  # noqa: N802 - named by aiosmtpd
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if address in self.refused:
            return self.refused[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - named by aiosmtpd
        self.taken.append(envelope.rcpt_tos)
        return "250 OK"


@pytest.fixture
def mail_server(free_port: Callable[[], int]) -> Iterator[MailServer]:
    server, loop = MailServer(free_port()), asyncio.new_event_loop()
    controller = Controller(
        server,
        hostname="127.0.0.1",
        port=server.port,
        loop=loop,
        authenticator=server.authenticate,
        auth_require_tls=False,
    )
    controller.start()
    yield server
    controller.stop()
    loop.close()


def mail_target(server: MailServer, **settings: Any) -> MailTarget:
    values: dict[str, Any] = {"encryption": "none", "sender": "node@h", "to": ("a@h", "b@h")}
    return MailTarget(type="mail", name="m", host="127.0.0.1", port=server.port, **values | settings)


@pytest.mark.parametrize(("answer", "permanent"), [("450 4.2.0 Greylisted", False), ("550 5.1.1 No such user", True)])
def test_a_mail_that_no_recipient_may_have_yet_is_sent_again(
    mail_server: MailServer, answer: str, permanent: bool
) -> None:
    mail_server.refused = {"a@h": answer, "b@h": answer}
    with pytest.raises(NotifyError, match=rf"refuses every recipient \({answer[:3]}\)") as caught:
        mail.send(POSITIVE, mail_target(mail_server))
    assert caught.value.permanent is permanent


@pytest.mark.parametrize(
    ("answer", "permanent"), [("454 4.7.0 Temporary authentication failure", False), ("535 5.7.8 Invalid", True)]
)
def test_a_mail_server_that_cannot_check_the_user_now_is_tried_again(
    mail_server: MailServer, monkeypatch: pytest.MonkeyPatch, answer: str, permanent: bool
) -> None:
    monkeypatch.setenv("MAIL_PASSWORD", "secret")
    mail_server.refused = {"node": answer}
    target = mail_target(mail_server, encryption="starttls", user="node", secret_env="MAIL_PASSWORD")
    with pytest.raises(NotifyError, match=rf"refuses user 'node' \({answer[:3]}\)") as caught:
        mail.send(POSITIVE, target.model_copy(update={"encryption": "none"}))
    assert caught.value.permanent is permanent


def test_a_mail_that_only_some_may_have_is_not_taken_for_sent(mail_server: MailServer) -> None:
    mail_server.refused = {"b@h": "550 5.1.1 No such user"}
    with pytest.raises(NotifyError, match=r"took it, but not for b@h \(550\); check notify.targets.to") as caught:
        mail.send(POSITIVE, mail_target(mail_server))
    assert mail_server.taken == [["a@h"]]
    assert caught.value.permanent


def test_a_mail_server_without_starttls_is_told_as_such(mail_server: MailServer) -> None:
    with pytest.raises(NotifyError, match="STARTTLS extension not supported by server; check port, encryption"):
        mail.send(POSITIVE, mail_target(mail_server, encryption="starttls"))


def test_a_secret_that_is_no_text_is_told_and_holds_up_nothing_else(
    index: Index, free_port: Callable[[], int], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes("größtes".encode("latin-1"))
    url = f"http://127.0.0.1:{free_port()}/"
    target = WebhookTarget(type="webhook", name="hook", url=url, secret_file=tmp_path / "secret")
    notify_due(index, target)
    index.refuse(analysing(index), "Series 1.2.3 has 5 slices.")
    notify_due(index, target.model_copy(update={"when": Rule(events=("not-analysed",))}))
    (item,) = index.notifications()
    assert item.reason.endswith("/secret is not UTF-8")


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], int]]:
    """Starts an MLLP server that answers with these bytes and keeps the connection; its port."""
    servers, leave = ExitStack(), threading.Event()

    def start(answer: bytes) -> int:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.read(1) not in (b"\x1c", b""):
                    pass
                self.wfile.write(answer)
                leave.wait(10)

        return servers.enter_context(serving(Handler))

    with servers:
        yield start
        leave.set()


@pytest.mark.parametrize(
    "answer",
    [
        b"\x0bMSH|^~\\&|RIS||CSPINE||20261125||ACK^R01^ACK|1|P|2.9\rMSA|AA|1\r\x1c\r",
        b"\x0bMSH|^~\\&|RIS||CSPINE||20261125||ACK|1|P|\rMSA|AA|1\r\x1c\r",
        b"\x0bMSH|^~\\&|RIS||CSPINE||20261125||ACK|1|P|2.5.1\nMSA|AA|1\n\x1c\r",
        b"\x0bMSH|^~\\&|RIS||CSPINE||20261125||ACK|1|P|2.5.1\r\nMSA|AA|1\r\n\x1c\r\n",
        b"\x0bMSH|^~\\&|RIS||CSPINE||20261125||ACK|1|P|2.5.1\rMSA|AA|1\r\x1c",
        b"\r\n\x0bMSH|^~\\&|RIS||CSPINE||20261125||ACK|1|P|2.5.1\rMSA|AA|1\r\x1c\r",
    ],
    ids=[
        "another version",
        "no version",
        "line feeds",
        "a line feed at the end",
        "nothing at the end",
        "a line before",
    ],
)
def test_an_acknowledgement_in_another_form_is_one(answering: Callable[[bytes], int], answer: bytes) -> None:
    target = Hl7Target(type="hl7", name="h", host="127.0.0.1", port=answering(answer), timeout_s=WAIT_S)
    hl7_oru.send(POSITIVE, target)


@pytest.mark.parametrize("name", ["University Hospital Zurich", "St. Mary & Sons"])
def test_a_name_that_no_hl7_message_can_hold_is_refused_with_the_configuration(name: str) -> None:
    for setting in ("sending_facility", "receiving_application", "receiving_facility"):
        with pytest.raises(ValidationError, match=f"{setting}\n.*at most 20 printable characters, and none of"):
            Hl7Target.model_validate({"type": "hl7", "name": "h", "host": "h", setting: name})


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), ("x", "it holds no certificates in PEM")])
def test_a_list_of_authorities_that_cannot_be_used_is_told_as_such(
    mail_server: MailServer, answering: Callable[[bytes], int], tmp_path: Path, content: str | None, why: str
) -> None:
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_text(content)
    with pytest.raises(NotifyError, match=f"ca_file {ca_file} cannot be used: {why}"):
        mail.send(POSITIVE, mail_target(mail_server, encryption="starttls", ca_file=ca_file))
    hl7 = Hl7Target(type="hl7", name="h", host="127.0.0.1", port=answering(b""), tls=True, ca_file=ca_file)
    with pytest.raises(NotifyError, match=f"ca_file {ca_file} cannot be used: {why}"):
        hl7_oru.send(POSITIVE, hl7)


def test_of_an_id_and_a_name_in_several_parts_the_first_is_told(tmp_path: Path) -> None:
    def edit(_: int, ds: Dataset) -> None:
        ds.PatientID, ds.PatientName, ds.AccessionNumber = ["12", "34"], ["Doe^Jane", "Roe"], ["A1", "A2"]

    patient = read_patient(make_ct_series(tmp_path, num_slices=1, edit=edit))
    assert patient is not None
    assert (patient.patient_id, patient.name, patient.accession_number) == ("12", "Doe^Jane", "A1")


def test_damaged_results_are_given_up(index: Index, free_port: Callable[[], int]) -> None:
    target = WebhookTarget(type="webhook", name="hook", url=f"http://127.0.0.1:{free_port()}/")
    notify_due(index, target)
    finish(index, analysing(index), C5=0.9)
    (index.data_dir / "cases" / SERIES / "a" / "findings.json").write_text("", encoding="utf-8")
    notify_due(index, target)
    (item,) = index.notifications()
    assert item.state is NotificationState.FAILED
    assert "findings.json is damaged; analyse the Series again" in item.reason


def test_an_instance_that_cannot_be_parsed_leaves_the_patient_to_the_next_one(tmp_path: Path) -> None:
    damaged, whole = make_ct_series(tmp_path, num_slices=2)
    damaged.write_bytes(b"no DICOM")
    assert read_patient([damaged, whole]) is not None
    assert read_patient([damaged]) is None
