"""Turnaround: from the last acknowledged Instance of a Series to its SEG and SR stored in an archive, by stage.

    make turnaround            # 300 x 512 x 512 at 0.8 x 0.5 x 0.5 mm, five repeats

Runs the real node (`cspine serve`, embedded defaults) as a process of its own, sends a phantom Series to it by C-STORE
and lets it deliver by C-STORE to an archive in this process. Each repeat is a new Series. Memory is the sum of the
proportional set sizes of all processes of the node, sampled five times a second, so shared pages count once.
"""

import argparse
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml
from pydicom import dcmread
from pydicom.uid import generate_uid

from model.phantom import Anatomy, Fracture, default_grid, render, write_series
from node.archive import Archive
from node.config import DicomDestination
from node.send import send_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cspine-turnaround-") as name:
        run(Path(name), arguments.slices, arguments.repeats)


def run(folder: Path, num_slices: int, repeats: int) -> None:
    """Measures and prints."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"Making a phantom Series of {num_slices} x 512 x 512 ...", flush=True)
    anatomy = Anatomy.random(7, (Fracture(level="C5", kind="body", width_mm=2.0),))
    phantom = render(anatomy, default_grid(anatomy, (0.8, 0.5, 0.5), shape=(num_slices, 512, 512)))
    series = write_series(phantom, folder / "series")
    port, archive_port = _free_port(), _free_port()
    archive = Archive(folder / "archive", archive_port)
    config = {
        "data_dir": str(folder / "data"),
        "receive": {"port": port, "min_free_disk_mb": 0},
        "deliver": {"destinations": [archive.destination.model_dump(mode="json", exclude_none=True)]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    log_path = folder / "node.log"
    with log_path.open("w") as log:
        command = [sys.executable, "-m", "node", "serve", "--config", str(folder / "config.yaml")]
        node = subprocess.Popen(command, stdout=log, stderr=log)
    memory = _MemoryWatch(node.pid)
    try:
        _wait_until_listening(port, node)
        time.sleep(8)  # the worker loads the model; a node that runs has it loaded
        node_at = DicomDestination(type="dicom", name="node", host="127.0.0.1", port=port, ae_title="CSPINE")
        rows = [_measure(folder, series, number, node_at, archive) for number in range(repeats + 1)][1:]
    finally:
        node.terminate()
        node.wait(15)
        archive.stop()
        memory.stop()
        if "ERROR" in log_path.read_text():
            print(log_path.read_text())
    print(f"\n{'stage':<28}{'median s':>9}{'min':>8}{'max':>8}   ({repeats} repeats after one warm-up)")
    for stage in rows[0]:
        values = [row[stage] for row in rows]
        print(f"{stage:<28}{statistics.median(values):>9.2f}{min(values):>8.2f}{max(values):>8.2f}")
    print(f"\npeak memory of all processes of the node: {memory.peak_bytes / 2**20:.0f} MiB")


def _measure(
    folder: Path, series: list[Path], number: int, node_at: DicomDestination, archive: Archive
) -> dict[str, float]:
    """Sends the Series under new UIDs; seconds of each stage."""
    copies = _with_new_uids(series, folder / f"copy{number}")
    before = len(archive.files)
    started = time.time()
    refused = send_files(copies, node_at, calling_ae_title="BENCH")
    acknowledged = time.time()
    assert not refused, refused[0]
    if not archive.wait_for(lambda paths: len(paths) >= before + 3, 120):
        raise SystemExit("The results did not arrive within 120 s.")
    stored = archive.files[-1][1]
    findings = next(
        json.loads(path.read_text())
        for path in sorted((folder / "data" / "cases").glob("*/*/findings.json"), key=lambda p: p.stat().st_mtime)[::-1]
    )
    shutil.rmtree(folder / f"copy{number}")
    stages = findings["timings_s"]
    return {
        "send (before the clock)": acknowledged - started,
        **{name: stages[name] for name in ("read", "segment", "classify", "encode")},
        "wait, write and deliver": stored - acknowledged - stages["total"],
        "acknowledged to stored": stored - acknowledged,
    }


def _with_new_uids(series: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    study_uid, series_uid, copies = generate_uid(), generate_uid(), []
    for path in series:
        ds = dcmread(path)
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study_uid, series_uid, generate_uid()
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        copies.append(folder / path.name)
        ds.save_as(copies[-1])
    return copies


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_listening(port: int, node: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if node.poll() is not None:
            raise SystemExit("The node ended while starting.")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("The node does not listen after 30 s.")


class _MemoryWatch:
    """Highest sum of the proportional set sizes of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._root = psutil.Process(pid)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(0.2):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
                total = sum(_pss_bytes(process.pid) for process in processes)
            except psutil.NoSuchProcess:
                continue
            self.peak_bytes = max(self.peak_bytes, total)


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


if __name__ == "__main__":
    main()
