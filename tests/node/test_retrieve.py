"""C-FIND, C-GET and C-MOVE for what the node holds: dcmtk's tools, pynetdicom, and answers beside a real Orthanc's."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr
from pydicom import Dataset, dcmread
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from node.config import Config, ReceiveConfig, RetrieveConfig
from node.conformance import OBJECTS
from node.index import Index
from node.peers import DicomPeer
from node.retrieve import identifier, scp
from node.retrieve.scp import RESULT_SOP_CLASSES
from node.send import associated
from tests.factories import make_ct_series, make_report
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.receiver import listening
from tests.web_server import hold

if TYPE_CHECKING:
    from tests.postgresql_server import PostgreSQLServer

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

STUDY_FIND, PATIENT_FIND = StudyRootQueryRetrieveInformationModelFind, PatientRootQueryRetrieveInformationModelFind
NUM_SLICES = 4


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


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    node = Held(tmp_path_factory.mktemp("held"))
    with listening(node.config, node.index):
        yield node
    node.index.close()


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
    done = subprocess.run([*arguments, *more], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr, [dcmread(path) for path in sorted(folder.iterdir())]


# ---- C-FIND ----


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ({}, [2, 1, 0]),  # the latest first
        ({"PatientID": "P-1"}, [1]),
        ({"PatientID": "P-*"}, [2, 1, 0]),
        ({"PatientName": "MÜLLER*"}, []),  # case counts beyond ASCII
        ({"PatientName": "müller*"}, [2, 0]),
        ({"PatientName": "doe^jane"}, [1]),
        ({"PatientName": "Müller*", "AccessionNumber": "ACC2"}, [2]),
        ({"StudyDate": "20260102-"}, [2, 1]),
        ({"StudyDate": "-20260101"}, [0]),
        ({"ModalitiesInStudy": "SR"}, [0]),
        ({"ModalitiesInStudy": "MR"}, []),
        ({"AccessionNumber": "ACC9"}, []),
    ],
)
def test_c_find_matches(held: Held, keys: dict[str, str], numbers: list[int]) -> None:
    found, statuses = ask(held.peer, "STUDY", **({"StudyInstanceUID": ""} | keys))
    assert [held.studies.index(answer.StudyInstanceUID) for answer in found] == numbers
    assert statuses <= {0xFF00, 0x0000}


def test_c_find_takes_a_list_of_uids(held: Held) -> None:
    found, _ = ask(held.peer, "STUDY", StudyInstanceUID=held.studies[:2])
    assert {answer.StudyInstanceUID for answer in found} == set(held.studies[:2])


def test_c_find_answers_what_was_asked_for_and_no_more(held: Held) -> None:
    (found,), _ = ask(
        held.peer, "STUDY", AccessionNumber="ACC0", PatientName="", ModalitiesInStudy="",
        NumberOfStudyRelatedSeries="", NumberOfStudyRelatedInstances="", PatientComments="", ProcedureCodeSequence=[],
    )  # fmt: skip
    assert found.PatientName == "Müller^Eva"
    assert list(found.ModalitiesInStudy) == ["CT", "SR"]
    assert (found.NumberOfStudyRelatedSeries, found.NumberOfStudyRelatedInstances) == (2, NUM_SLICES + 1)
    assert found.RetrieveAETitle == "CSPINE"
    assert not found.PatientComments
    assert "StudyDate" not in found


def test_a_key_that_is_not_matched_is_answered_and_said_to_be_ignored(held: Held) -> None:
    found, statuses = ask(held.peer, "SERIES", StationName="CT9", SeriesInstanceUID="", Modality="CT")
    assert statuses == {0xFF01, 0x0000}
    assert [answer.StationName for answer in found] == ["CT7"] * 3


def test_series_and_images_are_found_below_their_study(held: Held) -> None:
    found, _ = ask(held.peer, "SERIES", StudyInstanceUID=held.studies[0], SeriesInstanceUID="", Modality="")
    assert {answer.Modality for answer in found} == {"CT", "SR"}
    found, _ = ask(
        held.peer, "IMAGE", StudyInstanceUID=held.studies[1], SeriesInstanceUID=held.series[1], SOPInstanceUID="",
        InstanceNumber="",
    )  # fmt: skip
    assert [answer.InstanceNumber for answer in found] == list(range(1, NUM_SLICES + 1))


def test_patients_are_found_once_each(held: Held) -> None:
    found, _ = ask(held.peer, "PATIENT", PATIENT_FIND, PatientID="", PatientName="")
    assert sorted((answer.PatientID, str(answer.PatientName)) for answer in found) == [
        ("P-0", "Müller^Eva"),
        ("P-1", "Doe^Jane"),
    ]


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA:UserWarning")
@pytest.mark.parametrize(
    ("level", "keys"), [("PATIENT", {}), ("NONE", {}), ("STUDY", {"StudyDate": "yesterday-today"})]
)
def test_what_cannot_be_asked_is_refused(held: Held, level: str, keys: dict[str, str]) -> None:
    assert ask(held.peer, level, **keys) == ([], {0xA900})


def test_more_matches_than_are_given_are_refused(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifier, "MAX_MATCHES", 2)
    assert ask(held.peer, "STUDY", StudyInstanceUID="") == ([], {0xA700})
    assert len(ask(held.peer, "STUDY", PatientID="P-0")[0]) == 2


def test_findscu_finds(held: Held) -> None:
    done = subprocess.run(
        [tool("findscu"), "-P", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port), "-k", "QueryRetrieveLevel=STUDY",
         "-k", "PatientID=P-0", "-k", "StudyInstanceUID"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert held.studies[0] in said
    assert held.studies[2] in said
    assert held.studies[1] not in said


def test_what_arrives_while_it_is_asked_is_found_by_every_process(held: Held, tmp_path: Path) -> None:
    """Two receivers share the catalog; each takes in what the other may have taken in already."""
    data = shutil.copytree(
        held.index.data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("catalog*", "*.places")
    )
    index = Index(data)
    configs = [
        held.config.model_copy(update={"data_dir": data, "receive": ReceiveConfig(port=free_port())}) for _ in range(2)
    ]
    peers = [DicomPeer(name="node", host="127.0.0.1", port=c.receive.port, ae_title="CSPINE") for c in configs]
    with listening(configs[0], index), listening(configs[1], index):
        for round_ in range(3):
            for peer in peers[:: 1 if round_ % 2 else -1]:
                assert len(ask(peer, "STUDY", StudyInstanceUID="")[0]) == 3 + round_
            hold(index, make_ct_series(data / "instances" / f"new{round_}", num_slices=2))
    index.close()


def test_answers_are_those_of_orthanc(held: Held, tmp_path: Path) -> None:
    """Attribute by attribute, of what both hold."""
    server = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    try:
        for path in [path for made in held.paths for path in made]:
            server.client.upload_file(str(path))
        keys: dict[str, list[dict[str, object]]] = {
            "STUDY": [{}, {"PatientID": "P-0"}, {"PatientName": "DOE*"}, {"StudyDate": "20260102-20260103"}],
            "SERIES": [{"Modality": "CT", "StudyInstanceUID": held.studies[1]}, {"SeriesInstanceUID": held.series}],
            "IMAGE": [{"StudyInstanceUID": held.studies[1], "SeriesInstanceUID": held.series[1]}],
        }
        wanted = {
            "STUDY": ["StudyInstanceUID", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate",
                      "StudyTime", "AccessionNumber", "StudyID", "StudyDescription"],
            "SERIES": ["StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription",
                       "NumberOfSeriesRelatedInstances", "BodyPartExamined"],
            "IMAGE": ["SOPInstanceUID", "SOPClassUID", "InstanceNumber"],
        }  # fmt: skip
        unique = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
        for level, asked in keys.items():
            for query in asked:
                values = dict.fromkeys(wanted[level], "") | query
                both = [ask(peer, level, **values)[0] for peer in (held.peer, server.destination)]
                ours, theirs = (
                    {
                        str(answer[unique[level]].value): {k: str(answer[k].value).strip() for k in wanted[level]}
                        for answer in answers
                    }
                    for answers in both
                )
                assert ours == theirs, (level, query)
                assert ours
    finally:
        server.stop()


# ---- C-GET ----


def test_getscu_gets_a_study_as_it_was_received(held: Held, tmp_path: Path) -> None:
    said, got = retrieve(
        tmp_path, tool("getscu"), "-S", "-v", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port),
        "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={held.studies[1]}",
    )  # fmt: skip
    assert {ds.SOPInstanceUID for ds in got} == {dcmread(path).SOPInstanceUID for path in held.paths[1]}, said
    sent = {ds.SOPInstanceUID: ds for ds in map(dcmread, held.paths[1])}
    assert all(ds == sent[ds.SOPInstanceUID] for ds in got)


def test_getscu_gets_results_too(held: Held, tmp_path: Path) -> None:
    said, got = retrieve(
        tmp_path, tool("getscu"), "-P", "-v", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port),
        "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID=P-0", "-k", f"StudyInstanceUID={held.studies[0]}",
    )  # fmt: skip
    assert sorted(ds.Modality for ds in got) == ["CT"] * NUM_SLICES + ["SR"], said


def test_a_compressed_instance_is_decoded_for_who_cannot_take_it(held: Held, tmp_path: Path) -> None:
    said, got = retrieve(
        tmp_path, tool("getscu"), "-S", "-v", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port),
        "-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={held.studies[2]}",
        "-k", f"SeriesInstanceUID={held.series[2]}",
    )  # fmt: skip
    assert len(got) == NUM_SLICES, said
    sent = {ds.SOPInstanceUID: ds for ds in map(dcmread, held.paths[2])}
    for ds in got:
        assert not ds.file_meta.TransferSyntaxUID.is_encapsulated
        assert (ds.pixel_array == sent[ds.SOPInstanceUID].pixel_array).all()


def c_get(
    held: Held, classes: dict[str, list[str]], *, num_taken: int = 999, **keys: str
) -> tuple[list[Dataset], list[tuple[Dataset, Dataset | None]]]:
    """Instances that came by C-GET, and all answers. classes: SOP Classes and their transfer syntaxes."""
    ae = AE(ae_title="WS")
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
    for sop_class, syntaxes in classes.items():
        ae.add_requested_context(sop_class, syntaxes)
    got: list[Dataset] = []

    def on_store(event: evt.Event) -> int:
        if len(got) >= num_taken:
            return 0xA700
        got.append(Dataset(event.dataset))
        return 0x0000

    association = ae.associate(
        "127.0.0.1", held.peer.port, ext_neg=[build_role(sop_class, scp_role=True) for sop_class in classes],
        evt_handlers=[(evt.EVT_C_STORE, on_store)],
    )  # fmt: skip
    query = Dataset()
    for keyword, value in keys.items():
        setattr(query, keyword, value)
    said = list(association.send_c_get(query, StudyRootQueryRetrieveInformationModelGet))
    association.release()
    return got, said


def test_c_get_gives_a_compressed_instance_as_it_is_to_who_takes_it(held: Held) -> None:
    got, said = c_get(
        held, {CTImageStorage: [JPEGLSLossless]}, QueryRetrieveLevel="STUDY", StudyInstanceUID=held.studies[2]
    )
    assert len(got) == NUM_SLICES
    assert said[-1][0].Status == 0x0000


def test_c_get_names_what_was_not_taken(held: Held) -> None:
    got, said = c_get(
        held, {CTImageStorage: [ExplicitVRLittleEndian]}, num_taken=NUM_SLICES - 1, QueryRetrieveLevel="STUDY",
        StudyInstanceUID=held.studies[0],
    )  # fmt: skip
    status, failed = said[-1]
    assert (status.Status, status.NumberOfCompletedSuboperations, status.NumberOfFailedSuboperations) == (0xB000, 3, 2)
    assert failed is not None
    assert len(failed.FailedSOPInstanceUIDList) == 2  # a slice, and the report whose class was not proposed
    assert len(got) == NUM_SLICES - 1


@pytest.mark.parametrize(
    "keys",
    [
        {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.2"},
        {"QueryRetrieveLevel": "STUDY", "PatientID": "P-0"},
        {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1.2", "PatientID": "*"},
        {"QueryRetrieveLevel": "PATIENT", "PatientID": "P-0"},
    ],
)
def test_c_get_of_what_is_not_named_is_refused(held: Held, keys: dict[str, str]) -> None:
    got, said = c_get(held, {CTImageStorage: [ExplicitVRLittleEndian]}, **keys)
    assert (got, said[-1][0].Status) == ([], 0xA900)


def test_c_get_of_what_is_not_here_is_a_success_without_instances(held: Held) -> None:
    got, said = c_get(
        held, {CTImageStorage: [ExplicitVRLittleEndian]}, QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3"
    )
    assert (got, said[-1][0].Status) == ([], 0x0000)


# ---- C-MOVE ----


@contextmanager
def workstation(held: Held, folder: Path) -> Iterator[None]:
    """dcmtk's storescp where `retrieve.peers` has it."""
    folder.mkdir()
    process = subprocess.Popen([tool("storescp"), "-od", str(folder), "+xa", str(held.store_port)])
    try:
        deadline = time.monotonic() + 10
        while subprocess.run([tool("echoscu"), "127.0.0.1", str(held.store_port)], capture_output=True).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def movescu(held: Held, tmp_path: Path, destination: str, *keys: str) -> str:
    said, _ = retrieve(
        tmp_path, tool("movescu"), "-S", "-d", "-aec", "CSPINE", "-aem", destination, "127.0.0.1",
        str(held.peer.port), *(part for key in keys for part in ("-k", key)),
    )  # fmt: skip
    return said


