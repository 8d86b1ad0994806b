"""A DICOMweb server as a destination: STOW-RS, asked back by QIDO-RS.

Reference: PS3.18 10.5 (Store), 10.6 (Search).
"""

import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from requests import Response

from node.case import ObjectProgress, ObjectState
from node.config import DicomWebDestination
from node.deliver.courier import Note, progress_of
from node.deliver.files import ResultFile
from node.deliver.http import HttpPeer
from node.dicom_json import datasets_in, first_value, items_of
from node.send import SendError, answer_of

_BLOCK_BYTES = 256 * 1024
_FAILURE = 0x0110  # processing failure: it may pass
_JSON = "application/dicom+json"

_REFERENCED_SOP, _FAILED_SOP, _OTHER_FAILURES = "00081199", "00081198", "0008119A"
_SOP_INSTANCE_UID, _REFERENCED_UID, _FAILURE_REASON, _WARNING_REASON = "00080018", "00081155", "00081197", "00081196"


class DicomWebCourier:
    """All files go in one request; only where that is too large for the server, in one each."""

    def __init__(self, destination: DicomWebDestination) -> None:
        self._peer = HttpPeer(destination)

    def send(self, files: Sequence[ResultFile], note: Note) -> None:
        body = MultipartBody([file.path for file in files])
        headers = {"Content-Type": body.content_type, "Accept": _JSON}
        # 202: some were not stored, or with a remark. 409: none was. Both say which and why.
        response = self._peer.request("POST", "studies", body=body, headers=headers, also=(409, 413))
        if response.status_code == 413 and len(files) > 1:
            for file in files:
                self.send([file], note)
        elif response.status_code == 413:
            note(files[0], ObjectProgress(state=ObjectState.REFUSED, reason=str(self._peer.refusal(response))))
        else:
            for file, progress in self._answers(response, files):
                note(file, progress)

    def find(self, files: Sequence[ResultFile]) -> set[str]:
        return {file.key for file in files if self._has(file)}

    def remove(self, keys: Collection[str]) -> bool:
        return False  # DICOMweb has no service for it.

    def close(self) -> None:
        self._peer.close()

    def check(self) -> str:
        self._peer.request("GET", "studies", query={"limit": "1"}, headers={"Accept": _JSON})
        return "answers QIDO-RS"

    def _has(self, file: ResultFile) -> bool:
        path = f"studies/{file.study_instance_uid}/series/{file.series_instance_uid}/instances"
        query = {"SOPInstanceUID": file.key}
        response = self._peer.request("GET", path, query=query, headers={"Accept": _JSON}, also=(404,))
        if response.status_code in (204, 404):
            return False
        return any(first_value(item, _SOP_INSTANCE_UID) == file.key for item in datasets_in(response.content))

    def _answers(self, response: Response, files: Sequence[ResultFile]) -> Iterator[tuple[ResultFile, ObjectProgress]]:
        """What the answer to a store says of each file.

        Raises:
            SendError: it says that not all were stored, and not which.
        """
        answer = next(iter(datasets_in(response.content)), {})
        stored = {str(first_value(item, _REFERENCED_UID)): item for item in items_of(answer, _REFERENCED_SOP)}
        failed = {str(first_value(item, _REFERENCED_UID)): item for item in items_of(answer, _FAILED_SOP)}
        others = [item for item in items_of(answer, _OTHER_FAILURES) if first_value(item, _FAILURE_REASON)]
        for file in files:
            if file.key in failed:
                yield file, self._judge(file, _status(failed[file.key], _FAILURE_REASON) or _FAILURE)
            elif file.key in stored:
                yield file, self._judge(file, _status(stored[file.key], _WARNING_REASON))
            elif response.status_code == 200:  # some servers answer nothing more
                yield file, ObjectProgress(state=ObjectState.TAKEN)
            elif others:
                yield file, self._judge(file, _status(others[0], _FAILURE_REASON) or _FAILURE)
            else:
                raise SendError(
                    f"{self._peer.name} answered {response.status_code} and did not say what it did not store"
                )

    def _judge(self, file: ResultFile, status: int) -> ObjectProgress:
        return progress_of(answer_of(file.path, file.path.name, self._peer.name, status))


def _status(item: dict[str, Any], tag: str) -> int:
    """The status that an item gives as its reason; 0 where it gives none, or one that is no number."""
    try:
        return int(first_value(item, tag))
    except (TypeError, ValueError, OverflowError):
        return 0


class MultipartBody:
    """Files as `multipart/related`, read while they are sent. The length goes first: not every server takes chunks."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._boundary = uuid.uuid4().hex
        self._head = f"--{self._boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._end = f"--{self._boundary}--\r\n".encode()

    @property
    def content_type(self) -> str:
        return f'multipart/related; type="application/dicom"; boundary={self._boundary}'

    def __len__(self) -> int:
        return sum(len(self._head) + path.stat().st_size + 2 for path in self._paths) + len(self._end)

    def __iter__(self) -> Iterator[bytes]:
        for path in self._paths:
            yield self._head
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    yield block
            yield b"\r\n"
        yield self._end
