"""A real Orthanc beside the node: what its script routes, what it lets in, and the round trip to SEG and SR."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydicom import Dataset, dcmread
from pydicom.uid import Comprehensive3DSRStorage

from model import LEVELS
from model.phantom import Fracture
from node.case import CaseState
from node.config import Config, DicomDestination, load_config
from node.index import Index
from node.send import SendError, send_files
from tests.factories import make_ct_series, make_report, make_screen_save
from tests.orthanc_server import ORTHANC_FOLDER, STABLE_AGE_S, OrthancServer
from tests.ports import free_port
from tests.raw_scu import echo
from tests.receiver import listening
from tests.running_node import RunningNode, phantom_series
from tests.waiting import WAIT_S


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config()


@pytest.fixture
def orthanc(tmp_path: Path, config: Config) -> Iterator[OrthancServer]:
    """An Orthanc that routes to a node which is not running yet."""
    server = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=config.receive.port)
    yield server
    server.stop()


@pytest.fixture
def start_receiver(config: Config, index: Index) -> Iterator[Callable[[], object]]:
    """Starts the node's receiver alone: Instances come in and are counted, nothing is analysed."""
    with ExitStack() as running:
        yield lambda: running.enter_context(listening(config, index))


def wait_until(condition: Callable[[], Any], what: str, log: Callable[[], str], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s\n{log()}"
        time.sleep(0.1)


def test_only_the_ct_instances_of_a_stable_series_are_routed(
    orthanc: OrthancServer, start_receiver: Callable[[], object], index: Index, tmp_path: Path
) -> None:
    start_receiver()
    paths = make_ct_series(tmp_path / "in", num_slices=8)
    make_screen_save(tmp_path / "in" / "dose.dcm", like=paths[0])
    make_report(tmp_path / "in" / "report.dcm")
    orthanc.upload(tmp_path / "in")
    wait_until(lambda: orthanc.num_stable() == 2, "the CT Series and the report are stable", orthanc.log)
    wait_until(lambda: [job["State"] for job in orthanc.jobs()] == ["Success"], "one job is done", orthanc.log)
    (case,) = index.cases()
    assert case.series_instance_uid == dcmread(paths[0]).SeriesInstanceUID
    assert case.num_instances == 8
    assert case.calling_ae_title == "ORTHANC"


def test_a_series_that_grows_is_sent_again_as_a_whole(
    orthanc: OrthancServer, start_receiver: Callable[[], object], index: Index, tmp_path: Path
) -> None:
    start_receiver()
    *most, last = make_ct_series(tmp_path / "in", num_slices=8)
    late = last.rename(tmp_path / "late.dcm")
    orthanc.upload(tmp_path / "in")
    wait_until(lambda: [case.num_instances for case in index.cases()] == [len(most)], "seven are there", orthanc.log)
    orthanc.client.upload_file(str(late))
    wait_until(lambda: [case.num_instances for case in index.cases()] == [8], "all eight are there", orthanc.log)
    wait_until(lambda: [job["State"] for job in orthanc.jobs()] == ["Success"] * 2, "both jobs are done", orthanc.log)


def test_a_node_that_does_not_answer_is_said_in_the_log_and_the_job_can_be_resubmitted(
    orthanc: OrthancServer, start_receiver: Callable[[], object], index: Index, tmp_path: Path
) -> None:
    make_ct_series(tmp_path / "in", num_slices=8)
    orthanc.upload(tmp_path / "in")
    wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
    (job,) = orthanc.jobs()
    assert job["State"] == "Failure"
    assert job["ID"] in orthanc.log()
    start_receiver()
    orthanc.client.jobs.resubmit(job["ID"])
    wait_until(lambda: [case.num_instances for case in index.cases()] == [8], "all eight are there", orthanc.log)


def test_a_sender_that_is_not_listed_may_only_echo(orthanc: OrthancServer, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=1)
    echo(orthanc.destination, calling_ae_title="STRANGER")
    with pytest.raises(SendError):
        send_files(paths, orthanc.destination, calling_ae_title="STRANGER")
    assert orthanc.instances() == set()
    assert send_files(paths, orthanc.destination, calling_ae_title="CSPINE") == []
    assert orthanc.instances() == {dcmread(paths[0]).SOPInstanceUID}


def test_docker_compose_makes_orthanc_and_node_known_to_each_other(tmp_path: Path) -> None:
    compose = yaml.safe_load((ORTHANC_FOLDER.parent / "docker-compose.yml").read_text())
    orthanc = json.loads(compose["services"]["orthanc"]["environment"]["ORTHANC_JSON"])
    config_path = tmp_path / "config.yaml"
    config_path.write_text(compose["configs"]["node"]["content"])
    config = load_config(config_path)
    (destination,) = config.deliver.destinations
    assert isinstance(destination, DicomDestination)
    assert orthanc["DicomModalities"]["cspine"] == [config.receive.ae_title, "node", config.receive.port]
    assert (destination.ae_title, destination.host) == (orthanc["DicomAet"], "orthanc")
    assert {"node", "orthanc"} == set(compose["services"])


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    """A whole node that delivers to an Orthanc which is not running yet; its configuration names the port."""
    (tmp_path / "node").mkdir()
    orthanc = {"name": "orthanc", "type": "dicom", "host": "127.0.0.1", "port": free_port(), "ae_title": "ORTHANC"}
    running = RunningNode(tmp_path / "node", analyse={"threads": 1}, deliver={"destinations": [orthanc]})
    yield running
    running.stop()


def test_a_ct_goes_to_the_node_and_seg_and_sr_come_back_once(node: RunningNode, tmp_path: Path) -> None:
    (destination,) = load_config(node.config_path).deliver.destinations
    assert isinstance(destination, DicomDestination)
    orthanc = OrthancServer(tmp_path / "orthanc", port=destination.port, node_port=node.port)
    try:
        fracture = Fracture(level="C5", kind="body", width_mm=2.0)
        sources = [dcmread(path) for path in phantom_series(tmp_path / "in", seed=5, fractures=(fracture,))]
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: {"SEG", "SR"} <= modalities(orthanc), "SEG and SR are in Orthanc", node.log, 120)
        assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()

        check_seg(orthanc.read("SEG"), sources)
        check_sr(orthanc.read("SR"), sources)
        assert {series.study_instance_uid for series in orthanc.series()} == {sources[0].StudyInstanceUID}

        # The results become stable too, and nothing comes of it.
        num_series = len(orthanc.series())
        wait_until(lambda: orthanc.num_stable() == num_series, "the results are stable", orthanc.log)
        check_nothing_loops(orthanc, node, num_jobs=1)

        # The same again, first to a node that knows the Series, then to one that lost everything it had.
        before = orthanc.instances()
        send_again(orthanc)
        check_nothing_loops(orthanc, node, num_jobs=2)
        node.stop()
        shutil.rmtree(node.data_dir)
        node.start()
        send_again(orthanc)
        assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()
        assert orthanc.instances() == before
    finally:
        orthanc.stop()


