"""Ingest: how fast Instances are taken, beside the C++ peers, on the same machine at the same time.

    make ingest                       # 300 x 512 x 512 x 16 bit, 1, 4 and 16 senders, three repeats

The sender is dcmtk's `storescu`, one process and one association a Series. The receivers are the real node
(`cspine serve`; success means fsynced file and committed index row), Orthanc with SyncStorageArea, and dcmtk's
`storescp --fork`, which writes without fsync. They take turns within every repeat, so that a machine that is busy with
something else slows all of them; the ratios of medians are what to read. `--receivers floor` is a script that does only
what must be done (`ingest_floor.py`): what Python can do here is at most that. `--beside` adds other checkouts of the
node, to compare versions in one run. Every repeat has new UIDs, in the same files: when ext4 without a journal makes a
file it walks past every inode deleted a moment ago. The node analyses nothing: the rule on slices refuses every Series.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

_ENVIRONMENT = os.environ | {"TCP_NODELAY": "1"}  # else every image waits for a delayed acknowledgement
_RECEIVERS = ("node", "orthanc", "storescp")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One burst. num_failed: senders that did not get everything across."""

    images_per_s: float
    mb_per_s: float
    cpu_ms_per_image: float
    num_failed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--receivers", nargs="+", default=_RECEIVERS, choices=_START)
    parser.add_argument("--processes", type=int, help="receive.processes of the node; its default if not given")
    parser.add_argument("--beside", type=Path, nargs="+", default=(), help="other checkouts of the node to measure too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cspine-ingest-") as name:
        run(Path(name), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{arguments.slices} x 512 x 512 x 16 bit a sender, {arguments.repeats} repeats, receivers taking turns")
    print(
        f"\n{'senders':>7} {'receiver':<10}{'images/s':>9}{'MB/s':>7}{'CPU ms/image':>14}{'to it':>7}  slowest..fastest"
    )
    pixels = np.random.default_rng(4).integers(0, 4096, (16, 512 * 512), np.uint16)
    with _receivers(folder, arguments) as receivers:
        for num_senders in arguments.senders:
            rows: dict[str, list[Measured]] = {receiver.name: [] for receiver in receivers}
            for repeat in range(arguments.repeats + 1):  # the first is a warm-up
                for receiver in receivers:
                    series = [
                        _make_series(folder / "sent" / str(i), arguments.slices, pixels) for i in range(num_senders)
                    ]
                    measured = _burst(receiver, series, arguments.slices)
                    if repeat:
                        rows[receiver.name].append(measured)
            _print(num_senders, rows)
        print("\npeak resident memory, receiving processes only / with all others of the receiver")
        for receiver in receivers:
            print(f"  {receiver.name:<10}{receiver.peak_receiving_mb:>6.0f} / {receiver.peak_mb:.0f} MiB")


def _print(num_senders: int, rows: dict[str, list[Measured]]) -> None:
    medians = {name: statistics.median(row.images_per_s for row in measured) for name, measured in rows.items()}
    for name, measured in rows.items():
        rates = sorted(row.images_per_s for row in measured)
        print(
            f"{num_senders:>7} {name:<10}{medians[name]:>9.0f}"
            f"{statistics.median(row.mb_per_s for row in measured):>7.0f}"
            f"{statistics.median(row.cpu_ms_per_image for row in measured):>14.2f}"
            f"{medians['node'] / medians[name] if 'node' in medians else float('nan'):>6.2f}x"
            f"  {rates[0]:.0f}..{rates[-1]:.0f}",
            flush=True,
        )
        if num_failed := sum(row.num_failed for row in measured):
            print(f"        {num_failed} senders of {name} were refused or broken off")


# ---- receivers ----


class Receiver:
    """A receiver that runs, and the memory and CPU time that it takes."""

    def __init__(self, name: str, port: int, command: list[str], stored: Path, *, cwd: Path | None = None) -> None:
        self.name, self.port, self.stored = name, port, stored
        self.peak_mb = self.peak_receiving_mb = 0.0
        stored.mkdir(parents=True, exist_ok=True)
        self._log = (stored.parent / f"{name}.log").open("w")
        environment = _ENVIRONMENT if cwd is None else _ENVIRONMENT | {"PYTHONPATH": str(cwd)}
        self._process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=self._log, stderr=self._log)
        self._stopping = threading.Event()
        self._listens: dict[int, bool] = {}  # by process
        self._wait_until_listening()
        while name.startswith("node") and "is ready" not in Path(self._log.name).read_text():
            time.sleep(0.5)  # its worker loads the model
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        """Ends it; its memory has been noted."""
        self._stopping.set()
        self._thread.join()
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def cpu_s(self) -> float:
        """CPU seconds so far, of processes that ended too (`storescp --fork` has one for each association)."""
        parent = psutil.Process(self._process.pid)
        times = parent.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in parent.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def _watch(self) -> None:
        while not self._stopping.wait(0.5):
            everything, receiving = 0, 0
            parent = psutil.Process(self._process.pid)
            for process in (parent, *parent.children(recursive=True)):
                try:
                    rss = process.memory_info().rss
                    if process.pid not in self._listens:  # once: it was 15 % of a core to ask each time
                        connections = process.net_connections("tcp")
                        self._listens[process.pid] = any(c.status == psutil.CONN_LISTEN for c in connections)
                except psutil.NoSuchProcess:
                    continue
                everything += rss
                receiving += rss if self._listens[process.pid] else 0
            self.peak_mb = max(self.peak_mb, everything / 2**20)
            self.peak_receiving_mb = max(self.peak_receiving_mb, receiving / 2**20)

    def _wait_until_listening(self) -> None:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(f"{self.name} does not run; {self._log.name} says:\n{Path(self._log.name).read_text()}")


