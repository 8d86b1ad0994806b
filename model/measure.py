"""Measures of one vertebra from its mask alone: where its midline runs, and how high its body is.

Geometry only: no voxels of CT, no network. Both say None where the mask does not show it clearly. Held against the
phantom's known measures (`tests/model/test_measure.py`).
"""

from dataclasses import dataclass

import numpy as np

from model.geometry import FloatArray

MAX_ROTATION_DEG = 40
MAX_ASYMMETRY = 0.35
"""Share of a vertebra that may have no mirror image before its midline counts as unknown."""

_CELL_MM = 3.0
_MAX_POINTS = 20_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Midline:
    """The plane that halves a vertebra. left: unit vector `(x, y, z)` in LPS, at right angles to it."""

    centre_lps_mm: FloatArray
    left: FloatArray

    def to_left_mm(self, points_lps_mm: FloatArray) -> FloatArray:
        """How far to the patient's left of the plane each point `(..., 3)` lies."""
        return (np.asarray(points_lps_mm) - self.centre_lps_mm) @ self.left


def find_midline(points_lps_mm: FloatArray) -> Midline | None:
    """The midline of a vertebra given its voxels `(n, 3)`; None when it is not symmetric enough to have one.

    A vertebra is its own mirror image; of all turns of the head within `MAX_ROTATION_DEG`, the one that comes closest.
    """
    if len(points_lps_mm) < 100:
        return None
    points = points_lps_mm[:: len(points_lps_mm) // _MAX_POINTS + 1]
    centre = points.mean(axis=0)
    offsets = points[:, :2] - centre[:2]
    best, best_deg = 1.0, 0
    for degrees in range(-MAX_ROTATION_DEG, MAX_ROTATION_DEG + 1, 2):
        share = _asymmetry(offsets, degrees)
        if share < best:
            best, best_deg = share, degrees
    if best > MAX_ASYMMETRY:
        return None
    angle = np.radians(best_deg)
    return Midline(centre_lps_mm=centre, left=np.array([np.cos(angle), np.sin(angle), 0.0]))


def _asymmetry(offsets: FloatArray, degrees: float) -> float:
    """Share of the points `(n, 2)` that have no mirror image about a midline turned by this much."""
    angle = np.radians(degrees)
    across = offsets @ (np.cos(angle), np.sin(angle))
    along = offsets @ (-np.sin(angle), np.cos(angle))
    reach = np.ceil(np.abs(offsets).max() * 1.5 / _CELL_MM) * _CELL_MM
    bins = np.arange(-reach, reach + _CELL_MM / 2, _CELL_MM)
    cells, _, _ = np.histogram2d(across, along, bins=(bins, bins))
    return float(np.abs(cells - cells[::-1]).sum() / 2 / len(offsets))


@dataclass(frozen=True, kw_only=True)
class BodyHeights:
    """Height of a vertebral body along its own axis, mm: at the front, in the middle and at the back."""

    anterior_mm: float
    middle_mm: float
    posterior_mm: float

    @property
    def ratio(self) -> float:
        """Anterior over posterior: below 1 for a wedge."""
        return self.anterior_mm / self.posterior_mm
