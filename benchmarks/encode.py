"""Encoding: the Segmentation of a neck by this node and by highdicom alone, side by side, and all objects of a case.

    make encode-bench          # 300 x 512 x 512 with seven levels, seven rounds

Each round runs one after the other, so that whatever else the machine does falls on both; medians and the ratio of the
medians are printed. CPU seconds are of this process with all its threads. Peak memory is measured in a process of its
own for each, above what it holds before it encodes: the volume and the masks.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray

from model import (
    LEVELS,
    Analysis,
    Finding,
    Findings,
    LevelFinding,
    ModelInfo,
    PatientFinding,
    SliceWeight,
    Volume,
    read_series,
)
from model.phantom import Anatomy, Fracture, default_grid, render, write_series
from node.encode import NodeIdentity, encode_results
from node.encode.frames import marked_part
from node.encode.identity import ResultUids
from node.encode.maker import Maker
from node.encode.seg import VERTEBRA_SEGMENTS, VERTEBRAE, Mask, make_segmentation, plan, save
from node.encode.source import read_source
from node.profiles import PRESETS, Kind, Profile

MODEL = ModelInfo(name="benchmark", version="1", trained_on="Nothing.", operating_point=0.5)
NODE = NodeIdentity()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak_of:
        _measure_peak(arguments.case, arguments.peak_of)
        return
    with tempfile.TemporaryDirectory(prefix="cspine-encode-") as name:
        _run(Path(name), arguments.slices, arguments.rounds)


def _run(folder: Path, num_slices: int, num_rounds: int) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"Making a phantom of {num_slices} x 512 x 512 ...", flush=True)
    _make_case(folder, num_slices)
    volume, analysis = _load_case(folder)
    ways = _ways(folder, volume, analysis)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(num_rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(
        f"\n{'':<34}{'wall s':>8}{'CPU s':>8}{'min wall':>10}{'peak MB':>9}   medians of {num_rounds} after a warm-up"
    )
    base = None
    for name, rounds in seconds.items():
        wall, cpu = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
        base = base or cpu
        ratio = f"{base / cpu:6.1f} times less CPU" if base != cpu else ""
        fastest = min(wall for wall, _ in rounds[1:])
        print(f"{name:<34}{wall:>8.2f}{cpu:>8.2f}{fastest:>10.2f}{_peak_mb(folder, name):>9.0f}   {ratio}")


def _ways(folder: Path, volume: Volume, analysis: Analysis) -> dict[str, Callable[[], object]]:
    """What is measured; each writes its files."""
    everything = [PRESETS["everything"]]

    def only(*objects: Kind) -> object:
        return encode_results(analysis, volume, folder, node=NODE, profiles=[Profile(objects=objects)])

    return {
        "SEG, highdicom alone": lambda: _by_highdicom(volume, analysis, folder),
        "SEG, node": lambda: _by_node(volume, analysis, folder, Profile()),
        "SEG as a label map, RLE": lambda: _by_node(
            volume, analysis, folder, Profile(segmentation="labelmap", transfer_syntax="rle")
        ),
        "SEG as a label map, JPEG-LS": lambda: _by_node(
            volume, analysis, folder, Profile(segmentation="labelmap", transfer_syntax="jpeg-ls")
        ),
        "default: SEG, SEG, SR": lambda: encode_results(analysis, volume, folder, node=NODE),
        "saliency map": lambda: only(Kind.SALIENCY_MAP),
        "key objects": lambda: only(Kind.KEY_OBJECTS),
        "pages as pictures": lambda: only(Kind.SUMMARY_IMAGES),
        "pages as a PDF": lambda: only(Kind.SUMMARY_PDF),
        "pages as both": lambda: only(Kind.SUMMARY_IMAGES, Kind.SUMMARY_PDF),
        "everything": lambda: encode_results(analysis, volume, folder, node=NODE, profiles=everything),
    }


def _by_highdicom(volume: Volume, analysis: Analysis, folder: Path) -> None:
    """As its documentation has it: the headers of all slices, the whole mask."""
    images = [pydicom.dcmread(item.path, stop_before_pixels=True) for item in volume.slices]
    source = read_source(volume.slices, volume.grid)
    maker = _maker(source, volume)
    seg = hd.seg.Segmentation(
        source_images=images,
        pixel_array=analysis.vertebrae,
        segmentation_type="BINARY",
        segment_descriptions=[
            VERTEBRAE.describe(number, segment, MODEL, maker.uids)
            for number, segment in enumerate(VERTEBRA_SEGMENTS, start=1)
        ],
        series_number=1,
        **maker.identification("highdicom"),
    )
    save(seg, folder, "highdicom.seg.dcm")


def _by_node(volume: Volume, analysis: Analysis, folder: Path, profile: Profile) -> None:
    source = read_source(volume.slices, volume.grid)
    marked = marked_part(analysis.vertebrae)
    assert marked is not None
    mask = Mask(kind=VERTEBRAE, marked=marked, segments=VERTEBRA_SEGMENTS)
    for part in plan(mask, profile, source):
        save(make_segmentation(part, profile, _maker(source, volume)), folder, part.file_name)


def _maker(source: object, volume: Volume) -> Maker:
    uids = ResultUids.of((item.sop_instance_uid for item in volume.slices), MODEL)
    return Maker(source=source, model=MODEL, uids=uids, node=NODE)  # type: ignore[arg-type]


def _make_case(folder: Path, num_slices: int) -> None:
    """A phantom as a Series and its masks, with a fracture through C5."""
    anatomy = Anatomy.random(7, (Fracture(level="C5", kind="body", width_mm=2.0),))
    phantom = render(anatomy, default_grid(anatomy, (187.5 / num_slices, 0.45, 0.45), shape=(num_slices, 512, 512)))
    write_series(phantom, folder / "series")
    np.savez(folder / "masks.npz", vertebrae=phantom.vertebrae, fractures=phantom.fractures)


def _load_case(folder: Path) -> tuple[Volume, Analysis]:
    volume = read_series(sorted((folder / "series").glob("*.dcm")))
    masks = np.load(folder / "masks.npz")
    vertebrae = np.where(masks["vertebrae"] > len(LEVELS), 0, masks["vertebrae"]).astype(np.uint8)
    fractures = np.where(masks["fractures"] > 0, vertebrae, 0).astype(np.uint8)
    levels = {
        level: _level(volume, vertebrae == label, fractures == label) for label, level in enumerate(LEVELS, start=1)
    }
    findings = Findings(
        study_instance_uid=volume.study_instance_uid,
        series_instance_uid=volume.series_instance_uid,
        model=MODEL,
        patient_overall=PatientFinding(probability=0.9, finding=Finding.PRESENT),
        levels=levels,
    )
    saliency = np.where(fractures > 0, 255, 0).astype(np.uint8)
    return volume, Analysis(findings=findings, vertebrae=vertebrae, fractures=fractures, saliency=saliency)


def _level(volume: Volume, vertebra: NDArray[np.bool_], fracture: NDArray[np.bool_]) -> LevelFinding:
    """As a model would say it that knows the truth, its attention even over the vertebra's slices."""
    x, y, z = volume.grid.to_lps_mm(np.argwhere(vertebra).mean(axis=0)).tolist()
    planes = np.flatnonzero((fracture if fracture.any() else vertebra).any(axis=(1, 2))).tolist()
    uids = [volume.slices[plane].sop_instance_uid for plane in planes]
    return LevelFinding(
        in_field_of_view=True,
        probability=0.9 if fracture.any() else 0.1,
        finding=Finding.PRESENT if fracture.any() else Finding.ABSENT,
        centroid_lps_mm=(x, y, z),
        attention=tuple(SliceWeight(sop_instance_uid=uid, weight=1 / len(uids)) for uid in uids),
    )


def _peak_mb(folder: Path, name: str) -> float:
    """How much a process grows that encodes once in this way."""
    command = [sys.executable, __file__, "--case", str(folder), "--peak-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_peak(folder: Path, name: str) -> None:
    volume, analysis = _load_case(folder)
    way = _ways(folder, volume, analysis)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of reading
    before = _resident_kb("VmRSS")
    way()
    print((_resident_kb("VmHWM") - before) / 1000)


def _resident_kb(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
