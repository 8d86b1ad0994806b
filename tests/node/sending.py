"""A sender as the tests of the receiver need it: any bytes under whatever UIDs, and what became of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dsutils import split_dataset

from node.config import Config
from node.index import Index
from tests.factories import make_ct_series
from tests.raw_scu import ON_OPEN, store
from tests.waiting import WAIT_S

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND, CONFLICT = 0x0000, 0xA700, 0xA900, 0xC000, 0xC111

MakeConfig = Callable[..., Config]


def associate(
    config: Config, *sop_classes: str, transfer_syntaxes: tuple[str, ...] = (ExplicitVRLittleEndian,)
) -> Association:
    ae = AE(ae_title="SCANNER")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = WAIT_S
    for sop_class in sop_classes or (CTImageStorage,):
        for syntax in transfer_syntaxes:
            ae.add_requested_context(sop_class, syntax)
    return ae.associate(config.receive.host, config.receive.port, ae_title="ANYTHING", evt_handlers=ON_OPEN)


def encoded_dataset(path: Path) -> bytes:
    """What follows the File Meta Information: what goes over the network."""
    _, offset = split_dataset(path)
    return path.read_bytes()[offset:]


def c_store(
    association: Association,
    encoded: bytes,
    sop_instance_uid: str,
    *,
    sop_class_uid: str = CTImageStorage,
    transfer_syntax: str = ExplicitVRLittleEndian,
) -> Dataset:
    """As `raw_scu.store`, in the context of a transfer syntax."""
    context = next(c for c in association.accepted_contexts if c.transfer_syntax[0] == transfer_syntax)
    return store(association, encoded, context.context_id, sop_class_uid, sop_instance_uid)


def store_one(config: Config, path: Path, **given: Any) -> int:
    """Sends the Instance in a file over an association of its own; the status."""
    meta, _ = split_dataset(path)
    values = {
        "sop_instance_uid": str(meta.MediaStorageSOPInstanceUID),
        "sop_class_uid": str(meta.MediaStorageSOPClassUID),
        "transfer_syntax": str(meta.TransferSyntaxUID),
    } | given
    association = associate(config, values["sop_class_uid"], transfer_syntaxes=(values["transfer_syntax"],))
    assert association.is_established
    status = c_store(association, encoded_dataset(path), **values)
    association.release()
    return int(status.Status)


def make_instance(folder: Path, edit: Callable[[Dataset], None] | None = None, **given: Any) -> Path:
    (path,) = make_ct_series(folder, num_slices=1, edit=lambda _, ds: edit(ds) if edit else None, **given)
    return path


def files_under(folder: Path) -> list[Path]:
    """Files with content: others are made ahead."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cspine."))
    return sorted(path for path in found if path.stat().st_size > 0)


def carried(index: Index) -> tuple[int, int, int]:
    """Open, released and broken associations of the only case."""
    (case,) = index.cases()
    return carried_by(index, case.series_instance_uid)


def carried_by(index: Index, series_instance_uid: str) -> tuple[int, int, int]:
    carriers = index.stored_series(series_instance_uid).carriers
    ended = [carrier.released for carrier in carriers if carrier.ended_at is not None]
    return len(carriers) - len(ended), ended.count(True), ended.count(False)
