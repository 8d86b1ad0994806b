"""The `cspine` command: quick help, errors in a sentence without a traceback, and exit statuses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt

from node.case import CaseState
from node.config import Config
from node.index import Index
from tests.factories import make_ct_series
from tests.stored import add_instance

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

COMMANDS = ["serve", "demo", "analyze", "send", "check", "cases", "pause", "resume", "retry", "delete", "rules"]
HEAVY = (
    "torch",
    "numpy",
    "pydicom",
    "pynetdicom",
    "highdicom",
    "sqlalchemy",
    "apscheduler",
    "scipy",
    "pydantic",
    "rich",
)

Cspine = Callable[..., Result]


def write_config(folder: Path, **settings: object) -> Path:
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def one_sentence(text: str) -> str:
    """The text, after checking that it is one line that ends like a sentence."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].endswith("."), text
    return lines[0]


# ---- help ----


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], *([command, "--help"] for command in COMMANDS)])
def test_help_says_what_a_command_does(cspine: Cspine, arguments: list[str]) -> None:
    result = cspine(*arguments)
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_help_lists_all_commands_and_the_notice(cspine: Cspine) -> None:
    output = " ".join(cspine("--help").output.split())
    assert all(f" {command} " in output for command in COMMANDS)
    assert "not a medical device" in output


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["analyze", "--help"], ["--version"]])
def test_help_is_quick_for_it_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from node.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        f"    print('HEAVY:', *sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY:"


