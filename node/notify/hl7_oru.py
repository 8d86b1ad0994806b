"""A notice as HL7 v2.5.1 ORU^R01 over MLLP: one OBR, two OBX for each level and for the patient.

Reference: HL7 v2.5.1 chapter 7.3.1 (ORU^R01), chapter 2.9.2 (acknowledgement); MLLP release 1.
"""

import socket
import ssl
from datetime import datetime
from typing import Any

from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.core import Component, Message
from hl7apy.exceptions import HL7apyException

from node import codes
from node.notify.errors import NotifyError
from node.notify.notice import NOTICE, Notice, Patient, derive_uuid
from node.notify.trust import trusting
from node.targets import Hl7Target

_START, _END = b"\x0b", b"\x1c\r"
_MAX_ACK_BYTES = 65536
_MAX_NAMESPACE = 20  # characters of HD.1
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})


def send(notice: Notice, target: Hl7Target) -> None:
    """Sends the message and awaits its acknowledgement.

    Raises:
        NotifyError: it is not acknowledged; permanent when it was rejected (AR).
    """
    receiver = f"HL7 receiver {target.host}:{target.port}"
    try:
        framed = _START + compose(notice, target).encode() + _END
    except (HL7apyException, ValueError) as error:  # its message may quote a patient
        raise NotifyError(f"it cannot be put into HL7 v2.5.1 ({type(error).__name__})", permanent=True) from error
    try:
        with socket.create_connection((target.host, target.port), target.timeout_s) as plain:
            if target.tls:
                context = trusting(target.ca_file)
                with context.wrap_socket(plain, server_hostname=target.host) as secured:
                    answer = _exchange(secured, framed)
            else:
                answer = _exchange(plain, framed)
    except ssl.SSLError as error:
        raise NotifyError(f"{receiver} has a certificate that is not trusted here", permanent=True) from error
    except OSError as error:
        raise NotifyError(f"{receiver} does not answer ({type(error).__name__}); check that it runs") from error
    code = _acknowledgement(answer)
    if code not in ("AA", "CA"):
        said = f"answered {code}" if code else "gave no acknowledgement"
        raise NotifyError(f"{receiver} {said} to ORU^R01; see its log", permanent=code in ("AR", "CR"))


def _exchange(connection: socket.socket, framed: bytes) -> bytes:
    """Sends one frame; the next one that comes back, or what there is of it when the peer closes.

    Its end is the first byte of `_END`: some send no carriage return after it, or a line feed too.
    """
    connection.sendall(framed)
    answer = b""
    while _END[:1] not in answer and len(answer) < _MAX_ACK_BYTES:
        part = connection.recv(4096)
        if not part:
            break
        answer += part
    return answer


def _acknowledgement(answer: bytes) -> str:
    """MSA-1 of an acknowledgement, "" if it is none.

    Of any version, and with any end of line: an acknowledgement that is not understood has the message sent again.
    """
    segments = answer.strip(_START + _END + b"\n").decode("utf-8", "replace").splitlines()
    if not segments or not segments[0].startswith("MSH") or len(segments[0]) < 4:
        return ""
    separator = segments[0][3]
    fields = next((found for line in segments if (found := line.split(separator))[0] == "MSA"), [])
    return fields[1].strip() if len(fields) > 1 else ""


def compose(notice: Notice, target: Hl7Target) -> str:
    """The message in ER7, checked against the standard's structure."""
    message = Message("ORU_R01", version="2.5.1", validation_level=VALIDATION_LEVEL.STRICT)
    _header(message.msh, notice, target)
    result = message.add_group("ORU_R01_PATIENT_RESULT")
    if notice.patient:
        _patient(result.add_group("ORU_R01_PATIENT").add_segment("PID"), notice.patient)
    order = result.add_group("ORU_R01_ORDER_OBSERVATION")
    _request(order.add_segment("OBR"), notice)
    for number, values in enumerate(_observations(notice), start=1):
        _observation(order.add_group("ORU_R01_OBSERVATION").add_segment("OBX"), number, notice, *values)
    message.validate()
    er7: str = message.to_er7()
    return er7 + "\r"


def _header(msh: Any, notice: Notice, target: Hl7Target) -> None:
    msh.msh_3.msh_3_1 = "CSPINE"
    msh.msh_4.msh_4_1 = target.sending_facility
    msh.msh_5.msh_5_1 = target.receiving_application
    msh.msh_6.msh_6_1 = target.receiving_facility
    msh.msh_7.msh_7_1 = _time(notice)
    msh.msh_9.msh_9_1, msh.msh_9.msh_9_2, msh.msh_9.msh_9_3 = "ORU", "R01", "ORU_R01"
    msh.msh_10 = notice.notice_id.replace("-", "")[:20]  # at most 20 characters
    msh.msh_11.msh_11_1 = target.processing_id
    msh.msh_12.msh_12_1 = "2.5.1"
    msh.msh_18 = "UNICODE UTF-8"


