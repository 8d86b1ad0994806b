"""`cspine fetch`: from a real Orthanc, from another node, and from archives that refuse, break off or are not there."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from node.config import Config, load_config
from node.index import Index
from node.peers import DicomPeer
from node.send import send_files
from tests.certificates import Authority
from tests.factories import make_ct_series, make_report
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.receiver import listening

if TYPE_CHECKING:
    from click.testing import Result

    from tests.postgresql_server import PostgreSQLServer

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

NUM_SLICES = 4
Fetch = Callable[..., "Result"]


def _study(number: int) -> Callable[[int, Dataset], None]:
    def edit(_i: int, ds: Dataset) -> None:
        ds.PatientID, ds.AccessionNumber, ds.StudyDate = "P-7", f"ACC{number}", f"2026010{number + 1}"

    return edit


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Two Studies of one patient, the second compressed; beside the first CT a report in the same Study."""
    root = tmp_path_factory.mktemp("studies")
    made = [
        make_ct_series(root / str(number), num_slices=NUM_SLICES, edit=_study(number), transfer_syntax_uid=syntax)
        for number, syntax in enumerate((ExplicitVRLittleEndian, JPEGLSLossless))
    ]
    report = dcmread(make_report(root / "report.dcm"))
    _study(0)(0, report)
    report.StudyInstanceUID = dcmread(made[0][0]).StudyInstanceUID
    report.save_as(root / "report.dcm")
    return made


@pytest.fixture(scope="module")
def node_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def orthanc(
    studies: list[list[Path]], node_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OrthancServer]:
    server = OrthancServer(
        tmp_path_factory.mktemp("orthanc") / "o", port=free_port(), node_port=node_port, is_archive=True
    )
    server.upload(studies[0][0].parents[1])
    yield server
    server.stop()