@contextmanager
def _receivers(folder: Path, arguments: argparse.Namespace) -> Iterator[list[Receiver]]:
    running: list[Receiver] = []
    try:
        for name in arguments.receivers:
            running.append(_START[name](folder, arguments))
        for number, checkout in enumerate(arguments.beside, 2):
            running.append(_start_node(folder, arguments, f"node-{number}", checkout))
        yield running
    finally:
        for receiver in running:
            receiver.stop()


def _start_node(
    folder: Path, arguments: argparse.Namespace, name: str = "node", checkout: Path | None = None
) -> Receiver:
    port = _free_port()
    receive = {"port": port, "min_free_disk_mb": 0}
    if arguments.processes:
        receive["processes"] = arguments.processes
    config = {
        "data_dir": str(folder / name / "data"),
        "receive": receive,
        "complete": {"min_slices": 100_000},  # nothing is analysed
        "deliver": {"destinations": [], "report_not_analysed": False},  # or a worker writes reports in later bursts
    }
    config_path = folder / f"{name}.yaml"
    config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "node", "serve", "--config", str(config_path)]
    return Receiver(name, port, command, folder / name / "data", cwd=checkout)


def _start_orthanc(folder: Path, _: argparse.Namespace) -> Receiver:
    port = _free_port()
    config = {
        "Name": "ingest",
        "DicomAet": "ORTHANC",
        "DicomPort": port,
        "HttpPort": _free_port(),
        "RemoteAccessAllowed": False,
        "StorageDirectory": str(folder / "orthanc" / "storage"),
        "IndexDirectory": str(folder / "orthanc" / "storage"),
        "SyncStorageArea": True,
        "StorageCompression": False,
        "DicomAlwaysAllowStore": True,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(config), encoding="utf-8")
    executable = shutil.which("Orthanc", path=os.environ.get("PATH", "") + ":/usr/sbin") or "Orthanc"
    return Receiver("orthanc", port, [executable, str(folder / "orthanc.json")], folder / "orthanc" / "storage")


def _start_storescp(folder: Path, _: argparse.Namespace) -> Receiver:
    port, stored = _free_port(), folder / "storescp" / "stored"
    command = ["/usr/bin/storescp", "--fork", "--output-directory", str(stored), str(port)]
    return Receiver("storescp", port, command, stored)


