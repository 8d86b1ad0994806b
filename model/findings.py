"""What the model says of one Series: the contract for everything downstream (`docs/findings.schema.json`).

Plain data, no torch, no DICOM. `Findings.to_dict()` is exactly what `findings.json` holds.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.levels import LEVELS


class Finding(StrEnum):
    """Answer to "is it fractured?"."""

    PRESENT = "present"  # probability at or above the operating point
    ABSENT = "absent"  # below it
    UNDETERMINED = "undetermined"  # not found, or not judged, for the reason that stands beside it


@dataclass(frozen=True, kw_only=True)
class SliceWeight:
    """Share of the attention one Frame of an Instance received; the weights of a level sum to 1."""

    sop_instance_uid: str
    weight: float
    frame_number: int = 1


@dataclass(frozen=True, kw_only=True)
class Region:
    """Box around suspicious voxels in one Frame, in its pixels: `x` is the first column, `y` the first row."""

    sop_instance_uid: str
    x: int
    y: int
    width: int
    height: int
    frame_number: int = 1


@dataclass(frozen=True, kw_only=True)
class LevelFinding:
    """One vertebra.

    probability: 0..1, None when the finding is undetermined.
    reason: why it is undetermined, in a few words; "" when it is not.
    centroid_lps_mm: `(x, y, z)`; None, as is volume_mm3, when the level is not in the field of view.
    """

    in_field_of_view: bool
    probability: float | None
    finding: Finding
    reason: str = ""
    centroid_lps_mm: tuple[float, float, float] | None = None
    volume_mm3: float | None = None
    attention: tuple[SliceWeight, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PatientFinding:
    """Any of C1..C7 fractured?

    probability: of the levels that were judged; None when none was. finding: undetermined, too, where none of those is
    present and others were not judged.
    """

    probability: float | None
    finding: Finding


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Which model spoke. trained_on: a sentence on its training data, shown wherever its numbers are shown.

    operating_point: probability from which a finding is called present. level_operating_points: the same, of each
    level; those not given get operating_point.
    """

    name: str
    version: str
    trained_on: str
    operating_point: float
    level_operating_points: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(self.level_operating_points.keys() - set(LEVELS)):
            raise ValueError(f"level_operating_points has {', '.join(unknown)}; the levels are {', '.join(LEVELS)}")
        complete = dict.fromkeys(LEVELS, self.operating_point) | self.level_operating_points
        if outside := sorted({at for at in (self.operating_point, *complete.values()) if not 0 <= at <= 1}):
            raise ValueError(f"operating points must be from 0 to 1, and {', '.join(map(str, outside))} is not")
        object.__setattr__(self, "level_operating_points", complete)

    @property
    def own_operating_points(self) -> dict[str, float]:
        """Those of levels that differ from the patient's."""
        return {level: at for level, at in self.level_operating_points.items() if at != self.operating_point}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All the model says of one Series; `levels` has all of C1..C7, in that order, always."""

    study_instance_uid: str
    series_instance_uid: str
    model: ModelInfo
    patient_overall: PatientFinding
    levels: dict[str, LevelFinding]
    warnings: tuple[str, ...] = ()
    timings_s: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict, keys as in `docs/findings.schema.json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """Findings with their masks on the source grid.

    vertebrae: uint8 `(Z, Y, X)`, 0 background, 1..7 = C1..C7. fractures: the same, of voxels of suspected fracture.
    saliency: uint8 `(Z, Y, X)`, 0..255 for 0..1: what the answer rests on at the levels whose finding is present. It is
    the probability that a voxel belongs to a fracture, times the attention its slice received, as a share of the most
    attended slice of its level. 0 at all other levels. logits: of each of `model.levels.OUTPUTS` that was judged,
    before calibration.
    """

    findings: Findings
    vertebrae: NDArray[np.uint8]
    fractures: NDArray[np.uint8]
    saliency: NDArray[np.uint8]
    logits: dict[str, float] = field(default_factory=dict)
