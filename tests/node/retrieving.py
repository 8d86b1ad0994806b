"""A node that holds Studies, and who asks it for them."""

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr
from pydicom import Dataset, dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelFind,
)

from node.config import Config, ReceiveConfig, RetrieveConfig
from node.index import Index
from node.peers import DicomPeer
from node.send import associated
from tests.factories import make_ct_series, make_report
from tests.ports import free_port
from tests.waiting import WAIT_S, wait_until
from tests.web_server import hold

STUDY_FIND, PATIENT_FIND = StudyRootQueryRetrieveInformationModelFind, PatientRootQueryRetrieveInformationModelFind
NUM_SLICES = 4


def wait_for_cancel() -> None:
    """Returns once a C-CANCEL has come to the node, which runs in this process."""

    def has_come() -> bool:
        nodes = [t for t in threading.enumerate() if isinstance(t, Association) and t.is_acceptor]
        return any(node.dimse.cancel_req for node in nodes)

    wait_until(has_come)


def tool(name: str) -> str:
    """Of dcmtk."""
    found = shutil.which(name)
    assert found, f"there is no {name} on this machine; on Debian: apt-get install dcmtk"
    return found


def _study(number: int) -> Callable[[int, Dataset], None]:
    def edit(_i: int, ds: Dataset) -> None:
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = ["Müller^Eva", "Doe^Jane", "Müller^Eva"][number]
        ds.PatientID = ["P-0", "P-1", "P-0"][number]
        ds.AccessionNumber, ds.StudyDate, ds.StudyTime = f"ACC{number}", f"2026010{number + 1}", "103000"
        ds.StudyDescription, ds.SeriesDescription, ds.SeriesNumber = "Neck", f"bone {number}", number + 2
        ds.StudyID, ds.PatientBirthDate, ds.PatientSex, ds.StationName = "S1", "19700101", "F", "CT7"

    return edit


class Held:
    """A node that holds three Studies of two patients, the third compressed, and a report made of the first."""

    def __init__(self, folder: Path, database: SecretStr | None = None) -> None:
        self.index = Index(folder / "data", database)
        syntaxes = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless)
        self.paths = []
        for number, syntax in enumerate(syntaxes):
            made = make_ct_series(
                self.index.data_dir / "instances" / str(number),
                num_slices=NUM_SLICES,
                edit=_study(number),
                transfer_syntax_uid=syntax,
            )
            hold(self.index, made)
            self.paths.append(made)
        self.studies = [str(dcmread(made[0]).StudyInstanceUID) for made in self.paths]
        self.series = [str(dcmread(made[0]).SeriesInstanceUID) for made in self.paths]
        results = self.index.data_dir / "cases" / "1"
        results.mkdir(parents=True)
        report = dcmread(make_report(results / "report.sr.dcm"))
        _study(0)(0, report)
        report.StudyInstanceUID = self.studies[0]
        report.save_as(results / "report.sr.dcm")
        case = self.index.case(self.series[0])
        assert case is not None
        assert self.index.queue(case)
        claimed = self.index.claim_next()
        assert claimed is not None
        assert self.index.finish(claimed, results, summary="", sop_instance_uids=(), destinations=())
        self.store_port = free_port()
        self.config = Config(
            data_dir=self.index.data_dir,
            receive=ReceiveConfig(port=free_port(), min_free_disk_mb=0),
            retrieve=RetrieveConfig(
                enabled=True,
                peers=(DicomPeer(name="ws", host="127.0.0.1", port=self.store_port, ae_title="WORKSTATION"),),
            ),
        )
        self.peer = DicomPeer(name="node", host="127.0.0.1", port=self.config.receive.port, ae_title="CSPINE")


def ask(peer: DicomPeer, level: str, model: str = STUDY_FIND, **keys: object) -> tuple[list[Dataset], set[int]]:
    """The answers to a C-FIND, and all statuses."""
    query = Dataset()
    query.SpecificCharacterSet, query.QueryRetrieveLevel = "ISO_IR 192", level
    for keyword, value in keys.items():
        setattr(query, keyword, value)
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    with associated(peer, [(model, syntaxes)], calling_ae_title="CSPINE") as association:
        said = list(association.send_c_find(query, UID(model)))
    return [answer for _, answer in said if answer is not None], {int(status.Status) for status, _ in said}


def retrieve(tmp_path: Path, *arguments: str) -> tuple[str, list[Dataset]]:
    """Runs getscu or movescu; what it said, and the Instances that came into its folder."""
    folder = tmp_path / "got"
    folder.mkdir(exist_ok=True)
    more = ["-od", str(folder)] if Path(arguments[0]).name == "getscu" else []
    done = subprocess.run([*arguments, *more], capture_output=True, text=True, timeout=WAIT_S, check=False)
    return done.stdout + done.stderr, [dcmread(path) for path in sorted(folder.iterdir())]
