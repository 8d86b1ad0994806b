"""`cspine demo`: the whole node at work on two made-up studies, and its answers held against the truth.

Everything is real: a node on free ports, C-STORE in, SEG and SR out to an archive that stands in for a PACS. What is
compared is what that archive holds.
"""

import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.uid import Comprehensive3DSRStorage, SegmentationStorage
from rich.console import Console
from rich.table import Table

from model import LEVELS, Finding, Grid
from model.phantom import Anatomy, Fracture, Phantom, default_grid, render, write_series
from node.archive import Archive
from node.config import AnalyseConfig, Config, DeliverConfig, ReceiveConfig
from node.encode import Report, read_report, read_segments
from node.process import set_up_logging
from node.send import send_files
from node.service import Service

_SPACING_MM = (1.0, 0.8, 0.8)
_TIMEOUT_S = 180.0
_MIN_DICE = 0.7


@dataclass(frozen=True, kw_only=True)
class Study:
    """A made-up study: what is true of it, and what its series is called."""

    name: str
    phantom: Phantom
    fractures: tuple[Fracture, ...]
    paths: list[Path]
    series_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the archive got for a study: the report, the mask it can be checked by, and how long that took."""

    report: Report
    dice: dict[str, float]
    seconds: float


def run_demo() -> bool:
    """Runs the demo and prints it; True when every finding agrees with the truth."""
    set_up_logging("WARNING")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="cspine-demo-") as name:
        folder = Path(name)
        with console.status("Making two phantom studies"):
            studies = [
                make_study(folder, "intact", 101, ()),
                make_study(folder, "fractured", 102, (Fracture(level="C5", kind="body", width_mm=2.0),)),
            ]
        config = demo_config(folder)
        archive = Archive(folder / "archive", config.deliver.destinations[0].port)
        service = Service(config)
        try:
            service.start()
            answers = []
            for study in studies:
                console.print(f"Sending the {study.name} study, {len(study.paths)} Instances, by C-STORE …")
                answers.append(_ask(study, config, archive))
        finally:
            service.stop()
            archive.stop()
    return all([_print_comparison(console, *pair) for pair in zip(studies, answers, strict=True)])