def modalities(orthanc: OrthancServer) -> set[str]:
    return {series.modality for series in orthanc.series()}


def send_again(orthanc: OrthancServer) -> None:
    """Sends the CT Series to the node by hand, as a user of Orthanc Explorer would."""
    (ct,) = [series.orthanc_id for series in orthanc.series() if series.modality == "CT"]
    orthanc.client.modalities.send("cspine", ct, timeout=60)


def check_nothing_loops(orthanc: OrthancServer, node: RunningNode, num_jobs: int) -> None:
    """For longer than a Series takes to become stable, nothing new appears on either side."""
    before = orthanc.instances()
    time.sleep(2 * STABLE_AGE_S)
    assert orthanc.instances() == before
    assert [job["State"] for job in orthanc.jobs()] == ["Success"] * num_jobs
    (case,) = node.cases()
    assert case.state is CaseState.DONE


def check_seg(found: list[Dataset], sources: Sequence[Dataset]) -> None:
    """The vertebrae are segmented, and every frame points at a slice of the CT Series."""
    uids = {source.SOPInstanceUID for source in sources}
    labels = [{segment.SegmentLabel for segment in seg.SegmentSequence} for seg in found]
    assert set(LEVELS) in labels, labels
    for seg in found:
        (series,) = seg.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == sources[0].SeriesInstanceUID
        assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
        frames = seg.PerFrameFunctionalGroupsSequence
        cited = {frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID for frame in frames}
        assert cited
        assert cited <= uids
        assert seg.pixel_array.any()


def check_sr(found: list[Dataset], sources: Sequence[Dataset]) -> None:
    """There is one report, about this patient, with slices of the CT Series as its evidence."""
    (report,) = found
    assert report.SOPClassUID == Comprehensive3DSRStorage
    assert report.PatientID == sources[0].PatientID
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    evidence = {series.SeriesInstanceUID: series.ReferencedSOPSequence for series in study.ReferencedSeriesSequence}
    cited = {item.ReferencedSOPInstanceUID for item in evidence[sources[0].SeriesInstanceUID]}
    assert cited
    assert cited <= {source.SOPInstanceUID for source in sources}
