"""A Storage SCU that sends any bytes as a dataset, under whatever UIDs, as no decent one would."""

import socket
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import split_dataset
from pynetdicom.sop_class import Verification

from node.peers import DicomPeer
from node.reactor import use_checkpoint
from node.send import associated

Context = tuple[str, str]  # abstract syntax, transfer syntax


def associate(port: int, contexts: Iterable[Context]) -> Association:
    """An association that offers these contexts."""
    ae = AE(ae_title="RAW")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    for abstract_syntax, transfer_syntax in contexts:
        ae.add_requested_context(abstract_syntax, transfer_syntax)
    return ae.associate("127.0.0.1", port, ae_title="CSPINE", evt_handlers=ON_OPEN)


def echo(peer: DicomPeer, *, calling_ae_title: str) -> None:
    """Asks a peer for an answer by C-ECHO, as the node associates.

    Raises:
        SendError: there is no association.
    """
    with associated(peer, [(Verification, [ImplicitVRLittleEndian])], calling_ae_title=calling_ae_title) as association:
        assert association.send_c_echo().Status == 0


def _on_open(event: evt.Event) -> None:
    use_checkpoint(event.assoc)
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


ON_OPEN = [(evt.EVT_CONN_OPEN, _on_open)]
"""For whatever a test associates by itself: without this its reactor now and then takes an answer away from it."""


def send_bytes(association: Association, encoded: bytes, context: Context, sop_instance_uid: str) -> Dataset | None:
    """Status and ErrorComment of the answer, empty if none came; None when the context was not accepted."""
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]): c.context_id for c in association.accepted_contexts}
    if context not in accepted:
        return None
    return store(association, encoded, accepted[context], context[0], sop_instance_uid)


def store(
    association: Association, encoded: bytes, context_id: int, sop_class_uid: str, sop_instance_uid: str
) -> Dataset:
    """Sends bytes as they are, under whatever UIDs; Status and ErrorComment of the answer, empty if none came.

    pynetdicom's own `send_c_store` is too well-behaved for that.
    """
    request = C_STORE()
    request.MessageID, request.Priority, request.AffectedSOPClassUID = 1, 2, sop_class_uid
    request._affected_sop_instance_uid = UID(sop_instance_uid)  # past its own check
    request.DataSet = BytesIO(encoded)
    association._reactor_checkpoint.clear()  # as `send_c_store` does: answers are read here
    while not association._is_paused:
        time.sleep(0.0001)
    association.dimse.send_msg(request, context_id)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    answer = Dataset()
    if response is not None:
        answer.Status, answer.ErrorComment = response.Status, response.ErrorComment or ""
    return answer


def dataset_of(path: Path) -> tuple[bytes, Context, str]:
    """The dataset of any file as bytes, its SOP Class and transfer syntax, and its SOP Instance UID.

    Of a file without File Meta Information they are told from the dataset; what cannot be told is "".
    """
    encoded = path.read_bytes()
    try:
        meta, offset = split_dataset(path)
        context = str(meta.get("MediaStorageSOPClassUID", "")), str(meta.get("TransferSyntaxUID", ""))
        return encoded[offset:], context, str(meta.get("MediaStorageSOPInstanceUID", "")) or generate_uid()
    except (InvalidDicomError, ValueError, AttributeError, KeyError):
        pass
    try:
        ds = pydicom.dcmread(path, force=True, specific_tags=["SOPClassUID", "SOPInstanceUID"], stop_before_pixels=True)
        is_implicit, is_little_endian = ds.original_encoding
        explicit = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if is_implicit else explicit
        return (
            encoded,
            (str(ds.get("SOPClassUID", "")), str(syntax)),
            str(ds.get("SOPInstanceUID", "")) or generate_uid(),
        )
    except Exception:
        return encoded, ("", str(ImplicitVRLittleEndian)), generate_uid()