def test_movescu_has_a_study_sent_to_a_configured_destination(held: Held, tmp_path: Path) -> None:
    with workstation(held, tmp_path / "got"):
        said = movescu(held, tmp_path, "WORKSTATION", "QueryRetrieveLevel=STUDY", f"StudyInstanceUID={held.studies[2]}")
    assert "0x0000: Success" in said
    got = [dcmread(path) for path in (tmp_path / "got").iterdir()]
    assert {ds.SOPInstanceUID for ds in got} == {dcmread(path).SOPInstanceUID for path in held.paths[2]}
    assert {ds.file_meta.TransferSyntaxUID for ds in got} == {JPEGLSLossless}  # as it is here


@pytest.mark.parametrize("destination", ["ANYONE", "CT1"])
def test_no_other_destination_gets_anything(held: Held, tmp_path: Path, destination: str) -> None:
    with workstation(held, tmp_path / "got"):
        said = movescu(held, tmp_path, destination, "QueryRetrieveLevel=STUDY", f"StudyInstanceUID={held.studies[2]}")
    assert "0xa801" in said
    assert not list((tmp_path / "got").iterdir())


def test_a_destination_that_is_not_there_is_a_failure(held: Held, tmp_path: Path) -> None:
    said = movescu(held, tmp_path, "WORKSTATION", "QueryRetrieveLevel=STUDY", f"StudyInstanceUID={held.studies[2]}")
    assert "0xa801" in said


