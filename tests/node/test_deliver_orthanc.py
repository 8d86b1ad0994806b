"""Delivery to a real Orthanc over its REST API and by STOW-RS."""

import json
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from node.case import CaseState, ObjectProgress, ObjectState
from node.cli import main
from node.config import Config, DicomWebDestination, OrthancDestination
from node.deliver.files import ResultFile
from node.deliver.orthanc import OrthancCourier
from node.index import Index
from node.peers import HttpAuth
from tests.node.handed_over import (
    SERIES,
    Clock,
    add_instance,
    deliver,
    hand_over,
    make_results,
    the_delivery,
    uids_of,
)
from tests.orthanc_server import OrthancServer
from tests.serving import Quiet, serving

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("checks", [False, True])
def test_orthanc_gets_finds_and_links_the_results_and_new_ones_replace_them(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, free_port: Callable[[], int], checks: bool
) -> None:
    """checks: it refuses to change metadata for whoever does not say which revision he knows."""
    hand_over(index, results, "orthanc")
    orthanc = OrthancServer(
        tmp_path / "orthanc", port=free_port(), node_port=free_port(), settings={"CheckRevisions": checks}
    )
    settings: dict[str, Any] = {"type": "orthanc", "name": "orthanc", "url": orthanc.url, "source_metadata": 4100}
    kept = OrthancDestination(**settings)
    # Debian's Orthanc knows no labels, and takes the results all the same.
    replaced = OrthancDestination(**settings, replace=True, label="cspine")
    try:
        case = deliver(index, make_config(), kept)
        assert (case.state, case.reason) == (CaseState.DONE, "")
        first = set(uids_of(results).values())
        assert orthanc.instances() == first
        for series in orthanc.series():
            assert orthanc.client.get_binary(f"series/{series.orthanc_id}/metadata/4100") == SERIES.encode()
        assert index.retry_delivery(the_delivery(index, "orthanc"))  # all again: it is there already
        assert deliver(index, make_config(), kept).state is CaseState.DONE
        add_instance(index, 2)
        newer = make_results(index, "fedcba9876543210")
        hand_over(index, newer, "orthanc")
        assert deliver(index, make_config(), kept).state is CaseState.DONE
        assert orthanc.instances() == first | set(uids_of(newer).values())
        add_instance(index, 3)
        newest = make_results(index, "0000000000000000")
        hand_over(index, newest, "orthanc")
        assert deliver(index, make_config(), replaced).state is CaseState.DONE
        assert orthanc.instances() == set(uids_of(newest).values())  # what `kept` left there goes too
    finally:
        orthanc.stop()


@pytest.mark.parametrize("status", [200, 403, 404])
def test_studies_with_results_are_labelled_where_orthanc_can(results: Path, status: int) -> None:
    """As Orthanc 1.12 answers; 404 is an older one, 403 a user who may not."""
    put: list[str] = []

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, b'{"ID": "i", "ParentSeries": "r", "ParentStudy": "s", "Status": "Success"}')

        def do_PUT(self) -> None:
            put.append(self.path)
            self.answer(status, b"")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    (file, *_) = (ResultFile(path=results / name, key=uid) for name, uid in uids_of(results).items())
    noted: list[ObjectProgress] = []
    with serving(Handler) as port:
        url = f"http://127.0.0.1:{port}"
        courier = OrthancCourier(OrthancDestination(type="orthanc", name="o", url=url, label="cspine"), SERIES)
        with closing(courier):
            courier.send([file], lambda _file, progress: noted.append(progress))
    assert put == ["/studies/s/labels/cspine"]
    assert [progress.state for progress in noted] == [ObjectState.TAKEN]
    assert ("label cspine, which needs Orthanc 1.12, was not set" in noted[0].reason) == (status != 200)


@pytest.mark.parametrize(
    ("version", "label", "warns"),
    [("1.11.2", "cspine", True), ("1.12.0", "cspine", False), ("1.9.7", None, False), ("mainline", "cspine", False)],
)
def test_check_warns_of_a_label_that_an_older_orthanc_cannot_set(version: str, label: str | None, warns: bool) -> None:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"Version": version}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as port:
        destination = OrthancDestination(type="orthanc", name="o", url=f"http://127.0.0.1:{port}", label=label)
        with closing(OrthancCourier(destination, SERIES)) as courier:
            said = courier.check()
    assert said.startswith(f"is Orthanc {version}")
    assert ("WARNING: it cannot set the label cspine, which needs Orthanc 1.12" in said) == warns


