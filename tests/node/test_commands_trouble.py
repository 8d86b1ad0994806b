"""What commands say of what stands in their way; and `cspine check`, which looks for it before."""

import errno
import fcntl
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, Verification

from node.index import Index
from tests.node.test_cli import Cspine, one_sentence, write_config

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


# ---- check ----


def test_check_names_everything_that_is_wrong(
    cspine: Cspine, tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with socket.create_server(("127.0.0.1", free_port())) as in_use:
        path = write_config(
            tmp_path,
            data_dir=str(tmp_path / "file" / "data"),
            receive={"port": in_use.getsockname()[1]},
            analyse={"bundle": str(tmp_path / "no-bundle")},
            deliver={
                "destinations": [
                    {"name": "pacs", "type": "dicom", "host": "127.0.0.1", "port": free_port(), "ae_title": "PACS"},
                    {"name": "out", "type": "folder", "path": str(tmp_path / "file" / "out")},
                    {"name": "fine", "type": "folder", "path": str(tmp_path / "fine")},
                ]
            },
        )
        result = cspine("check", "--config", path)
    assert result.exit_code == 1
    lines = {line[8:].split("  ")[0]: line for line in result.stdout.splitlines()}
    failed = {name for name, line in lines.items() if line.startswith("failed")}
    assert failed == {"port", "disk", "database", "model", "destination pacs", "destination out"}
    assert lines["configuration"].startswith("ok")
    assert lines["destination fine"].startswith("ok")
    assert "Address already in use; another program has that port" in lines["port"]
    assert "no-bundle" in lines["model"]
    assert "cannot be reached" in lines["destination pacs"]


def test_check_of_a_node_that_runs_finds_its_ports_in_use_and_names_a_bad_key_of_the_http_side(
    cspine: Cspine, tmp_path: Path, untrained_bundle: Path
) -> None:
    (tmp_path / "data").mkdir()
    with (
        socket.create_server(("127.0.0.1", 0)) as in_use,
        socket.create_server(("127.0.0.1", 0)) as web_in_use,
        (tmp_path / "data" / "lock").open("wb") as lock,
    ):
        path = write_config(
            tmp_path,
            data_dir=str(tmp_path / "data"),
            receive={"port": in_use.getsockname()[1]},
            web={"enabled": True, "port": web_in_use.getsockname()[1], "tls": {"certificate": "a.pem", "key": "a.key"}},
            analyse={"bundle": str(untrained_bundle)},
            deliver={"destinations": []},
        )
        before = cspine("check", "--config", path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = cspine("check", "--config", path)
    for result, marks in ((before, ("failed", "failed", "failed")), (running, ("ok", "ok", "failed"))):
        lines = {line[8:].split("  ")[0]: line for line in result.stdout.splitlines()}
        assert tuple(lines[name].split()[0] for name in ("port", "web port", "web.tls")) == marks
        assert f"{tmp_path / 'a.pem'} cannot be read: No such file" in lines["web.tls"]


def test_check_asks_all_peers_and_says_which_secrets_cannot_be_read(
    cspine: Cspine, tmp_path: Path, untrained_bundle: Path, free_port: Callable[[], int]
) -> None:
    ae = AE(ae_title="PACS")
    ae.add_supported_context(Verification)
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    echo_only = AE(ae_title="PACS")
    echo_only.add_supported_context(Verification)
    servers = [
        one.start_server(("127.0.0.1", free_port()), block=False, evt_handlers=[(evt.EVT_C_FIND, answer)])
        for one, answer in (
            (ae, lambda _: [(0x0000, None)]),
            (echo_only, None),
            (ae, lambda event: event.assoc.abort()),
        )
    ]
    asked, without_find, aborting = (
        {"host": "127.0.0.1", "port": server.socket.getsockname()[1], "ae_title": "PACS"} for server in servers
    )
    gone = {"name": "gone", "host": "127.0.0.1", "port": free_port(), "ae_title": "GONE"}
    hook = {"type": "webhook", "url": "http://127.0.0.1:9/hook"}
    path = write_config(
        tmp_path,
        analyse={"bundle": str(untrained_bundle)},
        complete={
            "sources": [
                {"name": "asked", "sends_as": "CT1", **asked},
                {"name": "shy", "sends_as": "CT2", **without_find},
                {"name": "stranger", "sends_as": "CT3", **aborting},
            ]
        },
        retrieve={"peers": [{"name": "reader", **without_find}]},
        commitment={"peers": [gone]},
        deliver={"destinations": []},
        notify={
            "targets": [
                {"name": "chat", **hook},
                {"name": "signed", "secret_file": str(tmp_path / "none"), **hook},
                {"name": "ris", "type": "hl7", "host": "127.0.0.1", "ca_file": str(path_of_text(tmp_path))},
            ]
        },
    )
    try:
        result = cspine("check", "--config", path)
    finally:
        for server in servers:
            server.shutdown()
    lines = {line[8:].split("  ")[0]: line for line in result.stdout.splitlines()}
    assert result.exit_code == 1
    assert {name for name, line in lines.items() if line.startswith("failed")} == {
        "complete source shy",
        "complete source stranger",
        "commitment peer gone",
        "target signed",
        "target ris",
    }
    assert "answers C-ECHO and C-FIND" in lines["complete source asked"]
    assert "answers C-ECHO" in lines["retrieve peer reader"]
    for name in ("shy", "stranger"):
        assert "does not let CSPINE ask by C-FIND" in lines[f"complete source {name}"]
    assert "cannot be reached" in lines["commitment peer gone"]
    assert "`cspine notifications test chat`" in lines["target chat"]
    assert str(tmp_path / "none") in lines["target signed"]
    assert "holds no certificates in PEM" in lines["target ris"]


def path_of_text(folder: Path) -> Path:
    path = folder / "no.pem"
    path.write_text("no certificate", encoding="utf-8")
    return path


def test_check_of_a_device_that_is_not_there_is_a_failed_check(
    cspine: Cspine, tmp_path: Path, untrained_bundle: Path
) -> None:
    analyse = {"bundle": str(untrained_bundle), "device": "cuda:63"}
    path = write_config(tmp_path, analyse=analyse, deliver={"destinations": []})
    result = cspine("check", "--config", path)
    assert result.exit_code == 1
    assert any(line.startswith("failed") and "cuda:63" in line for line in result.stdout.splitlines())


def test_check_says_how_much_a_folder_holds_that_shares_the_disk_with_the_data(
    cspine: Cspine, tmp_path: Path, untrained_bundle: Path
) -> None:
    results = tmp_path / "data" / "results"
    (results / "1.2").mkdir(parents=True)
    (results / "1.2" / "report.sr.dcm").write_bytes(bytes(3_000_000))
    folder = {"name": "results", "type": "folder", "path": str(results)}
    path = write_config(tmp_path, analyse={"bundle": str(untrained_bundle)}, deliver={"destinations": [folder]})
    assert (
        "3 MB on the disk of the data folder, which retention never removes" in cspine("check", "--config", path).stdout
    )


# ---- what is not there, or cannot be read ----


@pytest.mark.parametrize(
    "command",
    [
        ["retry", "1"],
        ["delete", "1", "--yes"],
        ["deliveries", "retry", "1"],
        ["deliveries", "give-up", "1"],
        ["notifications", "retry", "1"],
    ],
)
def test_what_acts_on_something_fails_with_nothing_received_yet(cspine: Cspine, command: list[str]) -> None:
    result = cspine(*command)
    assert result.exit_code == 1
    assert one_sentence(result.stderr).startswith("Nothing has been received yet")


@pytest.mark.parametrize(
    "command",
    [
        ["retry", "999"],
        ["deliveries", "retry", "999"],
        ["deliveries", "give-up", "999"],
        ["sources", "retry", "9.9.9"],
        ["token", "remove", "nobody"],
    ],
)
def test_what_finds_nothing_to_act_on_fails(cspine: Cspine, tmp_path: Path, command: list[str]) -> None:
    Index(tmp_path / "data").close()
    archive = {"name": "old", "url": "http://127.0.0.1:9"}
    result = cspine(*command, "--config", write_config(tmp_path, sources={"orthanc": [archive]}))
    assert result.exit_code == 1
    assert command[-1] in one_sentence(result.stderr)


@pytest.mark.parametrize(
    "command", [["send", "--to", "h:104", "--aet", "X"], ["rules", "test"], ["analyze", "--out", "o"]]
)
def test_a_file_that_cannot_be_read_is_named(
    cspine: Cspine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    (tmp_path / "series").mkdir()
    secret = tmp_path / "series" / "1.dcm"
    secret.touch()

    def refuse(*_: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", str(secret))

    with monkeypatch.context() as patch:
        patch.setattr("node.send._is_dicom", refuse)
        result = cspine(*command, tmp_path / "series")
    assert result.exit_code in (2, 3)
    assert one_sentence(result.stderr) == f"{secret} cannot be read: Permission denied."


# ---- token ----


def test_the_file_of_tokens_is_told_of_in_words(cspine: Cspine, tmp_path: Path) -> None:
    assert "There is no token" in cspine("token", "list").stderr
    assert cspine("token", "make", " ").exit_code == 2
    data = tmp_path / "data"
    data.mkdir()
    (data / "web-tokens.json").write_text("[{", encoding="utf-8")
    for command in (["list"], ["make", "viewer"], ["remove", "viewer"]):
        result = cspine("token", *command)
        assert result.exit_code == 1
        assert (
            one_sentence(result.stderr) == f"{data / 'web-tokens.json'} is damaged; remove it and make the tokens anew."
        )
    shutil.rmtree(data)
    data.write_text("in the way", encoding="utf-8")
    result = cspine("token", "make", "viewer")
    assert result.exit_code == 1
    assert "Not a directory" in one_sentence(result.stderr)


# ---- deliveries ----


def test_a_destination_that_there_is_not_is_a_mistyped_one(cspine: Cspine, tmp_path: Path) -> None:
    Index(tmp_path / "data").close()
    for command in (["list"], ["retry", "--all-failed"], ["give-up", "--all-unsettled"]):
        result = cspine("deliveries", *command, "--destination", "resluts")
        assert result.exit_code == 2
        assert one_sentence(result.stderr) == "There is no destination 'resluts'; there are: results."
    assert cspine("deliveries", "list", "--destination", "results").exit_code == 0
