"""The whole node, as its users run it: `cspine serve` as a process, real associations, results in a folder."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from pydicom import dcmread

from model import PHANTOM_BUNDLE
from model.phantom import Fracture
from node.case import CaseState
from node.send import send_files
from tests.factories import make_ct_series, make_localizer
from tests.postgresql_server import PostgreSQLServer
from tests.running_node import RunningNode, phantom_series

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "findings.schema.json").read_text())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    # The weights for real necks find fewer of a phantom's fractures.
    running = RunningNode(tmp_path, complete={"quiet_time_s": 2.0}, analyse={"bundle": str(PHANTOM_BUNDLE)})
    yield running
    running.stop()


def test_a_series_comes_back_as_findings_seg_and_sr(node: RunningNode, tmp_path: Path) -> None:
    fracture = Fracture(level="C5", kind="body", width_mm=2.0)
    paths = phantom_series(tmp_path / "series", seed=5, fractures=(fracture,))
    assert send_files(paths, node.destination, calling_ae_title="CT1") == []
    assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()

    source = dcmread(paths[0], stop_before_pixels=True)
    folder = node.results_dir / source.StudyInstanceUID / source.SeriesInstanceUID
    findings = json.loads((folder / "findings.json").read_text())
    jsonschema.validate(findings, SCHEMA)
    assert findings["series_instance_uid"] == source.SeriesInstanceUID
    assert set(findings["timings_s"]) == {"read", "segment", "classify", "encode", "total"}
    for name in ("vertebrae.seg.dcm", "report.sr.dcm"):
        made = dcmread(folder / name)
        assert made.StudyInstanceUID == source.StudyInstanceUID
        assert made.PatientID == source.PatientID
    (case,) = node.cases()
    assert "C5" in case.summary
    assert "PHANTOM" not in node.log(), "a patient's name or id is in the log"


def test_what_cannot_be_analysed_says_why_and_does_not_stop_the_rest(node: RunningNode, tmp_path: Path) -> None:
    few = make_ct_series(tmp_path / "few", num_slices=8)
    localizer = [make_localizer(tmp_path / "localizer.dcm")]
    whole = phantom_series(tmp_path / "whole", seed=6)
    for paths in (few, localizer, whole):
        assert send_files(paths, node.destination, calling_ae_title="CT1") == []
    ended = Counter({CaseState.REFUSED: 1, CaseState.SKIPPED: 1, CaseState.DONE: 1})
    assert node.wait_until_settled(num_cases=3) == ended, node.log()
    reasons = {case.state: case.reason for case in node.cases()}
    assert "8" in reasons[CaseState.REFUSED]
    # The PACS is told, too.
    source = dcmread(few[0])
    report = node.results_dir / source.StudyInstanceUID / source.SeriesInstanceUID / "report.sr.dcm"
    deadline = time.monotonic() + 60
    while not report.exists():
        assert time.monotonic() < deadline, node.log()
        time.sleep(0.1)
    assert [path.name for path in report.parent.iterdir()] == ["report.sr.dcm"]
    assert reasons[CaseState.REFUSED].encode() in report.read_bytes()
    assert "localizer" in reasons[CaseState.SKIPPED].lower()


def test_results_sent_back_to_the_node_are_not_taken(node: RunningNode, tmp_path: Path) -> None:
    paths = phantom_series(tmp_path / "series", seed=7)
    send_files(paths, node.destination, calling_ae_title="CT1")
    node.wait_until_settled()
    results = sorted(node.results_dir.rglob("*.dcm"))
    refused = send_files([*results, paths[0]], node.destination, calling_ae_title="ROUTER")
    assert {item.path for item in refused} == set(results)
    assert len(node.cases()) == 1


def test_sending_again_changes_nothing_and_a_late_slice_makes_new_results(node: RunningNode, tmp_path: Path) -> None:
    paths = phantom_series(tmp_path / "series", seed=8)
    *most, last = paths
    send_files(most, node.destination, calling_ae_title="CT1")
    node.wait_until_settled()
    first = {path.name: dcmread(path).SOPInstanceUID for path in node.results_dir.rglob("*.dcm")}
    (before,) = node.cases()

    send_files(most, node.destination, calling_ae_title="CT1")
    time.sleep(1.0)
    assert node.cases() == [before]

    send_files([last], node.destination, calling_ae_title="CT1")
    deadline = time.monotonic() + 60
    while node.cases()[0].result_dir == before.result_dir:
        assert time.monotonic() < deadline, node.log()
        time.sleep(0.2)
    node.wait_until_settled()
    second = {path.name: dcmread(path).SOPInstanceUID for path in node.results_dir.rglob("*.dcm")}
    assert second.keys() == first.keys()
    assert not set(second.values()) & set(first.values())
    (report,) = node.results_dir.rglob("report.sr.dcm")
    assert first["report.sr.dcm"] in str(dcmread(report).PredecessorDocumentsSequence)


@pytest.mark.parametrize("ending", ["SIGTERM", "kill -9"])
def test_a_case_in_a_workers_hands_survives_the_end_of_the_node(ending: str, tmp_path: Path) -> None:
    node = RunningNode(tmp_path)
    try:
        send_files(phantom_series(tmp_path / "series", seed=9), node.destination, calling_ae_title="CT1")
        deadline = time.monotonic() + 60
        while node.cases()[0].state is not CaseState.ANALYSING:
            assert time.monotonic() < deadline, node.log()
            time.sleep(0.02)
        if ending == "SIGTERM":
            assert node.stop() < 10
            assert node.process.returncode == 0
            assert node.cases()[0].state is CaseState.QUEUED
        else:
            node.kill()
        node.wait_until_gone()
        node.start()
        assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()
        assert node.cases()[0].attempts == (
            1 if ending == "SIGTERM" else 2
        )  # or it might take the node with it for ever
    finally:
        node.stop()
    assert {path.name for path in node.results_dir.rglob("*.dcm")} >= {"vertebrae.seg.dcm", "report.sr.dcm"}
    assert len(list((node.data_dir / "cases").glob("*/*/findings.json"))) == 1


def test_a_port_in_use_is_one_sentence(node: RunningNode) -> None:
    elsewhere = node.config_path.with_name("second.yaml")
    elsewhere.write_text(node.config_path.read_text().replace(str(node.data_dir), f"{node.data_dir}-2"))
    command = [sys.executable, "-m", "node", "serve", "--config", str(elsewhere)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert f"The node cannot start: 127.0.0.1:{node.port} cannot be listened on" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_node_keeps_its_cases_in_postgresql_and_pauses_there(postgresql: PostgreSQLServer, tmp_path: Path) -> None:
    url = postgresql.make_database().get_secret_value()
    node = RunningNode(tmp_path, database=url)

    def cspine(*arguments: str) -> str:
        command = [sys.executable, "-m", "node", *arguments, "--config", str(node.config_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    try:
        cspine("pause")
        send_files(phantom_series(tmp_path / "series", seed=10), node.destination, calling_ae_title="CT1")
        deadline = time.monotonic() + 60
        while node.cases()[0].state is not CaseState.QUEUED:
            assert time.monotonic() < deadline, node.log()
            time.sleep(0.1)
        time.sleep(1)  # four ticks
        assert node.cases()[0].state is CaseState.QUEUED
        cspine("resume")
        assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()
        assert "pause" not in cspine("cases", "--state", "done")
    finally:
        node.stop()
    assert not list(node.data_dir.glob("*.sqlite*"))
