"""An Orthanc as a destination, over its REST API.

By `requests` as DICOMweb is, since `orthanc-api-client` has no timeouts, calls an untrusted certificate a failed
connection, and retries on its own.
"""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from requests import Response

from node.case import ObjectProgress, ObjectState
from node.config import OrthancDestination
from node.deliver.courier import Note
from node.deliver.files import ResultFile
from node.deliver.http import HttpPeer
from node.send import SendError


class OrthancCourier:
    """Uploads one Instance after the other. source_series_instance_uid: of the Series that was analysed."""

    def __init__(self, destination: OrthancDestination, source_series_instance_uid: str) -> None:
        self._peer = HttpPeer(destination)
        self._destination = destination
        self._source_series_instance_uid = source_series_instance_uid

    def send(self, files: Sequence[ResultFile], note: Note) -> None:
        for file in files:
            note(file, self._upload(file))

    def find(self, files: Sequence[ResultFile]) -> set[str]:
        return {file.key for file in files if self._look_up(file.key)}

    def remove(self, keys: Collection[str]) -> bool:
        if not self._destination.replace:
            return False
        for orthanc_id in (found for key in keys if (found := self._look_up(key))):
            self._peer.request("DELETE", f"instances/{orthanc_id}", also=(404,))
        return True

    def close(self) -> None:
        self._peer.close()

    def check(self) -> str:
        version = str(_object(self._peer.request("GET", "system")).get("Version", "of unknown version"))
        said = f"is Orthanc {version}"
        number = re.match(r"(\d+)\.(\d+)", version)
        if self._destination.label and number and (int(number[1]), int(number[2])) < (1, 12):
            said += f"; WARNING: it cannot set the label {self._destination.label}, which needs Orthanc 1.12"
        return said

    def _upload(self, file: ResultFile) -> ObjectProgress:
        # 400: it cannot read the object. 413: a proxy on the way finds it too large. Others may still be taken.
        with file.path.open("rb") as body:
            response = self._peer.request(
                "POST", "instances", body=body, headers={"Content-Type": "application/dicom"}, also=(400, 413)
            )
        if response.status_code >= 400:
            return ObjectProgress(state=ObjectState.REFUSED, reason=f"{file.path.name}: {self._peer.refusal(response)}")
        answer = _object(response)
        if answer.get("Status") == "FilteredOut":
            reason = f"{self._peer.name} filtered out {file.path.name}; let it pass ReceivedInstanceFilter there"
            return ObjectProgress(state=ObjectState.REFUSED, reason=reason)
        notes = (self._link_to_source(answer.get("ParentSeries")), self._label(answer.get("ParentStudy")))
        return ObjectProgress(state=ObjectState.TAKEN, reason="; ".join(filter(None, notes)))

    # A delivery does not fail by the following: restricted users may not write either.

    def _link_to_source(self, orthanc_series_id: Any) -> str:
        """Notes the source Series in the metadata of the result's Series; returns why that was not possible."""
        number = self._destination.source_metadata
        if number is None or not orthanc_series_id:
            return ""
        source = self._source_series_instance_uid.encode()
        return self._put(f"series/{orthanc_series_id}/metadata/{number}", source, f"metadata {number}")

    def _label(self, orthanc_study_id: Any) -> str:
        """Labels the Study, which has results now; returns why that was not possible."""
        label = self._destination.label
        if label is None or not orthanc_study_id:
            return ""
        return self._put(f"studies/{orthanc_study_id}/labels/{label}", b"", f"label {label}, which needs Orthanc 1.12,")

    def _put(self, path: str, body: bytes, what: str) -> str:
        try:
            answer = self._peer.request("PUT", path, body=body, also=(409,))
            # With CheckRevisions Orthanc changes nothing that is there; of a result it never has to.
            if answer.status_code == 409 and self._peer.request("GET", path).content != body:
                return f"{what} was not set: it is there with another value, and {self._peer.name} keeps that"
        except SendError as error:
            if not error.permanent:
                raise
            return f"{what} was not set: {error}"
        return ""

    def _look_up(self, sop_instance_uid: str) -> str:
        """Orthanc's id of an Instance, "" if it is not there."""
        response = self._peer.request("POST", "tools/lookup", body=sop_instance_uid.encode())
        found = _json(response)
        if not isinstance(found, list) or not all(isinstance(item, dict) and "ID" in item for item in found):
            raise _no_orthanc(response)
        ids = [item["ID"] for item in found if item.get("Type") == "Instance"]
        return str(ids[0]) if ids else ""


def _object(response: Response) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        SendError: it is none, so this is no Orthanc.
    """
    found = _json(response)
    if not isinstance(found, dict):
        raise _no_orthanc(response)
    return found


def _json(response: Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise _no_orthanc(response) from error


def _no_orthanc(response: Response) -> SendError:
    return SendError(f"{response.url} does not answer like an Orthanc; check url", permanent=True)
