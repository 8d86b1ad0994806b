"""Fixtures that tests of the node share: a port, a configuration, an index in a folder of its own, a model bundle."""

import gc
import socketserver
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from node.config import (
    AnalyseConfig,
    CommitmentConfig,
    CompleteConfig,
    Config,
    DeliverConfig,
    ReceiveConfig,
    RetrieveConfig,
)
from node.index import Index
from tests.ports import free_port
from tests.untrained import write_untrained_bundle

if TYPE_CHECKING:
    from click.testing import Result

    from tests.postgresql_server import PostgreSQLServer


@pytest.fixture(scope="session", autouse=True)
def _servers_stop_quickly() -> Iterator[None]:
    """socketserver looks twice a second whether it is to stop; the tests start and stop many servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.02,))
        yield


@pytest.fixture(scope="module", autouse=True)
def _leaves_nothing_to_later_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the tests of a file may leave to the garbage collector is collected while they still may.

    Else it warns, which is an error, in whatever test happens to run when it is collected.
    """
    yield
    if next(request.node.iter_markers("filterwarnings"), None):
        gc.collect()


@pytest.fixture(name="free_port")
def _free_port() -> Callable[[], int]:
    """Gives a TCP port on loopback that nobody listens on, another one at each call."""
    return free_port


@pytest.fixture
def make_config(tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., Config]:
    """Makes a configuration on loopback and `tmp_path / "data"`; keyword arguments are sections, each a dict."""

    def make(**sections: dict[str, Any]) -> Config:
        receive = {"port": free_port(), "min_free_disk_mb": 0, "network_timeout_s": 10} | sections.get("receive", {})
        return Config(
            data_dir=tmp_path / "data",
            receive=ReceiveConfig(**receive),
            commitment=CommitmentConfig(**sections.get("commitment", {})),
            retrieve=RetrieveConfig(**sections.get("retrieve", {})),
            complete=CompleteConfig(**sections.get("complete", {})),
            analyse=AnalyseConfig(**({"threads": 1} | sections.get("analyse", {}))),
            deliver=DeliverConfig(**({"destinations": ()} | sections.get("deliver", {}))),
        )

    return make


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """The index of an empty data folder, `tmp_path / "data"`."""
    opened = Index(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def postgresql() -> Iterator["PostgreSQLServer"]:
    """A PostgreSQL server; skips where there is none."""
    from tests.postgresql_server import PostgreSQLServer

    server = PostgreSQLServer()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> SecretStr | None:
    """An empty database: the test runs once with each kind. As a configuration names it."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgresql").make_database()


@pytest.fixture
def either_index(tmp_path: Path, database: SecretStr | None) -> Iterator[Index]:
    """As `index`, once in each kind of database."""
    opened = Index(tmp_path / "data", database)
    yield opened
    opened.close()


@pytest.fixture
def cspine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., "Result"]:
    """Runs a command in an empty folder; nothing but SystemExit may come out of it."""
    from click.testing import CliRunner

    from node.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("node.process.set_up_logging", lambda level: None)  # pytest's own stays

    def run(*arguments: str | Path) -> "Result":
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return result

    return run


@pytest.fixture(scope="session")
def untrained_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of small networks that never saw a neck: it loads and runs in no time, and finds nothing."""
    return write_untrained_bundle(tmp_path_factory.mktemp("bundle"))
