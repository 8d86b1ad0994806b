"""A notice as FHIR R4: a transaction of one DiagnosticReport, an Observation for each level and for the patient.

Posted to a FHIR server, or written to a folder as JSON. Every resource is put under an identifier of its own
(conditional update), so that a repeat replaces itself.

Reference: HL7 FHIR R4 (4.0.1), DiagnosticReport, Observation, Bundle; https://hl7.org/fhir/R4/http.html#cond-update.
"""

import json
from typing import Any
from urllib.parse import quote

from node import codes
from node.notify.errors import NotifyError
from node.notify.http import post
from node.notify.notice import NOTICE, Notice, derive_uuid
from node.process import sync
from node.targets import FhirTarget

_SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "UCUM": "http://unitsofmeasure.org",
}
_ABSENT_REASON = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
_IDENTIFIERS = "urn:ietf:rfc:3986"


def send(notice: Notice, target: FhirTarget) -> None:
    """Posts the transaction to the server, or writes it to the folder.

    Raises:
        NotifyError: it was not taken.
    """
    body = json.dumps(transaction(notice), indent=1).encode()
    if target.url is not None:
        headers = {"Content-Type": "application/fhir+json", "Accept": "application/fhir+json"}
        if token := target.read_secret():
            headers["Authorization"] = f"Bearer {token}"
        post(target.url, body, headers, timeout_s=target.timeout_s)
        return
    assert target.path is not None
    try:
        target.path.mkdir(parents=True, exist_ok=True)
        draft = target.path / f".{notice.notice_id}.draft"
        draft.write_bytes(body)
        sync(draft)
        draft.replace(target.path / f"{notice.notice_id}.json")
        sync(target.path)
    except OSError as error:
        raise NotifyError(f"the folder {target.path} cannot be written: {error.strerror}") from error


def transaction(notice: Notice) -> dict[str, Any]:
    """The Bundle; the DiagnosticReport is its first entry."""
    observations = _observations(notice)
    entries = [_entry(_report(notice, observations)), *(_entry(observation) for observation in observations)]
    return {"resourceType": "Bundle", "type": "transaction", "timestamp": notice.at_utc, "entry": entries}


def _entry(resource: dict[str, Any]) -> dict[str, Any]:
    """An entry that creates the resource, or replaces the one with its identifier."""
    (identifier,) = resource["identifier"]
    kind = resource["resourceType"]
    token = quote(f"{identifier['system']}|{identifier['value']}", safe="")
    return {
        "fullUrl": _full_url(resource),
        "resource": resource,
        "request": {"method": "PUT", "url": f"{kind}?identifier={token}"},
    }


def _full_url(resource: dict[str, Any]) -> str:
    return str(resource["identifier"][0]["value"])


def _report(notice: Notice, observations: list[dict[str, Any]]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "resourceType": "DiagnosticReport",
        "identifier": [_identifier(notice, "report")],
        "status": "preliminary" if notice.findings else "cancelled",
        "category": [{"coding": [_coding_of("http://terminology.hl7.org/CodeSystem/v2-0074", "RAD", "Radiology")]}],
        "code": _concept(codes.IMAGING_MEASUREMENT_REPORT, "AI assessment of the cervical spine for fracture"),
        "issued": notice.at_utc,
        "imagingStudy": [_study(notice)],
        "conclusion": f"{notice.text} {_trained_on(notice)}{NOTICE}",
    }
    if notice.patient:
        report["subject"] = _subject(notice)
        if accession_number := notice.patient.accession_number.strip():
            report["basedOn"] = [{"type": "ServiceRequest", "identifier": {"value": accession_number}}]
    if observations:
        report["result"] = [{"reference": _full_url(observation)} for observation in observations]
    return report


def _trained_on(notice: Notice) -> str:
    if not notice.findings:
        return ""
    model = notice.findings["model"]
    return f"Model {model['name']} {model['version']}: {model['trained_on']} "


def _observations(notice: Notice) -> list[dict[str, Any]]:
    if not notice.findings:
        return []
    levels = notice.findings["levels"]
    return [
        _observation(notice, "patient", codes.CERVICAL_SPINE, notice.findings["patient_overall"]),
        *(_observation(notice, name, codes.LEVEL_CODES[name], level) for name, level in levels.items()),
    ]


def _observation(notice: Notice, name: str, site: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Whether there is a fracture at one site, with its probability as a component."""
    probability = found["probability"]
    component: dict[str, Any] = {"code": _concept(codes.CERTAINTY_OF_FINDING)}
    if probability is None:
        component["dataAbsentReason"] = {"coding": [_coding_of(_ABSENT_REASON, "not-performed", "Not Performed")]}
    else:
        unit = codes.PERCENT
        component["valueQuantity"] = {
            "value": round(100 * probability, 1),
            "unit": "%",
            "system": _SYSTEMS["UCUM"],
            "code": unit.value,
        }
    observation: dict[str, Any] = {
        "resourceType": "Observation",
        "identifier": [_identifier(notice, name)],
        "status": "preliminary",
        "category": [
            {
                "coding": [
                    _coding_of("http://terminology.hl7.org/CodeSystem/observation-category", "imaging", "Imaging"),
                ]
            }
        ],
        "code": _concept(codes.FRACTURE, "Fracture of the cervical spine" if name == "patient" else f"{name} fracture"),
        "bodySite": _concept(site),
        "issued": notice.at_utc,
        "valueCodeableConcept": _concept(codes.FINDING_CODES[found["finding"]]),
        "component": [component],
        "derivedFrom": [_study(notice)],
    }
    if notice.patient:
        observation["subject"] = _subject(notice)
    return observation


def _identifier(notice: Notice, what: str) -> dict[str, Any]:
    """The same for the same Series and thing, so that a later result replaces an earlier one."""
    return {"system": _IDENTIFIERS, "value": f"urn:uuid:{derive_uuid(notice.series_instance_uid, what)}"}


def _study(notice: Notice) -> dict[str, Any]:
    return {
        "type": "ImagingStudy",
        "identifier": {"system": "urn:dicom:uid", "value": f"urn:oid:{notice.study_instance_uid}"},
    }


def _subject(notice: Notice) -> dict[str, Any]:
    assert notice.patient is not None
    identifier = {"value": notice.patient.patient_id.strip() or "unknown"}
    if notice.patient.issuer:
        identifier["system"] = f"urn:dicom:issuer:{quote(notice.patient.issuer)}"
    subject: dict[str, Any] = {"type": "Patient", "identifier": identifier}
    name = notice.patient.name.replace("^", " ").strip()
    return subject | ({"display": name} if name else {})  # FHIR has no empty strings


def _concept(code: Any, text: str = "") -> dict[str, Any]:
    coding = _coding_of(_SYSTEMS[code.scheme_designator], code.value, code.meaning)
    return {"coding": [coding]} | ({"text": text} if text else {})


def _coding_of(system: str, code: str, display: str) -> dict[str, str]:
    return {"system": system, "code": code, "display": display}
