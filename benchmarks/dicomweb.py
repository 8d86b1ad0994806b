"""The node's DICOMweb beside Orthanc's plugin, in one run on loopback: store, retrieve and find.

    make dicomweb-bench            (or: .venv/bin/python -m benchmarks.dicomweb --repeats 5)

STOW-RS and WADO-RS of one Series of 300 x 512 x 512 x 16 bit, in turns, WADO-RS right after it was stored and 1.5 s
later, when the node has it in its catalog; QIDO-RS on 100,000 Instances of ours.
Orthanc syncs its storage as we do (SyncStorageArea). Prints medians and ratios; the machine's other load is in them.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import requests
from pydicom.uid import generate_uid
from sqlalchemy import insert

from model import Grid
from model.phantom import Phantom, write_series
from node.config import Config, ReceiveConfig
from node.index import Index
from node.web import catalog as cat
from node.web import server
from node.web.levels import Level
from node.web.settings import WebConfig
from tests.ports import free_port

NUM_SLICES, NUM_PIXELS = 300, 512
BUFFER_BYTES = 2**20
INSTANCES = 'multipart/related; type="application/dicom"; transfer-syntax=*'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers = {"node": start_node(folder), "orthanc": start_orthanc(folder)}
        try:
            whats = ("STOW-RS", "WADO-RS right after", "WADO-RS later")
            taken_s: dict[str, dict[str, list[float]]] = {what: {peer: [] for peer in peers} for what in whats}
            for repeat in range(repeats + 1):  # the first warms up
                paths = make_series(folder / f"in-{repeat}", seed=repeat)
                body, boundary = make_body(paths)
                seconds = {peer: [store(url, body, boundary), retrieve(url, paths)] for peer, (url, _) in peers.items()}
                time.sleep(1.5)
                for peer, (url, _) in peers.items():
                    seconds[peer].append(retrieve(url, paths))
                if repeat:
                    for peer in peers:
                        for what, each in zip(whats, seconds[peer], strict=True):
                            taken_s[what][peer].append(each)
            for what in whats:
                report(what, taken_s[what], len(body))
        finally:
            for _, stop in peers.values():
                stop()
        measure_queries(folder / "many")


def report(what: str, seconds: dict[str, list[float]], num_bytes: int) -> None:
    medians = {peer: statistics.median(values) for peer, values in seconds.items()}
    for peer, values in seconds.items():
        mb_per_s = num_bytes / medians[peer] / 1e6
        print(
            f"{what:<20} {peer:<8} median {medians[peer]:.2f} s ({min(values):.2f} to {max(values):.2f})  "
            f"{NUM_SLICES / medians[peer]:.0f} images/s  {mb_per_s:.0f} MB/s"
        )
    print(f"{what}: the node is {medians['orthanc'] / medians['node']:.1f} times as fast\n")


def make_series(folder: Path, seed: int) -> list[Path]:
    """A Series of noise that no other seed has, in a folder of its own.

    None is deleted during the run: for some seconds an ext4 without a journal makes files more slowly then.
    """
    rng = np.random.default_rng(seed)
    shape = (NUM_SLICES, NUM_PIXELS, NUM_PIXELS)
    hu = rng.integers(-1000, 1500, shape, np.int16)
    affine = np.array([[0, 0, 0.5, 0], [0, 0.5, 0, 0], [0.8, 0, 0, 0], [0, 0, 0, 1.0]])
    empty = np.zeros(shape, np.uint8)
    phantom = Phantom(voxels_hu=hu, grid=Grid(shape=shape, affine=affine), vertebrae=empty, fractures=empty)
    return write_series(phantom, folder, seed=seed, study_instance_uid=generate_uid())


def make_body(paths: list[Path]) -> tuple[bytes, str]:
    head = b"\r\n--bench\r\nContent-Type: application/dicom\r\n\r\n"
    return b"".join(head + path.read_bytes() for path in paths) + b"\r\n--bench--\r\n", "bench"


def store(url: str, body: bytes, boundary: str) -> float:
    host = url.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=300)
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    started = time.perf_counter()
    connection.request("POST", "/dicom-web/studies", body, headers)
    answer = connection.getresponse()
    text = answer.read()
    seconds = time.perf_counter() - started
    if answer.status != 200 or len(json.loads(text)["00081199"]["Value"]) != NUM_SLICES:
        sys.exit(f"{url} answered {answer.status}: {text[:300]!r}")
    return seconds


def retrieve(url: str, paths: list[Path]) -> float:
    from pydicom import dcmread

    ds = dcmread(paths[0], stop_before_pixels=True)
    address = f"{url}/studies/{ds.StudyInstanceUID}/series/{ds.SeriesInstanceUID}"
    host = url.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=300)
    buffer, num_bytes = bytearray(BUFFER_BYTES), 0
    started = time.perf_counter()
    connection.request("GET", address.partition(host)[2], headers={"Accept": INSTANCES})
    answer = connection.getresponse()
    while num_read := answer.readinto(buffer):  # `requests` takes 10 KiB at a time, and longer than either server
        num_bytes += num_read
    seconds = time.perf_counter() - started
    if answer.status != 200 or num_bytes < sum(path.stat().st_size for path in paths):
        sys.exit(f"{address} answered {answer.status}, {num_bytes} bytes")
    return seconds


def start_node(folder: Path) -> tuple[str, Callable[[], None]]:
    port = free_port()
    config = Config(
        data_dir=folder / "node", receive=ReceiveConfig(min_free_disk_mb=0), web=WebConfig(enabled=True, port=port)
    )
    Index(config.data_dir).close()
    context = multiprocessing.get_context("spawn")
    ready, far_end = context.Pipe(duplex=False)
    process = context.Process(target=server.run, args=(config, "bench", far_end))
    process.start()
    if problem := ready.recv():
        sys.exit(problem)

    def stop() -> None:
        process.kill()
        process.join()

    return f"http://127.0.0.1:{port}/dicom-web", stop


def start_orthanc(folder: Path) -> tuple[str, Callable[[], None]]:
    port = free_port()
    config = {
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "SyncStorageArea": True,
        "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"],
    }
    path = folder / "orthanc.json"
    path.write_text(json.dumps(config))
    environment = os.environ | {"TCP_NODELAY": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(["/usr/sbin/Orthanc", str(path)], stdout=quiet, stderr=quiet, env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(100):
        try:
            requests.get(f"{url}/system", timeout=5)
            break
        except requests.ConnectionError:
            time.sleep(0.1)

    def stop() -> None:
        process.kill()
        process.wait()

    return f"{url}/dicom-web", stop


def measure_queries(folder: Path) -> None:
    """QIDO-RS on 100,000 Instances in 334 Series of 200 Studies, over HTTP."""
    index = Index(folder)
    catalog = cat.Catalog(index)
    fill(catalog, num_series=334, num_slices=300)
    catalog.close()
    port = free_port()
    config = Config(data_dir=folder, receive=ReceiveConfig(min_free_disk_mb=0), web=WebConfig(enabled=True, port=port))
    context = multiprocessing.get_context("spawn")
    ready, far_end = context.Pipe(duplex=False)
    process = context.Process(target=serve_as_is, args=(config, far_end))
    process.start()
    ready.recv()
    url = f"http://127.0.0.1:{port}/dicom-web"
    queries = (
        "/studies?limit=100",
        "/studies?PatientID=P-77",
        "/studies?PatientName=PAT*&StudyDate=20260101-20260601&limit=50",
        "/series?Modality=CT&limit=100",
        "/studies/1.2.77/series",
        "/studies/1.2.77/series/1.2.3.77/instances",
        "/instances?SOPInstanceUID=1.2.3.77.150",
    )
    session = requests.Session()
    for query in queries:
        times_ms = []
        for _ in range(21):
            started = time.perf_counter()
            answer = session.get(url + query, timeout=60)
            times_ms.append(1000 * (time.perf_counter() - started))
            assert answer.ok, answer.text
            assert answer.json(), query
        print(f"QIDO-RS  {statistics.median(times_ms):6.1f} ms  (max {max(times_ms):.1f})  {query}")
    process.kill()
    process.join()
    index.close()


def serve_as_is(config: Config, ready: "multiprocessing.connection.Connection") -> None:
    """Serves a catalog that no Instances are behind."""
    cat.Catalog.refresh = lambda self: None  # type: ignore[method-assign]
    server.run(config, "bench", ready)


def fill(catalog: cat.Catalog, *, num_series: int, num_slices: int) -> None:
    def row(level: Level, values: dict[str, str], **more: object) -> dict[str, object]:
        from pydicom.datadict import dictionary_VR
        from pydicom.tag import Tag

        attributes = {f"{Tag(key):08X}": {"vr": dictionary_VR(key), "Value": [value]} for key, value in values.items()}
        return dict.fromkeys(level.keywords, "") | values | {"attributes": attributes} | more

    with catalog._engine.begin() as connection:
        for number in range(num_series):
            study = f"1.2.{number % 200}"
            patient = {"PatientID": f"P-{number % 200}", "PatientName": f"PAT{number % 200}"}
            if number < 200:
                date = f"2026{1 + number % 12:02d}{1 + number % 28:02d}"
                values = {"StudyInstanceUID": study, "StudyDate": date, **patient}
                connection.execute(insert(cat._studies), [row(Level.STUDY, values)])
            series = f"1.2.3.{number}"
            values = {"SeriesInstanceUID": series, "Modality": "CT"}
            connection.execute(insert(cat._series), [row(Level.SERIES, values, StudyInstanceUID=study)])
            connection.execute(
                insert(cat._instances),
                [
                    row(
                        Level.INSTANCE,
                        {"SOPInstanceUID": f"{series}.{slice_}", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"},
                        SeriesInstanceUID=series,
                        case_series=series,
                        path=f"/{series}/{slice_}",
                        transfer_syntax="1.2.840.10008.1.2.1",
                        order=slice_,
                    )
                    for slice_ in range(num_slices)
                ],
            )


if __name__ == "__main__":
    main()
