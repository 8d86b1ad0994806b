"""`cspine demo`: the whole node at work on two made-up studies, and its answers held against the truth.

Everything is real: a node on free ports, C-STORE in, SEG and SR out to an archive that stands in for a PACS. What is
compared is what that archive holds.
"""

import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.uid import Comprehensive3DSRStorage, SegmentationStorage
from rich import box
from rich.console import Console
from rich.table import Table

from model import LEVELS, PHANTOM_BUNDLE, Finding
from model.phantom import Anatomy, Fracture, Phantom, default_grid, render, write_series
from node.archive import Archive
from node.config import AnalyseConfig, Config, DeliverConfig, ReceiveConfig
from node.process import set_up_logging
from node.send import send_files
from node.service import Service

_SPACING_MM = (1.2, 0.9, 0.9)
_TIMEOUT_S = 180.0
_MIN_DICE = 0.75  # of every level, between the SEG the archive got and the truth


@dataclass(frozen=True, kw_only=True)
class Study:
    """A made-up study and what is true of it. Only one Series, the phantom's."""

    name: str
    fractures: tuple[Fracture, ...]
    phantom: Phantom
    paths: list[Path]
    study_instance_uid: str


def run_demo() -> bool:
    """Runs the demo and prints it; True when every finding agrees with the truth."""
    set_up_logging("WARNING")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="cspine-demo-") as name:
        folder = Path(name)
        with console.status("Making two phantom studies …"):
            fracture = Fracture(level="C5", kind="body", width_mm=2.0)
            studies = [_make_study(folder, "intact", 1, ()), _make_study(folder, "fractured", 2, (fracture,))]
        archive = Archive(folder / "archive", _free_port())
        config = Config(
            data_dir=folder / "data",
            receive=ReceiveConfig(port=_free_port(), min_free_disk_mb=0),
            # The weights that know phantoms: those for real necks find fewer of their fractures.
            analyse=AnalyseConfig(bundle=PHANTOM_BUNDLE),
            deliver=DeliverConfig(destinations=(archive.destination,)),
        )
        service = Service(config)
        try:
            with console.status("Starting the node …"):
                service.start(threading.Event())
            agreements = [_run_study(console, study, config, archive) for study in studies]
            return all(agreements)
        finally:
            service.stop()
            archive.stop()


