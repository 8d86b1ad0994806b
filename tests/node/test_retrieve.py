"""C-GET and C-MOVE for what the node holds: dcmtk's tools and pynetdicom."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    ComprehensiveSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from node.config import ReceiveConfig, RetrieveConfig
from node.conformance import OBJECTS
from node.peers import DicomPeer
from node.retrieve.scp import RESULT_SOP_CLASSES
from node.send import associated
from tests.factories import make_ct_series
from tests.node.retrieving import NUM_SLICES, STUDY_FIND, Held, ask, retrieve, tool, wait_for_cancel
from tests.ports import free_port
from tests.raw_scu import ON_OPEN
from tests.receiver import listening
from tests.waiting import WAIT_S, wait_until
from tests.web_server import hold

if TYPE_CHECKING:
    from tests.postgresql_server import PostgreSQLServer

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


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
        evt_handlers=[*ON_OPEN, (evt.EVT_C_STORE, on_store)],
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


def test_c_get_gives_an_instance_that_lacks_its_sop_class(held: Held, tmp_path: Path) -> None:
    """As those of RSNA 2022, which the node takes."""
    paths = make_ct_series(held.index.data_dir / "instances" / "bare", num_slices=2)
    sent = [dcmread(path) for path in paths]
    for ds, path in zip(sent, paths, strict=True):
        del ds.SOPClassUID, ds.Modality
        ds.save_as(path)
    hold(held.index, paths)
    study = sent[0].StudyInstanceUID
    got, said = c_get(
        held, {CTImageStorage: [ExplicitVRLittleEndian]}, QueryRetrieveLevel="STUDY", StudyInstanceUID=study
    )
    assert said[-1][0].Status == 0x0000
    assert {ds.SOPInstanceUID for ds in got} == {ds.SOPInstanceUID for ds in sent}
    case = held.index.case(sent[0].SeriesInstanceUID)
    assert case is not None
    assert held.index.delete_case(case) is not None


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
        echo = [tool("echoscu"), "127.0.0.1", str(held.store_port)]
        wait_until(lambda: subprocess.run(echo, capture_output=True).returncode == 0)
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


def test_a_destination_that_cannot_be_reached_is_named_in_the_log_and_waited_for_as_long_as_is_set(
    held: Held, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection, and no association
        config = held.config.model_copy(
            update={
                "receive": ReceiveConfig(port=free_port(), min_free_disk_mb=0, associate_timeout_s=60),
                "retrieve": RetrieveConfig(
                    enabled=True,
                    peers=(
                        DicomPeer(name="1", host="127.0.0.1", port=free_port(), ae_title="CLOSED"),
                        DicomPeer(name="2", host="no.such.host.invalid", port=104, ae_title="NOHOST"),
                        DicomPeer(
                            name="3", host="127.0.0.1", port=silent.getsockname()[1], ae_title="SILENT", timeout_s=0.5
                        ),
                    ),
                ),
            }
        )
        names = Dataset()
        names.QueryRetrieveLevel, names.StudyInstanceUID = "STUDY", held.studies[1]
        model = StudyRootQueryRetrieveInformationModelMove
        node = held.peer.model_copy(update={"port": config.receive.port})
        with (
            listening(config, held.index),
            associated(node, [(model, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association,
        ):
            for title in ("CLOSED", "NOHOST", "SILENT"):
                said = [status.get("Status") for status, _ in association.send_c_move(names, title, model)]
                assert said == [0xA801], title
    for told in ("CLOSED at 127.0.0.1", "NOHOST at no.such.host.invalid:104: ", "SILENT at 127.0.0.1"):
        assert f"move-failed destination='{told.split()[0]}': {told}" in caplog.text
    assert caplog.text.count("takes no association; check its host, port and AE title in retrieve.peers") == 2


def test_nothing_to_move_is_no_failure_of_the_destination(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    names = Dataset()
    names.QueryRetrieveLevel, names.StudyInstanceUID = "STUDY", "1.2.3"
    model = StudyRootQueryRetrieveInformationModelMove
    with associated(held.peer, [(model, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
        assert [status.Status for status, _ in association.send_c_move(names, "WORKSTATION", model)] == [0x0000]
    assert "action=move-failed" not in caplog.text


def test_c_move_counts_and_names_what_the_destination_did_not_take(held: Held) -> None:
    statuses = iter([0x0000, 0xB007, 0xA700, 0x0000])
    ae = AE("WORKSTATION")
    ae.add_supported_context(CTImageStorage, [ExplicitVRLittleEndian])  # and not for the report
    answering = [(evt.EVT_C_STORE, lambda _: next(statuses))]
    server = ae.start_server(("127.0.0.1", held.store_port), block=False, evt_handlers=answering)
    names = Dataset()
    names.QueryRetrieveLevel, names.StudyInstanceUID = "STUDY", held.studies[0]
    model = StudyRootQueryRetrieveInformationModelMove
    try:
        with associated(held.peer, [(model, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
            *_, (last, failed) = association.send_c_move(names, "WORKSTATION", model)
    finally:
        server.shutdown()
    counts = [last[f"NumberOf{what}Suboperations"].value for what in ("Completed", "Warning", "Failed", "Remaining")]
    assert (last.Status, counts) == (0xB000, [2, 1, 2, 0])
    taken = {dcmread(path).SOPInstanceUID for path in held.paths[0]}
    assert failed is not None
    assert len(taken.intersection(failed.FailedSOPInstanceUIDList)) == 1
    assert len(failed.FailedSOPInstanceUIDList) == 2


def test_a_move_of_what_is_not_named_is_refused(held: Held, tmp_path: Path) -> None:
    with workstation(held, tmp_path / "got"):
        said = movescu(
            held, tmp_path, "WORKSTATION", "QueryRetrieveLevel=SERIES", f"StudyInstanceUID={held.studies[2]}"
        )
    assert "0xa900" in said
    assert not list((tmp_path / "got").iterdir())


def test_a_cancelled_c_move_sends_no_more(held: Held) -> None:
    is_cancelled = False
    came: list[str] = []

    def on_c_store(event: evt.Event) -> int:
        if came:
            wait_for_cancel()
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
                if not is_cancelled:
                    association.send_c_cancel(7, query_model=model)
                    is_cancelled = True
    finally:
        server.shutdown()
    last = said[-1]
    assert last.Status == 0xFE00
    assert 1 <= len(came) < NUM_SLICES
    assert last.NumberOfCompletedSuboperations == len(came)
    assert last.NumberOfRemainingSuboperations == NUM_SLICES - len(came)


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
        "127.0.0.1",
        held.peer.port,
        ext_neg=[build_role(CTImageStorage, scu_role=True, scp_role=True)],
        evt_handlers=ON_OPEN,
    )
    assert association.send_c_store(dcmread(path)).Status == 0x0000
    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", dcmread(path).StudyInstanceUID
    assert [status.Status for status, _ in association.send_c_find(query, STUDY_FIND)] == [0xFF00, 0x0000]
    association.release()


def test_no_instance_waits_for_a_delayed_acknowledgement(held: Held, tmp_path: Path) -> None:
    """getscu writes each answer in two pieces unless TCP_NODELAY, a variable of dcmtk, is set."""
    num = 60
    made = make_ct_series(held.index.data_dir / "instances" / "many", num_slices=num)
    hold(held.index, made)
    study = f"StudyInstanceUID={dcmread(made[0]).StudyInstanceUID}"
    arguments = [tool("getscu"), "-S", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port), "--ignore"]
    arguments += ["-k", "QueryRetrieveLevel=STUDY", "-k", study]

    def seconds(**environment: str) -> float:
        started = time.monotonic()
        subprocess.run(arguments, env=os.environ | environment, check=True, timeout=WAIT_S, cwd=tmp_path)
        return time.monotonic() - started

    seconds()
    plain_s, undelayed_s = [], []
    while len(plain_s) < 10 and (not plain_s or min(plain_s) > min(undelayed_s) + num * 0.02):  # a busy machine
        plain_s.append(seconds())
        undelayed_s.append(seconds(TCP_NODELAY="1"))
    assert min(plain_s) <= min(undelayed_s) + num * 0.02


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