def test_orthanc_takes_the_results_by_stow_and_finds_them_by_qido(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    hand_over(index, results, "web")
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    try:
        web = DicomWebDestination(type="dicomweb", name="web", url=f"{orthanc.url}/dicom-web")
        for _ in range(2):  # the second time they are there already
            case = deliver(index, make_config(), web)
            assert (case.state, case.reason) == (CaseState.DONE, "")
            assert orthanc.instances() == set(uids_of(results).values())
            assert index.retry_delivery(the_delivery(index, "web"))
    finally:
        orthanc.stop()


def test_an_orthanc_that_asks_for_a_password_and_is_restarted_in_the_middle_gets_the_rest(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    free_port: Callable[[], int],
) -> None:
    hand_over(index, results, "orthanc")
    ports = {"port": free_port(), "node_port": free_port(), "http_port": free_port()}
    orthanc = OrthancServer(tmp_path / "orthanc", password="hunter2", **ports)
    settings: dict[str, Any] = {"type": "orthanc", "name": "orthanc", "url": orthanc.url}
    known = OrthancDestination(**settings, auth=HttpAuth(type="basic", user="cspine", secret_env="ORTHANC_PASSWORD"))
    try:
        monkeypatch.setenv("ORTHANC_PASSWORD", "wrong")
        assert "answered 401 (Unauthorized): check auth" in deliver(index, make_config(), known).reason
        monkeypatch.setenv("ORTHANC_PASSWORD", "hunter2")
        assert index.retry_delivery(the_delivery(index, "orthanc"))
        upload, sent = OrthancCourier._upload, []

        def stop_after_one(courier: OrthancCourier, file: ResultFile) -> ObjectProgress:
            if sent:
                orthanc.stop()
            sent.append(file.path.name)
            return upload(courier, file)

        with monkeypatch.context() as patch:
            patch.setattr(OrthancCourier, "_upload", stop_after_one)
            case = deliver(index, make_config(), known)
        assert case.state is CaseState.DELIVERING
        orthanc = OrthancServer(tmp_path / "orthanc", password="hunter2", **ports)
        clock.now_s += 10
        assert deliver(index, make_config(), known).state is CaseState.DONE
        assert orthanc.instances() == set(uids_of(results).values())
    finally:
        orthanc.stop()


def test_the_command_lists_retries_and_gives_up(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, clock: Clock, free_port: Callable[[], int]
) -> None:
    nowhere = OrthancDestination(type="orthanc", name="orthanc", url=f"http://127.0.0.1:{free_port()}")
    hand_over(index, results, "orthanc")
    deliver(index, make_config(deliver={"max_attempts": 1, "destinations": ()}), nowhere)
    path = tmp_path / "config.yaml"
    path.write_text(f"data_dir: {index.data_dir}\n", encoding="utf-8")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["deliveries", *arguments, "--config", str(path)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    (line,) = run("list", "--state", "failed", "--destination", "orthanc", "--case", SERIES, "--json").splitlines()
    listed = json.loads(line)
    assert listed["state"] == "failed"
    assert "connection refused" in listed["reason"]
    assert run("list", "--state", "done", "--json") == ""
    assert "{delivery_id}: {reason}".format(**listed) in run("list").splitlines()
    assert run("retry", "--all-failed", "--destination", "orthanc") == "1 of 1 deliveries are tried again now.\n"
    assert run("give-up", str(listed["delivery_id"])) == "1 of 1 deliveries are given up.\n"
    assert the_delivery(index, "orthanc").reason == "given up by hand"


@pytest.mark.parametrize("arguments", [("retry",), ("retry", "1", "--all-failed"), ("give-up", "--all-unsettled")])
def test_what_is_not_named_clearly_is_refused(index: Index, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data_dir: {index.data_dir}\n", encoding="utf-8")
    assert CliRunner().invoke(main, ["deliveries", *arguments, "--config", str(path)]).exit_code == 2