def test_a_move_of_what_is_not_named_is_refused(held: Held, tmp_path: Path) -> None:
    with workstation(held, tmp_path / "got"):
        said = movescu(
            held, tmp_path, "WORKSTATION", "QueryRetrieveLevel=SERIES", f"StudyInstanceUID={held.studies[2]}"
        )
    assert "0xa900" in said
    assert not list((tmp_path / "got").iterdir())


# ---- who may ----


def test_nothing_is_answered_unless_it_is_enabled(held: Held) -> None:
    config = held.config.model_copy(
        update={"retrieve": RetrieveConfig(), "receive": ReceiveConfig(port=free_port(), min_free_disk_mb=0)}
    )
    ae = AE()
    models = [STUDY_FIND, StudyRootQueryRetrieveInformationModelGet, StudyRootQueryRetrieveInformationModelMove]
    for model in models:
        ae.add_requested_context(model)
    ae.add_requested_context(CTImageStorage)
    with listening(config, held.index):
        association = ae.associate("127.0.0.1", config.receive.port)
        assert [context.abstract_syntax for context in association.accepted_contexts] == [CTImageStorage]
        association.release()


def test_results_are_offered_to_who_takes_them_only(held: Held) -> None:
    """Without role selection a peer would believe that the node stores reports."""
    for roles, accepted in (([], 0), ([build_role(ComprehensiveSRStorage, scp_role=True)], 1)):
        ae = AE()
        ae.add_requested_context(ComprehensiveSRStorage)
        ae.add_requested_context(STUDY_FIND)
        association = ae.associate("127.0.0.1", held.peer.port, ext_neg=roles)
        assert len(association.accepted_contexts) == 1 + accepted
        association.release()


