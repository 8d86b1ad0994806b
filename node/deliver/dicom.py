"""A PACS as a destination: C-STORE of every object over one association, asked back by C-FIND.

Storage commitment, the other way to be sure, stands in `commitment.py`.
"""

from collections.abc import Collection, Sequence

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)
from pynetdicom.status import code_to_category

from node.config import DicomDestination
from node.deliver.courier import Note, progress_of
from node.deliver.files import ResultFile
from node.send import Answer, SendError, answers_echo, associated, send_files
from node.status import Outcome, meaning_of

_FIND = StudyRootQueryRetrieveInformationModelFind
_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)


class DicomCourier:
    """Each call is an association of its own."""

    def __init__(self, destination: DicomDestination, calling_ae_title: str) -> None:
        self._peer = destination
        self._calling_ae_title = calling_ae_title

    def send(self, files: Sequence[ResultFile], note: Note) -> None:
        by_path = {file.path: file for file in files}

        def on_answer(answer: Answer) -> None:
            note(by_path[answer.path], progress_of(answer))

        send_files(list(by_path), self._peer, calling_ae_title=self._calling_ae_title, on_answer=on_answer)

    def find(self, files: Sequence[ResultFile]) -> set[str]:
        # Verification too: an association of which nothing is accepted would say less of why.
        contexts = [(_FIND, _SYNTAXES), (Verification, _SYNTAXES)]
        with associated(self._peer, contexts, calling_ae_title=self._calling_ae_title) as association:
            if not any(context.abstract_syntax == _FIND for context in association.accepted_contexts):
                raise self._cannot_ask()
            return {file.key for file in files if self._has(association, file)}

    def remove(self, keys: Collection[str]) -> bool:
        return False  # DICOM has no service for it.

    def check(self) -> str:
        wanted = {"query": _FIND, "storage-commitment": StorageCommitmentPushModel}.get(self._peer.verify, Verification)
        if not answers_echo(self._peer, wanted, calling_ae_title=self._calling_ae_title):
            raise not_offered(self._peer, wanted, self._calling_ae_title)
        return "answers C-ECHO and C-FIND" if wanted == _FIND else "answers C-ECHO"

    def close(self) -> None:
        pass

    def _has(self, association: Association, file: ResultFile) -> bool:
        wanted = Dataset()
        wanted.QueryRetrieveLevel = "IMAGE"
        wanted.StudyInstanceUID = file.study_instance_uid
        wanted.SeriesInstanceUID = file.series_instance_uid
        wanted.SOPInstanceUID = file.key
        found = False
        for status, identifier in association.send_c_find(wanted, _FIND):
            if "Status" not in status:
                raise SendError(
                    f"{self._peer.where} broke off when it was asked for {file.path.name}; it may not let "
                    f"{self._calling_ae_title} query: allow that there, or set verify: none"
                )
            category = code_to_category(status.Status)
            if category == "Pending":
                found |= identifier is not None and identifier.get("SOPInstanceUID") == file.key
            elif category != "Success":
                raise self._cannot_ask(status.Status)
        return found

    def _cannot_ask(self, status: int | None = None) -> SendError:
        said = "" if status is None else f" (status 0x{status:04X}, {meaning_of(status).meaning})"
        may_pass = status is not None and meaning_of(status).outcome is Outcome.LATER
        return SendError(f"{not_offered(self._peer, _FIND, self._calling_ae_title)}{said}", permanent=not may_pass)


def not_offered(peer: DicomDestination, sop_class: str, calling_ae_title: str) -> SendError:
    """The error of a peer that does not take part in what it is set to be verified by."""
    if sop_class == _FIND:
        problem, others = f"does not let {calling_ae_title} ask by C-FIND what it has", "storage-commitment or none"
    else:
        problem, others = f"does not offer {calling_ae_title} storage commitment", "query or none"
    return SendError(f"{peer.where} {problem}; allow that there, or set verify: {others}", permanent=True)