@pytest.fixture
def fetch(tmp_path: Path, cspine: Callable[..., "Result"]) -> Fetch:
    """Runs `cspine fetch --from pacs` with a peer at the port."""

    def run(port: int, *arguments: str, ae_title: str = "ORTHANC", receive_port: int = 11112) -> "Result":
        peer = {"name": "pacs", "host": "127.0.0.1", "port": port, "ae_title": ae_title, "timeout_s": 30}
        config = {
            "data_dir": "data",
            "receive": {"port": receive_port, "min_free_disk_mb": 0},
            "retrieve": {"peers": [peer]},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return cspine("fetch", "--from", "pacs", *arguments)

    return run


def here(tmp_path: Path) -> dict[str, Path]:
    """SOPInstanceUID and file of every Instance in the node."""
    with closing(Index(tmp_path / "data")) as index:
        found = {}
        for case in index.cases():
            found |= {
                headers[0]["sop_instance_uid"]: path
                for path, headers in index.instance_headers(case.series_instance_uid).items()
            }
        return found


def uid_of(study: list[Path], keyword: str = "StudyInstanceUID") -> str:
    return str(dcmread(study[0])[keyword].value)


# ---- what comes ----


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("key", ["--accession", "--study"])
def test_a_named_study_comes_as_it_is_there(
    orthanc: OrthancServer, studies: list[list[Path]], fetch: Fetch, tmp_path: Path, key: str, number: int
) -> None:
    study = studies[number]
    value = uid_of(study, "AccessionNumber" if key == "--accession" else "StudyInstanceUID")
    result = fetch(orthanc.destination.port, key, value)
    assert result.exit_code == 0, result.output
    assert f"Series {uid_of(study, 'SeriesInstanceUID')}: {NUM_SLICES} Instances\n" in result.output
    came = {uid: dcmread(path) for uid, path in here(tmp_path).items()}
    sent = {str(ds.SOPInstanceUID): ds for ds in map(dcmread, study)}
    assert came == sent
    assert {ds.file_meta.TransferSyntaxUID for ds in came.values()} == {
        ds.file_meta.TransferSyntaxUID for ds in sent.values()
    }


def test_priors_of_a_patient_come_and_nothing_comes_twice(orthanc: OrthancServer, fetch: Fetch, tmp_path: Path) -> None:
    assert fetch(orthanc.destination.port, "--patient", "P-7").exit_code == 0
    with closing(Index(tmp_path / "data")) as index:
        before = {case.series_instance_uid: (case.num_instances, case.changed_at) for case in index.cases()}
        assert [num for num, _ in before.values()] == [NUM_SLICES] * 2
        assert {case.calling_ae_title for case in index.cases()} == {"ORTHANC"}
    assert fetch(orthanc.destination.port, "--patient", "P-7").exit_code == 0
    with closing(Index(tmp_path / "data")) as index:
        assert {case.series_instance_uid: (case.num_instances, case.changed_at) for case in index.cases()} == before


def test_a_study_is_moved_to_the_node(
    orthanc: OrthancServer, studies: list[list[Path]], fetch: Fetch, tmp_path: Path, node_port: int
) -> None:
    with closing(Index(tmp_path / "data")) as index:
        config = Config(data_dir=index.data_dir)
        receive = config.receive.model_copy(update={"port": node_port, "min_free_disk_mb": 0})
        with listening(config.model_copy(update={"receive": receive}), index):
            result = fetch(
                orthanc.destination.port, "--study", uid_of(studies[1]), "--by", "move", receive_port=node_port
            )
    assert result.exit_code == 0, result.output
    assert here(tmp_path).keys() == {str(dcmread(path).SOPInstanceUID) for path in studies[1]}


def test_a_list_fetches_nothing(
    orthanc: OrthancServer, studies: list[list[Path]], fetch: Fetch, tmp_path: Path
) -> None:
    result = fetch(orthanc.destination.port, "--patient", "P-7", "--list")
    assert result.exit_code == 0
    assert sorted(line.rpartition("Series ")[2] for line in result.output.splitlines()) == sorted(
        f"{uid_of(study, 'SeriesInstanceUID')}: {NUM_SLICES} Instances" for study in studies
    )
    assert "P-7" not in result.output
    assert not (tmp_path / "data").exists()


def test_another_node_is_an_archive_too(
    studies: list[list[Path]], fetch: Fetch, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(retrieve={"enabled": True}).model_copy(update={"data_dir": tmp_path / "other"})
    with closing(Index(config.data_dir)) as index, listening(config, index):
        peer = DicomPeer(name="x", host="127.0.0.1", port=config.receive.port, ae_title="CSPINE")
        send_files(studies[1], peer, calling_ae_title="CT1")
        result = fetch(config.receive.port, "--accession", "ACC1", ae_title="CSPINE")
    assert result.exit_code == 0, result.output
    assert {dcmread(path).file_meta.TransferSyntaxUID for path in here(tmp_path).values()} == {JPEGLSLossless}


@pytest.mark.parametrize("by", ["get", "move"])
def test_a_study_comes_under_tls_into_a_node_on_postgresql(
    studies: list[list[Path]],
    tmp_path: Path,
    make_config: Callable[..., Config],
    cspine: Callable[..., "Result"],
    postgresql: "PostgreSQLServer",
    by: str,
) -> None:
    authority = Authority(tmp_path / "ca")
    one, other = authority.sign("archive"), authority.sign("node")
    us = {"ca": str(authority.certificate), "certificate": str(other.certificate), "key": str(other.key)}
    taken = {"verify": "required", "client_ca": str(authority.certificate)}
    node_port, database = free_port(), postgresql.make_database()
    there = make_config(
        receive={"ae_title": "ARCHIVE", "tls": taken | {"certificate": one.certificate, "key": one.key}},
        retrieve={
            "enabled": True,
            "peers": [{"name": "n", "host": "127.0.0.1", "port": node_port, "ae_title": "CSPINE", "tls": us}],
        },
    ).model_copy(update={"data_dir": tmp_path / "other"})
    peer = {"name": "pacs", "host": "127.0.0.1", "port": there.receive.port, "ae_title": "ARCHIVE", "tls": us}
    receive = {"port": node_port, "min_free_disk_mb": 0}
    receive |= {"tls": taken | {"certificate": str(other.certificate), "key": str(other.key)}}
    settings = {"data_dir": str(tmp_path / "data"), "receive": receive, "retrieve": {"peers": [peer]}}
    settings["database"] = database.get_secret_value()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    here = load_config(tmp_path / "config.yaml")
    with (
        closing(Index(there.data_dir)) as archive,
        listening(there, archive),
        closing(Index(here.data_dir, database)) as index,
        listening(here, index),
    ):
        assert not send_files(studies[1], DicomPeer(**peer), calling_ae_title="CT1")
        result = cspine("fetch", "--from", "pacs", "--study", uid_of(studies[1]), "--by", by)
        assert result.exit_code == 0, result.output
        (case,) = index.cases()
        assert (case.series_instance_uid, case.num_instances) == (uid_of(studies[1], "SeriesInstanceUID"), NUM_SLICES)


# ---- what does not ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one of --accession"),
        (("--accession", "1", "--study", "1.2"), "one of --accession"),
        (("--patient", "*"), "not a pattern"),
        (("--patient", " "), "not a pattern"),
        (("--from", "elsewhere", "--study", "1.2"), "no 'elsewhere' among retrieve.peers (pacs)"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(fetch: Fetch, arguments: tuple[str, ...], said: str) -> None:
    result = fetch(free_port(), *arguments)
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_an_archive_that_is_not_there_or_has_nothing_says_so(orthanc: OrthancServer, fetch: Fetch) -> None:
    result = fetch(free_port(), "--study", "1.2")
    assert (result.exit_code, "cannot be reached" in result.output) == (1, True), result.output
    result = fetch(orthanc.destination.port, "--study", "1.2")
    assert (result.exit_code, "finds no CT" in result.output) == (1, True), result.output


def test_a_move_to_a_node_that_does_not_run_says_what_to_do(
    orthanc: OrthancServer, studies: list[list[Path]], fetch: Fetch
) -> None:
    result = fetch(orthanc.destination.port, "--study", uid_of(studies[0]), "--by", "move")
    assert (result.exit_code, "answered with status" in result.output) == (1, True), result.output


class Archive:
    """A peer that finds one Series of `NUM_SLICES`, and does with C-GET and C-MOVE what the test says."""

    def __init__(self, study: list[Path], *, get: object = None, move: object = None) -> None:
        self.study, self.port = study, free_port()
        ae = AE(ae_title="PACS")
        ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        handlers: list[object] = [(evt.EVT_C_FIND, self.on_find)]
        first = dcmread(study[0])
        if get is not None:
            ae.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
            ae.add_supported_context(first.SOPClassUID, ExplicitVRLittleEndian, scu_role=True, scp_role=True)
            handlers.append((evt.EVT_C_GET, get))
        if move is not None:
            ae.add_supported_context(StudyRootQueryRetrieveInformationModelMove)
            handlers.append((evt.EVT_C_MOVE, move))
        self.server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)

    def on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset]]:
        found = Dataset()
        found.StudyInstanceUID, found.StudyDate = uid_of(self.study), "20260101"
        if event.identifier.QueryRetrieveLevel == "SERIES":
            for modality, uid in (("CT", uid_of(self.study, "SeriesInstanceUID")), ("MR", "1.2.3")):
                found.SeriesInstanceUID, found.Modality = uid, modality
                found.NumberOfSeriesRelatedInstances = NUM_SLICES
                yield 0xFF00, found
        else:
            yield 0xFF00, found