def test_what_is_given_out_is_all_that_the_node_makes() -> None:
    assert set(RESULT_SOP_CLASSES) == {uid for _, classes, _ in OBJECTS.values() for uid in classes}


def test_the_connection_still_stores_while_it_retrieves(held: Held, tmp_path: Path) -> None:
    """A peer may be SCU and SCP of CT on one association; the fast lane stays as it is."""
    (path,) = make_ct_series(tmp_path / "new", num_slices=1)
    ae = AE(ae_title="WS")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    ae.add_requested_context(STUDY_FIND)
    association = ae.associate(
        "127.0.0.1", held.peer.port, ext_neg=[build_role(CTImageStorage, scu_role=True, scp_role=True)]
    )
    assert association.send_c_store(dcmread(path)).Status == 0x0000
    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", dcmread(path).StudyInstanceUID
    assert [status.Status for status, _ in association.send_c_find(query, STUDY_FIND)] == [0xFF00, 0x0000]
    association.release()


def test_no_instance_waits_for_a_delayed_acknowledgement(held: Held, tmp_path: Path) -> None:
    """getscu writes each answer in two pieces unless TCP_NODELAY, a variable of dcmtk, is set."""
    num = 30
    made = make_ct_series(held.index.data_dir / "instances" / "many", num_slices=num)
    hold(held.index, made)
    study = f"StudyInstanceUID={dcmread(made[0]).StudyInstanceUID}"
    arguments = [tool("getscu"), "-S", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port), "--ignore"]
    arguments += ["-k", "QueryRetrieveLevel=STUDY", "-k", study]

    def seconds(**environment: str) -> float:
        started = time.monotonic()
        subprocess.run(arguments, env=os.environ | environment, check=True, timeout=30, cwd=tmp_path)
        return time.monotonic() - started

    seconds()
    assert min(seconds() for _ in range(2)) < min(seconds(TCP_NODELAY="1") for _ in range(2)) + num * 0.02