def _make_study(folder: Path, name: str, seed: int, fractures: tuple[Fracture, ...]) -> Study:
    anatomy = Anatomy.random(seed, fractures)
    phantom = render(anatomy, default_grid(anatomy, _SPACING_MM), seed=seed)
    paths = write_series(phantom, folder / name, seed=seed)
    study_uid = str(dcmread(paths[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
    return Study(name=name, fractures=fractures, phantom=phantom, paths=paths, study_instance_uid=study_uid)


def _run_study(console: Console, study: Study, config: Config, archive: Archive) -> bool:
    """Sends the study, waits for its results and prints them beside the truth; True when they agree."""
    receive = config.receive
    node = archive.destination.model_copy(update={"port": receive.port, "ae_title": receive.ae_title})
    console.print(
        f"\nSending the [bold]{study.name}[/] study: {len(study.paths)} Instances by C-STORE to {receive.ae_title}"
    )
    started = time.perf_counter()
    refused = send_files(study.paths, node, calling_ae_title="DEMO")
    sent = time.perf_counter()
    if refused:
        console.print(f"[red]{len(refused)} Instances were refused:[/] {refused[0].reason}")
        return False

    with console.status("Waiting for SEG and SR …"):
        arrived = archive.wait_for(lambda paths: None not in _find_results(paths, study), _TIMEOUT_S)
    report, vertebrae = _find_results([path for path, _ in archive.files], study)
    if not arrived or report is None or vertebrae is None:
        console.print(f"[red]SEG and SR did not arrive within {_TIMEOUT_S:g} s.[/]")
        return False
    stored = time.perf_counter()
    console.print(f"Sent in {sent - started:.1f} s. SEG and SR were in the archive {stored - sent:.1f} s later.")
    return _print_comparison(console, study, read_report(report), read_dice(vertebrae, study.phantom))


def _find_results(paths: list[Path], study: Study) -> tuple[Dataset | None, Dataset | None]:
    """Report and SEG of the vertebrae (not the one of the fractures) among the files of an archive."""
    mine = [ds for path in paths if (ds := dcmread(path)).StudyInstanceUID == study.study_instance_uid]
    report = next((ds for ds in mine if ds.SOPClassUID == Comprehensive3DSRStorage), None)
    segs = [ds for ds in mine if ds.SOPClassUID == SegmentationStorage]
    return report, next((seg for seg in segs if _labels(seg) & set(LEVELS)), None)


def _print_comparison(
    console: Console, study: Study, report: dict[str, tuple[str, float | None]], dice: dict[str, float]
) -> bool:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "truth", "report", "probability", "outline (Dice)", ""):
        table.add_column(heading, justify="right" if heading in ("probability", "outline (Dice)") else "left")
    broken = {fracture.level for fracture in study.fractures}
    all_agree = True
    for name in ("C1-C7", *LEVELS):
        truth = Finding.PRESENT if name in broken or (name not in LEVELS and broken) else Finding.ABSENT
        answer, percent = report[name]
        agrees = answer == truth and dice.get(name, 1.0) >= _MIN_DICE
        all_agree &= agrees
        table.add_row(
            name if name in LEVELS else "patient",
            truth,
            answer,
            "" if percent is None else f"{percent:.1f} %",
            f"{dice[name]:.2f}" if name in dice else "",
            "[green]agrees[/]" if agrees else "[red]differs[/]",
        )
    console.print(table)
    return all_agree


def read_report(report: Dataset) -> dict[str, tuple[str, float | None]]:
    """What a TID 1500 report says: for each tracking identifier ("C1-C7", "C1" …) the answer and the percent."""
    measurements = next(item for item in report.ContentSequence if _concept(item) == "126010")
    answers = {}
    for group in measurements.ContentSequence:
        items = {_concept(item): item for item in group.ContentSequence}
        if "72704001" not in items:  # it measures something else
            continue
        certainty = items.get("111012")
        answers[items["112039"].TextValue] = (
            items["72704001"].ConceptCodeSequence[0].CodeMeaning.lower(),
            float(certainty.MeasuredValueSequence[0].NumericValue) if certainty is not None else None,
        )
    return answers


def read_dice(seg: Dataset, phantom: Phantom) -> dict[str, float]:
    """Dice of each level between a SEG and the phantom it was made of, compared at the same places in the patient."""
    found = hd.seg.Segmentation.from_dataset(seg)
    volume = found.get_volume(combine_segments=True)
    truth = _same_place(phantom.vertebrae, np.linalg.inv(phantom.grid.affine) @ volume.affine, volume.spatial_shape)
    dice = {}
    for label, level in enumerate(LEVELS, start=1):
        segment = next((n for n in found.segment_numbers if _label(found, n) == level), None)
        mask = volume.array == segment if segment else np.zeros(truth.shape, bool)
        total = int(mask.sum()) + int((phantom.vertebrae == label).sum())
        dice[level] = 2 * float((mask & (truth == label)).sum()) / total
    return dice


def _same_place(labels: NDArray[np.uint8], to_labels: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The labels on another grid of the same voxels, which may be cropped or run the other way."""
    axes = [np.rint(to_labels[a, 3] + to_labels[a, a] * np.arange(shape[a])).astype(int) for a in range(3)]
    return labels[np.ix_(*axes)]


def _concept(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def _labels(seg: Dataset) -> set[str]:
    return {str(item.SegmentLabel) for item in seg.SegmentSequence}


def _label(seg: hd.seg.Segmentation, number: int) -> str:
    return str(seg.get_segment_description(number).segment_label)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