@pytest.mark.parametrize("arguments", [("--patient", "p-1"), ("--accession", "ACC1"), ("--study", "1.2.1")])
def test_of_an_archive_that_does_not_match_a_key_nobody_else_comes(fetch: Fetch, arguments: tuple[str, str]) -> None:
    def all_it_has(event: evt.Event) -> Iterator[tuple[int, Dataset]]:
        for number in range(3):
            ds = Dataset()
            if event.identifier.QueryRetrieveLevel == "STUDY":
                ds.StudyInstanceUID, ds.PatientID, ds.AccessionNumber = f"1.2.{number}", f"P-{number} ", f"ACC{number}"
            else:
                ds.SeriesInstanceUID, ds.Modality = f"{event.identifier.StudyInstanceUID}.9", "CT"
            yield 0xFF01, ds

    ae = AE(ae_title="PACS")
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, all_it_has)])
    result = fetch(server.socket.getsockname()[1], *arguments, "--list", ae_title="PACS")
    server.shutdown()
    assert result.exit_code == 0
    assert {line.split(",")[0] for line in result.output.splitlines()} == {"Study 1.2.1 of no date"}


def test_an_archive_without_c_get_is_named(studies: list[list[Path]], fetch: Fetch) -> None:
    archive = Archive(studies[0])
    result = fetch(archive.port, "--accession", "ACC0", ae_title="PACS")
    archive.server.shutdown()
    assert result.exit_code == 1
    assert "takes nothing of what was offered" in result.output or "does not answer C-GET" in result.output


