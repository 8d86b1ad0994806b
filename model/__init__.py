"""The door to the model: everything `node/` and `training/` may use of it.

Importing it does not import torch: the node's own processes stay small, and only the analysis worker, which calls
`load_pipeline`, pays for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from model.bundle import DEFAULT_BUNDLE, PHANTOM_BUNDLE, BundleError, find_bundles, read_bundle
from model.decode import PARSE_ERRORS, decoding_plugin
from model.decode_pool import DecodePool
from model.findings import (
    Analysis,
    Finding,
    Findings,
    LevelFinding,
    ModelInfo,
    PatientFinding,
    Region,
    SliceWeight,
)
from model.geometry import Grid
from model.levels import LEVELS
from model.measure import BodyHeights, Midline, body_heights, find_midline
from model.series import (
    HEADER_TAGS,
    IncompleteSeries,
    SeriesError,
    SeriesRules,
    SliceHeader,
    check_series,
    read_series,
    slice_headers,
)
from model.volume import SliceSource, Volume

if TYPE_CHECKING:
    from model.pipeline import Pipeline

__all__ = [
    "DEFAULT_BUNDLE",
    "HEADER_TAGS",
    "LEVELS",
    "PARSE_ERRORS",
    "PHANTOM_BUNDLE",
    "Analysis",
    "BodyHeights",
    "BundleError",
    "DecodePool",
    "Finding",
    "Findings",
    "Grid",
    "IncompleteSeries",
    "LevelFinding",
    "Midline",
    "ModelInfo",
    "PatientFinding",
    "Region",
    "SeriesError",
    "SeriesRules",
    "SliceHeader",
    "SliceSource",
    "SliceWeight",
    "Volume",
    "body_heights",
    "check_series",
    "decoding_plugin",
    "find_bundles",
    "find_midline",
    "load_pipeline",
    "read_bundle",
    "read_series",
    "slice_headers",
]


def load_pipeline(bundle: Path | None = None, device: str = "auto", num_threads: int | None = None) -> "Pipeline":
    """The analysis pipeline, its weights loaded and verified.

    bundle: folder or zip file of a model bundle; None takes the one shipped with the package.
    device: "auto", "cpu" or a torch device such as "cuda:0". num_threads: CPU threads; None leaves torch's choice.

    Raises:
        BundleError: the bundle is missing, damaged or of another architecture.
    """
    from model.pipeline import load_pipeline as load

    return load(bundle, device, num_threads)