def test_python_m_node_is_cspine() -> None:
    done = subprocess.run([sys.executable, "-m", "node", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cspine, version ")


@pytest.mark.parametrize(
    "arguments", [["sreve"], ["send"], ["analyze"], ["send", "--no-such-option"], ["cases", "--limit", "0"]]
)
def test_wrong_usage_ends_with_status_2(cspine: Cspine, arguments: list[str]) -> None:
    result = cspine(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


# ---- configuration ----


@pytest.mark.parametrize("command", [["serve"], ["check"], ["cases"], ["analyze", ".", "--out", "out"]])
def test_a_faulty_configuration_ends_any_command_with_status_2_and_all_faults(
    cspine: Cspine, tmp_path: Path, command: list[str]
) -> None:
    path = write_config(tmp_path, receive={"port": 0, "prot": 1})
    result = cspine(*command, "--config", path)
    assert result.exit_code == 2
    assert "has 2 fault(s)" in result.stderr
    assert "receive.port" in result.stderr
    assert "receive.prot is not a setting" in result.stderr


def test_a_configuration_that_is_not_there_ends_with_status_2(cspine: Cspine) -> None:
    result = cspine("check", "--config", "missing.yaml")
    assert result.exit_code == 2
    assert "'missing.yaml' does not exist" in result.stderr


def test_config_yaml_of_the_working_folder_is_taken(cspine: Cspine, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("receive: {port: none}\n", encoding="utf-8")
    assert cspine("cases").exit_code == 2


# ---- send ----


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.0.0.1:", ":104", "host:port", "host:0", "host:65536", "host:-1", ""]
)
def test_send_to_what_is_not_host_and_port(cspine: Cspine, tmp_path: Path, address: str) -> None:
    result = cspine("send", tmp_path, "--to", address, "--aet", "PEER")
    assert result.exit_code == 2
    assert f"{address!r} is not HOST:PORT, for example 127.0.0.1:11112." in " ".join(result.stderr.split())


@pytest.mark.parametrize("option", ["--aet", "--from"])
def test_send_with_a_bad_ae_title(cspine: Cspine, tmp_path: Path, option: str) -> None:
    arguments = {"--aet": "PEER", "--from": "ME", option: "SEVENTEEN_LETTERS"}
    result = cspine("send", tmp_path, "--to", "127.0.0.1:104", *(part for item in arguments.items() for part in item))
    assert result.exit_code == 2
    assert one_sentence(result.stderr) == (
        "'SEVENTEEN_LETTERS': an AE title has 1 to 16 printable ASCII characters and no backslash."
    )


def test_send_a_folder_without_dicom(cspine: Cspine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not DICOM", encoding="utf-8")
    result = cspine("send", tmp_path, "--to", "127.0.0.1:104", "--aet", "PEER")
    assert result.exit_code == 2
    assert one_sentence(result.stderr) == f"{tmp_path} holds no DICOM file (1 other files)."


def test_send_to_a_peer_that_is_not_there(cspine: Cspine, tmp_path: Path, free_port: Callable[[], int]) -> None:
    make_ct_series(tmp_path / "ct", num_slices=1)
    port = free_port()
    result = cspine("send", tmp_path / "ct", "--to", f"127.0.0.1:{port}", "--aet", "PEER")
    assert result.exit_code == 1
    assert f"PEER at 127.0.0.1:{port} cannot be reached; check host and port, and that it runs." in result.stderr


def test_send_counts_what_was_sent_and_groups_what_was_refused(
    cspine: Cspine, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    make_ct_series(tmp_path / "ct", num_slices=3)
    (tmp_path / "ct" / "notes.txt").write_text("not DICOM", encoding="utf-8")
    statuses = [0, 0, 0, 0xA700, 0xA700, 0]
    ae = AE(ae_title="PEER")
    ae.add_supported_context(CTImageStorage)
    handlers = [(evt.EVT_C_STORE, lambda _: statuses.pop(0))]
    server = ae.start_server(("127.0.0.1", free_port()), block=False, evt_handlers=handlers)
    address = f"127.0.0.1:{server.socket.getsockname()[1]}"
    sent = cspine("send", tmp_path / "ct", "--to", address, "--aet", "PEER")
    refused = cspine("send", tmp_path / "ct", "--to", address, "--aet", "PEER")
    server.shutdown()
    assert sent.exit_code == 0
    assert sent.stdout.startswith("3 of 3 Instances sent in ")
    assert sent.stdout.strip().endswith("s, 1 files that are not DICOM left out.")
    assert refused.exit_code == 1
    assert refused.stdout.startswith("1 of 3 Instances sent in ")
    assert "status 0xA700" in refused.stderr


# ---- cases ----


def test_cases_with_nothing_received_yet(cspine: Cspine, tmp_path: Path) -> None:
    result = cspine("cases")
    assert result.exit_code == 0
    assert one_sentence(result.stderr) == (
        f"Nothing has been received yet: there is no database in {tmp_path / 'data'}."
    )
    assert result.stdout == ""


def some_cases(index: Index) -> None:
    """A case that waits, and one that was refused for a reason with brackets, from a sender with a rude AE title."""
    for number in (1, 2):
        uid = f"1.2.{number}"
        add_instance(
            index,
            association_id=index.open_association("[/RUDE]"),
            calling_ae_title="[/RUDE]",
            path=index.data_dir / "instances" / uid / f"{uid}.9.dcm",
            headers=[{"sop_instance_uid": f"{uid}.9", "series_instance_uid": uid, "study_instance_uid": "1.2"}],
            quiet_time_s=0,
        )
    case = index.case("1.2.1")
    assert case is not None
    assert index.refuse(case, "it is [Errno 13] sagittal")


@pytest.mark.parametrize("columns", [80, 120])
def test_cases_are_a_line_each_and_below_it_what_may_be_long(
    cspine: Cspine, index: Index, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    some_cases(index)
    uid = "1.2.826.0.1.3680043.8.498." + "7" * 38  # the longest that there is
    add_instance(
        index,
        association_id=index.open_association("SIXTEEN_LETTERS_"),
        calling_ae_title="SIXTEEN_LETTERS_",
        path=index.data_dir / "instances" / "long.dcm",
        headers=[{"sop_instance_uid": "1.9", "series_instance_uid": uid, "study_instance_uid": "1.2"}],
        quiet_time_s=0,
    )
    result = cspine("cases")
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    received = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    patterns = (
        "case  state      received             from              Instances  priority",
        rf"3     receiving  {received}  SIXTEEN_LETTERS_  1          routine",
        f"      {uid}",
        rf"2     receiving  {received}  \[/RUDE\]           1          routine",
        "      1.2.2",
        rf"1     refused    {received}  \[/RUDE\]           1          routine",
        "      1.2.1",
        r"      it is \[Errno 13\] sagittal",
    )
    assert len(lines) == len(patterns), result.stdout
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
        assert len(line) <= 80


def test_cases_as_json_is_a_line_for_each(cspine: Cspine, index: Index) -> None:
    some_cases(index)
    values = [json.loads(line) for line in cspine("cases", "--json").stdout.splitlines()]
    assert [value["series_instance_uid"] for value in values] == ["1.2.2", "1.2.1"]
    assert values[1]["state"] == CaseState.REFUSED
    assert values[1]["reason"] == "it is [Errno 13] sagittal"
    assert values[0]["first_received_at"][10] == "T"
    assert len(cspine("cases", "--json", "--limit", "1").stdout.splitlines()) == 1


# ---- analyze ----


def test_analyze_of_what_holds_no_dicom_ends_with_status_3(cspine: Cspine, tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    result = cspine("analyze", tmp_path / "series", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert one_sentence(result.stderr) == f"{tmp_path / 'series'} holds no DICOM file (0 other files)."


def test_analyze_of_a_series_that_cannot_be_analysed_ends_with_status_3_and_leaves_nothing(
    cspine: Cspine, tmp_path: Path, untrained_bundle: Path
) -> None:
    make_ct_series(tmp_path / "series", num_slices=5)
    config = write_config(tmp_path, analyse={"bundle": str(untrained_bundle)})
    result = cspine("analyze", tmp_path / "series", "--out", tmp_path / "out", "--config", config)
    assert result.exit_code == 3
    assert "5 slices; at least 30 are needed" in one_sentence(result.stderr)
    assert list((tmp_path / "out").iterdir()) == []


def test_analyze_with_a_bundle_or_device_that_is_not_there_ends_with_status_2(
    cspine: Cspine, tmp_path: Path, untrained_bundle: Path
) -> None:
    make_ct_series(tmp_path / "series", num_slices=5)
    for settings in ({"bundle": str(tmp_path / "no-bundle")}, {"bundle": str(untrained_bundle), "device": "cuda:63"}):
        path = write_config(tmp_path, analyse=settings)
        result = cspine("analyze", tmp_path / "series", "--out", tmp_path / "out", "--config", path)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1


# ---- serve ----


def serve(config: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "node", "serve", "--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_serve_with_a_data_folder_that_cannot_be_made_says_so(tmp_path: Path, free_port: Callable[[], int]) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    path = write_config(tmp_path, data_dir=str(tmp_path / "file" / "data"), receive={"port": free_port()})
    node = serve(path)
    _, error = node.communicate(timeout=60)
    assert node.returncode == 1
    assert "The node cannot start: " in error
    assert str(tmp_path / "file") in error
    assert "Traceback" not in error


def test_serve_on_a_port_in_use_says_so(tmp_path: Path, untrained_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as in_use:
        receive = {"port": in_use.getsockname()[1]}
        path = write_config(tmp_path, receive=receive, analyse={"bundle": str(untrained_bundle)})
        node = serve(path)
        _, error = node.communicate(timeout=60)
    assert node.returncode == 1
    assert "cannot be listened on: Address already in use; another program has that port" in error
    assert "Traceback" not in error


def test_serve_with_a_damaged_bundle_says_which_file_and_what_to_do(
    tmp_path: Path, untrained_bundle: Path, free_port: Callable[[], int]
) -> None:
    bundle = Path(shutil.copytree(untrained_bundle, tmp_path / "bundle"))
    (bundle / "fracture_net.safetensors").write_bytes(b"half of it")
    node = serve(write_config(tmp_path, receive={"port": free_port()}, analyse={"bundle": "bundle"}))
    _, error = node.communicate(timeout=60)
    assert node.returncode == 1
    (said,) = [line for line in error.splitlines() if line.startswith("The node cannot start: ")]
    assert f"{bundle / 'fracture_net.safetensors'} is damaged or was exchanged" in said
    assert said.endswith("Copy or export the bundle again.")
    assert not said.endswith("..")
    assert "Traceback" not in error


def test_a_second_node_on_the_same_data_folder_does_not_start(
    tmp_path: Path, untrained_bundle: Path, free_port: Callable[[], int]
) -> None:
    """It would clear away what the first is just storing."""
    first = serve(write_config(tmp_path, receive={"port": free_port()}, analyse={"bundle": str(untrained_bundle)}))
    try:
        assert first.stdout is not None
        while "is ready" not in first.stdout.readline():
            assert first.poll() is None
        second = serve(write_config(tmp_path, receive={"port": free_port()}, analyse={"bundle": str(untrained_bundle)}))
        _, error = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"another node uses {tmp_path / 'data'}" in error
    finally:
        first.terminate()
        first.communicate(timeout=60)


def test_serve_stops_within_10_s_while_a_destination_hangs(
    tmp_path: Path, untrained_bundle: Path, free_port: Callable[[], int]
) -> None:
    index = Index(tmp_path / "data")
    folder = index.data_dir / "cases" / "1.2.3" / "results"
    folder.mkdir(parents=True)
    (image,) = make_ct_series(folder, num_slices=1)
    image.rename(folder / "vertebrae.seg.dcm")
    add_instance(
        index,
        association_id=index.open_association("SCANNER"),
        calling_ae_title="SCANNER",
        path=index.data_dir / "instances" / "1.2.3" / "1.2.3.1.dcm",
        headers=[{"sop_instance_uid": "1.2.3.1", "series_instance_uid": "1.2.3", "study_instance_uid": "1.2"}],
        quiet_time_s=0,
    )
    case = index.case("1.2.3")
    assert case is not None
    assert index.queue(case)
    case = index.claim_next()
    assert case is not None
    assert index.finish(case, folder, summary="", sop_instance_uids=(), destinations=["pacs"])
    index.close()
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        pacs = {"name": "pacs", "type": "dicom", "host": "127.0.0.1", "ae_title": "PACS", "timeout_s": 60}
        path = write_config(
            tmp_path,
            data_dir=str(tmp_path / "data"),
            receive={"port": free_port()},
            analyse={"bundle": str(untrained_bundle)},
            deliver={"destinations": [pacs | {"port": hanging.getsockname()[1]}]},
        )
        node = serve(path)
        hanging.settimeout(60)
        connection, _ = hanging.accept()
        time.sleep(0.5)
        started = time.monotonic()
        node.send_signal(signal.SIGTERM)
        node.communicate(timeout=60)
        connection.close()
    assert time.monotonic() - started < 10
    assert node.returncode == 0


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """Or a receiver of a node that is gone would keep its port and acknowledge Instances."""
    code = (
        "import multiprocessing, os, time\n"
        "from tests.node.test_cli import live_as_child\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=live_as_child)\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code, encoding="utf-8")
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def live_as_child() -> None:
    from node.process import be_child

    be_child("ERROR")
    time.sleep(60)


def test_config_is_not_needed_for_the_defaults() -> None:
    assert Config().receive.host == "127.0.0.1"
