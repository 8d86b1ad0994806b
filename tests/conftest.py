"""Fixtures that tests of the node share: a free port, a data folder of its own, its configuration and its index."""

import socket
import socketserver
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.config import AnalyseConfig, CompleteConfig, Config, DeliverConfig, ReceiveConfig
from node.index import Index


@pytest.fixture(scope="session", autouse=True)
def _servers_stop_quickly() -> Iterator[None]:
    """socketserver looks twice a second whether it is to stop; the tests start and stop many servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.02,))
        yield


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives a TCP port on loopback that nothing listened on a moment ago, another one at each call."""
    given: set[int] = set()

    def find() -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port not in given:
                given.add(port)
                return port

    return find


@pytest.fixture
def make_config(tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., Config]:
    """Makes a configuration on loopback and `tmp_path / "data"`; keyword arguments are sections, each a dict."""

    def make(**sections: dict[str, Any]) -> Config:
        receive = {"port": free_port(), "min_free_disk_mb": 0, "network_timeout_s": 10} | sections.get("receive", {})
        return Config(
            data_dir=tmp_path / "data",
            receive=ReceiveConfig(**receive),
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