def _start_floor(folder: Path, _: argparse.Namespace) -> Receiver:
    port, stored = _free_port(), folder / "floor" / "stored"
    command = [sys.executable, "-m", "benchmarks.ingest_floor", str(port), str(stored)]
    return Receiver("floor", port, command, stored, cwd=Path(__file__).parents[1])


_START = {"node": _start_node, "orthanc": _start_orthanc, "storescp": _start_storescp, "floor": _start_floor}


# ---- senders ----


def _burst(receiver: Receiver, series: list[Path], num_slices: int) -> Measured:
    """Sends every Series at the same moment and waits for all."""
    os.sync()  # what earlier bursts left to be written is not to slow this one
    cpu_s = receiver.cpu_s()
    started = time.perf_counter()
    senders = [
        subprocess.Popen(
            ["/usr/bin/storescu", "-aet", "BENCH", "-aec", "ANY", "+sd", "127.0.0.1", str(receiver.port), str(folder)],
            env=_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for folder in series
    ]
    num_failed = sum(sender.wait() != 0 for sender in senders)
    took_s = time.perf_counter() - started
    num_images = num_slices * len(series)
    num_bytes = sum(path.stat().st_size for folder in series for path in folder.iterdir())
    time.sleep(0.5)  # the children of `storescp --fork` end
    cpu_s = receiver.cpu_s() - cpu_s
    return Measured(
        images_per_s=num_images / took_s,
        mb_per_s=num_bytes / took_s / 1e6,
        cpu_ms_per_image=cpu_s / num_images * 1e3,
        num_failed=num_failed,
    )


_uid_number = iter(range(10**9, 10**10))


def _make_series(folder: Path, num_slices: int, pixels: np.ndarray) -> Path:
    """Writes a CT Series with UIDs of its own, by putting them into the bytes of a template; over an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: f"1.2.826.0.1.3680043.8.498.{number}{'0' * 20}" for number, name in enumerate(("7", "8", "9"), 7)}
    template = _template(*places.values())
    study, series = (_new_uid() for _ in range(2))
    for number in range(num_slices):
        encoded = template
        for place, uid in zip(places.values(), (study, series, _new_uid()), strict=True):
            encoded = encoded.replace(place.encode(), uid.encode())
        encoded = encoded.replace(b"-1000.25", f"{-100 - number * 0.5:8.2f}".encode())
        path = folder / f"{number:04d}.dcm"
        path.touch()
        with path.open("r+b") as file:
            file.write(encoded)
            file.write(pixels[number % len(pixels)])
    return folder


def _new_uid() -> str:
    """As long as the places in the template."""
    return f"1.2.826.0.1.3680043.8.498.{next(_uid_number)}{os.getpid():011d}"


def _template(study: str, series: str, instance: str) -> bytes:
    """A CT Instance as a scanner's, up to the bytes of its pixels."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = (
        CTImageStorage,
        instance,
        study,
        series,
    )
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20261125"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "120000"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "CT", "Bench", "Ingest"
    ds.StudyDescription, ds.SeriesDescription, ds.BodyPartExamined = "Neck", "C-Spine 0.5 bone", "CSPINE"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Bench^Ingest", "1", "", "O"
    ds.SliceThickness, ds.KVP, ds.ConvolutionKernel, ds.PatientPosition = "0.5", "120", "Br64", "HFS"
    ds.AccessionNumber, ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", "1", "1", "1"
    ds.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.6"
    ds.ImagePositionPatient, ds.ImageOrientationPatient = ["-100", "-100", "-1000.25"], [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", 512, 512
    ds.PixelSpacing, ds.BitsAllocated, ds.BitsStored, ds.HighBit = ["0.4", "0.4"], 16, 16, 15
    ds.PixelRepresentation, ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, "-1024", "1", "HU"
    ds.PixelData = bytes(512 * 512 * 2)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, instance
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with tempfile.TemporaryFile() as file:
        ds.save_as(file, enforce_file_format=True)
        file.seek(0)
        return file.read()[: -512 * 512 * 2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