def _patient(pid: Any, patient: Patient) -> None:
    pid.pid_1 = "1"
    pid.pid_3.pid_3_1 = _text(patient.patient_id)
    issuer = _text(patient.issuer)
    if len(issuer) > _MAX_NAMESPACE:
        pid.pid_3.pid_3_4.hd_2, pid.pid_3.pid_3_4.hd_3 = issuer, "L"  # a local scheme (HL7 table 0301)
    elif issuer:
        pid.pid_3.pid_3_4.hd_1 = issuer
    # Of a Japanese name the first of its component groups, that in Latin letters.
    family, _, given = next(filter(None, patient.name.split("=")), "").partition("^")
    pid.pid_5.pid_5_1.fn_1 = _text(family)
    if given:
        pid.pid_5.pid_5_2 = _text(given.partition("^")[0])
    if _is_date(patient.birth_date):
        pid.pid_7.pid_7_1 = patient.birth_date
    if patient.sex:
        pid.pid_8 = _text(patient.sex)


def _request(obr: Any, notice: Notice) -> None:
    obr.obr_1 = "1"
    if notice.patient and notice.patient.accession_number:
        obr.obr_2.obr_2_1 = _text(notice.patient.accession_number[:50])
    obr.obr_3.obr_3_1 = derive_uuid(notice.series_instance_uid, "report")
    _code(obr.obr_4, codes.IMAGING_MEASUREMENT_REPORT, "AI assessment of the cervical spine for fracture")
    obr.obr_22.obr_22_1 = _time(notice)
    obr.obr_24 = "RAD"
    obr.obr_25 = "P" if notice.findings else "X"  # preliminary; no results, the procedure was not completed


def _observations(notice: Notice) -> list[tuple[str, Any, str, Any]]:
    """Value type, code, sub-id and value of each OBX."""
    rows: list[tuple[str, Any, str, Any]] = [
        ("ST", codes.STUDY_INSTANCE_UID, "", notice.study_instance_uid),
        ("TX", codes.CONCLUSION, "", f"{notice.text} {NOTICE}"),
    ]
    if not notice.findings:
        return rows
    model = notice.findings["model"]
    rows.append(("TX", codes.ALGORITHM_NAME, "", f"{model['name']} {model['version']}: {model['trained_on']}"))
    found = {"patient": notice.findings["patient_overall"], **notice.findings["levels"]}
    for name, level in found.items():
        rows.append(("CWE", codes.FRACTURE, name, codes.FINDING_CODES[level["finding"]]))
        if level["probability"] is not None:
            rows.append(("NM", codes.CERTAINTY_OF_FINDING, name, f"{100 * level['probability']:.1f}"))
    return rows


def _observation(obx: Any, number: int, notice: Notice, kind: str, code: Any, sub_id: str, value: Any) -> None:
    obx.obx_1, obx.obx_2 = str(number), kind
    _code(obx.obx_3, code)
    if sub_id:
        obx.obx_4 = sub_id
    if kind == "TX":  # hl7apy takes a value whose type OBX-2 names for ST, of 199 characters at most
        text = Component("VARIES_1", datatype="TX", version="2.5.1", validation_level=VALIDATION_LEVEL.STRICT)
        text.value = _text(value)
        obx.add_field("obx_5").add(text)
    else:
        obx.obx_5 = f"{value.value}^{value.meaning}^{value.scheme_designator}" if kind == "CWE" else value
    if kind == "NM":
        _code(obx.obx_6, codes.PERCENT)
    obx.obx_11 = "P" if notice.findings else "X"
    obx.obx_14.obx_14_1 = _time(notice)


def _code(field: Any, code: Any, meaning: str = "") -> None:
    name = field.name.lower()
    for number, text in enumerate((code.value, meaning or code.meaning, code.scheme_designator), start=1):
        setattr(field, f"{name}_{number}", text)


def _text(value: str) -> str:
    """A text in one line, its delimiters escaped (HL7 v2.5.1 2.7)."""
    return " ".join(value.split()).translate(_ESCAPES)


def _is_date(value: str) -> bool:
    try:
        return len(value) == 8 and bool(datetime.strptime(value, "%Y%m%d"))
    except ValueError:
        return False


def _time(notice: Notice) -> str:
    return notice.at.strftime("%Y%m%d%H%M%S%z")