# ---- C-CANCEL ----


def test_a_cancelled_c_find_ends_and_the_association_goes_on(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    is_cancelled, answers = threading.Event(), scp.answers
    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", ""
    with associated(held.peer, [(STUDY_FIND, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
        uncancelled = [status.Status for status, _ in association.send_c_find(query, STUDY_FIND)]
    assert len(uncancelled) > len(held.studies)

    def pausing(*arguments: Any) -> Iterator[Dataset]:
        for answer in answers(*arguments):
            yield answer
            is_cancelled.wait(10)
            time.sleep(0.2)  # for the request to get here

    monkeypatch.setattr(scp, "answers", pausing)
    with associated(held.peer, [(STUDY_FIND, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
        statuses = []
        for status, _ in association.send_c_find(query, STUDY_FIND, msg_id=7):
            statuses.append(status.Status)
            if not is_cancelled.is_set():
                association.send_c_cancel(7, query_model=STUDY_FIND)
                is_cancelled.set()
        assert statuses == [0xFF00, 0xFE00]
        monkeypatch.setattr(scp, "answers", answers)
        again = [status.Status for status, _ in association.send_c_find(query, STUDY_FIND, msg_id=8)]
        assert again == uncancelled


def test_a_cancelled_c_move_sends_no_more(held: Held) -> None:
    is_cancelled = threading.Event()
    came: list[str] = []

    def on_c_store(event: evt.Event) -> int:
        if came:
            is_cancelled.wait(10)
            time.sleep(0.2)
        came.append(str(event.request.AffectedSOPInstanceUID))
        return 0x0000

    model = StudyRootQueryRetrieveInformationModelMove
    names = Dataset()
    names.QueryRetrieveLevel, names.StudyInstanceUID = "STUDY", held.studies[1]
    ae = AE("WORKSTATION")
    ae.add_supported_context(CTImageStorage, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    server = ae.start_server(("127.0.0.1", held.store_port), block=False, evt_handlers=[(evt.EVT_C_STORE, on_c_store)])
    try:
        with associated(held.peer, [(model, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
            said = []
            for status, _ in association.send_c_move(names, "WORKSTATION", model, msg_id=7):
                said.append(status)
                if not is_cancelled.is_set():
                    association.send_c_cancel(7, query_model=model)
                    is_cancelled.set()
    finally:
        server.shutdown()
    last = said[-1]
    assert last.Status == 0xFE00
    assert 1 <= len(came) < NUM_SLICES
    assert last.NumberOfCompletedSuboperations == len(came)
    assert last.NumberOfRemainingSuboperations == NUM_SLICES - len(came)


# ---- a node whose cases are in PostgreSQL ----


def test_what_postgresql_knows_of_is_found_and_given(postgresql: "PostgreSQLServer", tmp_path: Path) -> None:
    node = Held(tmp_path, postgresql.make_database())
    with listening(node.config, node.index):
        found, _ = ask(node.peer, "STUDY", PatientID="P-0", StudyInstanceUID="")
        assert [answer.StudyInstanceUID for answer in found] == [node.studies[2], node.studies[0]]
        _, came = retrieve(
            tmp_path, tool("getscu"), "-S", "-aec", "CSPINE", "127.0.0.1", str(node.peer.port),
            "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={node.studies[1]}",
        )  # fmt: skip
    node.index.close()
    assert {ds.SOPInstanceUID for ds in came} == {dcmread(path).SOPInstanceUID for path in node.paths[1]}