def test_what_is_missing_or_refused_is_counted(studies: list[list[Path]], fetch: Fetch, tmp_path: Path) -> None:
    def two_of_four(_event: evt.Event) -> Iterator[object]:
        yield 3
        for path in studies[0][:2]:
            yield 0xFF00, dcmread(path)
        other = dcmread(studies[0][2])
        other.Modality = "MR"
        yield 0xFF00, other

    archive = Archive(studies[0], get=two_of_four)
    result = fetch(archive.port, "--accession", "ACC0", ae_title="PACS")
    archive.server.shutdown()
    assert result.exit_code == 1
    assert ": 2 Instances; " in result.output
    assert "1 refused here: " in result.output
    assert len(here(tmp_path)) == 2


def test_an_archive_that_says_success_and_sends_less_is_not_believed(studies: list[list[Path]], fetch: Fetch) -> None:
    def one(_event: evt.Event) -> Iterator[object]:
        yield 1
        yield 0xFF00, dcmread(studies[0][0])

    archive = Archive(studies[0], get=one)
    result = fetch(archive.port, "--accession", "ACC0", ae_title="PACS")
    archive.server.shutdown()
    assert result.exit_code == 1
    assert f"1 Instances; the peer said that it has {NUM_SLICES} Instances" in result.output


def test_an_archive_that_breaks_off_leaves_what_came(studies: list[list[Path]], fetch: Fetch, tmp_path: Path) -> None:
    def breaks(event: evt.Event) -> Iterator[object]:
        yield 4
        yield 0xFF00, dcmread(studies[0][0])
        event.assoc.abort()

    archive = Archive(studies[0], get=breaks)
    result = fetch(archive.port, "--accession", "ACC0", ae_title="PACS")
    archive.server.shutdown()
    assert (result.exit_code, "broke off the C-GET" in result.output) == (1, True), result.output
    assert len(here(tmp_path)) == 1


def test_a_refused_move_tells_the_status(studies: list[list[Path]], fetch: Fetch) -> None:
    def unknown(_event: evt.Event) -> Iterator[object]:
        yield None, None

    archive = Archive(studies[0], move=unknown)
    result = fetch(archive.port, "--accession", "ACC0", "--by", "move", ae_title="PACS")
    archive.server.shutdown()
    assert result.exit_code == 1
    assert "status 0xA801" in result.output
    assert "enter CSPINE, its host and receive.port there" in result.output


def test_a_move_of_nothing_is_not_a_success(studies: list[list[Path]], fetch: Fetch) -> None:
    def says_done(_event: evt.Event) -> Iterator[object]:
        yield "127.0.0.1", 1
        yield 0

    archive = Archive(studies[0], move=says_done)
    result = fetch(archive.port, "--accession", "ACC0", "--by", "move", ae_title="PACS")
    archive.server.shutdown()
    assert (result.exit_code, ": 0 Instances; the peer said" in result.output) == (1, True), result.output
