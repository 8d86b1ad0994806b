"""The real node as a process of its own, for tests: `cspine serve` on free ports in a temporary folder."""

import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import SecretStr

from model.phantom import Anatomy, Fracture, default_grid, render, write_series
from node.case import Case, CaseState, Delivery, DeliveryState
from node.config import DicomDestination
from node.index import Index
from tests.ports import free_port
from tests.waiting import WAIT_S

SETTLED = {CaseState.DONE, CaseState.SKIPPED, CaseState.REFUSED, CaseState.FAILED}


class RunningNode:
    """Runs from construction to `stop`. Keyword arguments are sections of the configuration."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.data_dir = folder / "data"
        self.results_dir = folder / "results"
        self.config_path = folder / "config.yaml"
        self.port = free_port()
        self.destination = DicomDestination(
            type="dicom", name="node", host="127.0.0.1", port=self.port, ae_title="CSPINE"
        )
        self.pids: set[int] = set()
        self._log_path = folder / "node.log"
        config: dict[str, Any] = {
            "data_dir": str(self.data_dir),
            "deliver": {"destinations": [{"type": "folder", "name": "results", "path": str(self.results_dir)}]},
            **sections,
        }
        config["receive"] = {"port": self.port, "min_free_disk_mb": 0, **sections.get("receive", {})}
        self._database = SecretStr(config["database"]) if "database" in config else None
        self.config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.start()

    def start(self) -> None:
        """Starts it (again) and waits until it takes associations."""
        with self._log_path.open("a") as log:
            command = [sys.executable, "-m", "node", "serve", "--config", str(self.config_path)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + WAIT_S
        while not self._listens():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def stop(self) -> float:
        """Ends it by SIGTERM as a service manager would; seconds that took."""
        self._note_pids()
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
        return time.monotonic() - started

    def kill(self) -> None:
        """`kill -9` of the main process."""
        self.process.send_signal(signal.SIGSTOP)  # or it may start another process unnoticed
        self._note_pids()
        self.process.kill()
        self.process.wait()

    def wait_until_gone(self) -> None:
        """Waits until none of its processes is left: none may outlive it."""
        deadline = time.monotonic() + WAIT_S
        while left := [pid for pid in self.pids if psutil.pid_exists(pid)]:
            assert time.monotonic() < deadline, f"{left} outlived the node"
            time.sleep(0.1)

    def find(self, role: str) -> psutil.Process | None:
        """A "receiver" (it listens) or the "worker" process; None while there is none."""
        return next(iter(self.find_all(role)), None)

    def find_all(self, role: str) -> list[psutil.Process]:
        """Every process of that role."""
        self._note_pids()
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if "resource_tracker" in " ".join(child.cmdline()):
                    continue
                listens = any(connection.status == psutil.CONN_LISTEN for connection in child.net_connections())
            except psutil.NoSuchProcess:
                continue
            if listens == (role == "receiver"):
                found.append(child)
        return found

    def cases(self) -> list[Case]:
        """What is in its database."""
        index = Index(self.data_dir, self._database)
        try:
            return index.cases()
        finally:
            index.close()

    def open_deliveries(self) -> list[Delivery]:
        """What is still to reach its destination."""
        index = Index(self.data_dir, self._database)
        try:
            return index.deliveries(states=[DeliveryState.PENDING, DeliveryState.VERIFYING])
        finally:
            index.close()

    def wait_until_settled(self, num_cases: int = 1, timeout_s: float = 120.0) -> "Counter[CaseState]":
        """How many cases ended in which state, once that many are here and none has anything left to do."""
        deadline = time.monotonic() + timeout_s
        while True:
            cases = self.cases()
            # A refused case is that before the report that says so has been delivered.
            if len(cases) >= num_cases and all(case.state in SETTLED for case in cases) and not self.open_deliveries():
                return Counter(case.state for case in cases)
            assert time.monotonic() < deadline, f"{cases}\n{self.open_deliveries()}\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        """What it said so far."""
        return self._log_path.read_text()

    def _note_pids(self) -> None:
        self.pids |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def phantom_series(folder: Path, *, seed: int = 0, fractures: tuple[Fracture, ...] = (), **uids: Any) -> list[Path]:
    """A small phantom Series on disk: about 85 slices of 200 x 215 pixels."""
    anatomy = Anatomy.random(seed, fractures)
    grid = default_grid(anatomy, (2.0, 1.2, 1.2))
    return write_series(render(anatomy, grid, seed=seed), folder, seed=seed, **uids)
