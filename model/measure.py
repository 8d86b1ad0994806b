"""Measures of one vertebra from its mask alone: where its midline runs, and how high its body is.

Geometry only: no voxels of CT, no network. Both say None where the mask does not show it clearly. Held against the
phantom's known measures (`tests/model/test_measure.py`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.geometry import FloatArray, Grid

MAX_ROTATION_DEG = 40
MAX_ASYMMETRY = 0.35
"""Share of a vertebra that may have no mirror image before its midline counts as unknown."""

_CELL_MM = 3.0
_MAX_MM = 10_000  # larger than any vertebra, in any unit


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
    centre = points_lps_mm.mean(axis=0)
    # Seen from above, as cells of a millimetre with the number of voxels in each: few enough to turn many times.
    x, y = np.floor(points_lps_mm[:, :2] - centre[:2]).astype(np.int64).T
    cells, weights = np.unique(x * _MAX_MM + y + _MAX_MM // 2, return_counts=True)
    offsets = np.stack([cells // _MAX_MM, cells % _MAX_MM - _MAX_MM // 2], axis=1) + 0.5
    best, best_deg = 1.0, 0
    for degrees in range(-MAX_ROTATION_DEG, MAX_ROTATION_DEG + 1, 2):
        share = _asymmetry(offsets, weights, degrees)
        if share < best:
            best, best_deg = share, degrees
    if best > MAX_ASYMMETRY:
        return None
    angle = np.radians(best_deg)
    return Midline(centre_lps_mm=centre, left=np.array([np.cos(angle), np.sin(angle), 0.0]))


def _asymmetry(offsets: FloatArray, weights: NDArray[np.int64], degrees: float) -> float:
    """Share of the weight of points `(n, 2)` that has no mirror image about a midline turned by this much."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # As many cells on either side of the midline, so that the last is the mirror image of the first.
    half = int(np.ceil(np.abs(offsets).max() * 1.5 / _CELL_MM))
    across, along = (np.floor(offsets @ turn / _CELL_MM).astype(np.intp) + half).T
    sums = np.bincount(across * 2 * half + along, weights, 4 * half * half).reshape(2 * half, 2 * half)
    return float(np.abs(sums - sums[::-1]).sum() / 2 / weights.sum())


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


_SLAB_MM = 4.0  # to each side of the midline; no pedicle comes that near
_STEP_MM = (2.0, 0.75, 0.5)  # across, front to back, along the axis
_REACH_MM = (_SLAB_MM, 48.0, 24.0)
_NUM_TURNS = 3  # after which the axis no longer changes by a degree
_MIN_DEPTH_MM, _MAX_DEPTH_MM = 7.0, 30.0
_MIN_HEIGHT_MM, _MAX_HEIGHT_MM = 3.0, 30.0
_MAX_SLICE_MM = 2.0
"""Ratios of 29 intact bodies of phantoms, true masks: 1.00 to 1.08 at 0.8 mm, 0.86 to 1.17 at 2, 0.82 to 1.33 at 3."""
_MAX_BULGE = 1.3
"""Middle height over the greater of the others. Endplates are hollow: of the same bodies at most 1.00 up to 2 mm."""


def body_heights(mask: NDArray[np.bool_], grid: Grid) -> BodyHeights | None:
    """The heights of the body of a whole vertebra, one of C3..C7; None when its mask shows no body, or not finely.

    The body is what lies before the canal at the midline. Its axis is at right angles to the middle between its
    endplates; heights along it are means over 8 mm about the midline and a sixth of the depth, centred on a sixth, a
    half and five sixths of the depth. C1 has no body, and the dens leaves that of C2 no upper end.

    mask: `(Z, Y, X)` on `grid`.
    """
    if grid.spacing_mm[0] > _MAX_SLICE_MM:
        return None
    midline = find_midline(grid.to_lps_mm(np.argwhere(mask).astype(float)))
    if midline is None:
        return None
    up = np.array([0.0, 0.0, 1.0])
    for _ in range(_NUM_TURNS):
        back = np.cross(up, midline.left)
        thickness_mm, middle_mm = _columns(mask, grid, midline, back, up)
        body = _body(thickness_mm)
        if body is None:
            return None
        margin = (body.stop - body.start) // 5
        inner = np.arange(body.start + margin, body.stop - margin)
        slope = np.polyfit(inner * _STEP_MM[1], middle_mm[inner], 1)[0]
        up = up - slope * back
        up /= np.linalg.norm(up)
    columns = thickness_mm[body]
    places = (np.arange(len(columns)) + 0.5) / len(columns)
    heights = [float(columns[np.abs(places - centre) <= 1 / 12].mean()) for centre in (1 / 6, 1 / 2, 5 / 6)]
    if len(columns) * _STEP_MM[1] > _MAX_DEPTH_MM or min(heights) < _MIN_HEIGHT_MM or max(heights) > _MAX_HEIGHT_MM:
        return None
    if heights[1] > _MAX_BULGE * max(heights[0], heights[2]):
        return None
    return BodyHeights(anterior_mm=heights[0], middle_mm=heights[1], posterior_mm=heights[2])


def _columns(
    mask: NDArray[np.bool_], grid: Grid, midline: Midline, back: FloatArray, up: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """How much of the mask lies above each other along the midline, and the middle of it, from front to back, mm."""
    across, along, height = (
        np.arange(-reach, reach + step / 2, step) for reach, step in zip(_REACH_MM, _STEP_MM, strict=True)
    )
    points = (
        midline.centre_lps_mm
        + along[:, None, None, None] * back
        + across[:, None, None] * midline.left
        + height[:, None] * up
    )
    inside = _sampled(mask, grid.to_index(points))
    thickness_mm = inside.sum(axis=2) * _STEP_MM[2]
    total = inside.sum(axis=(1, 2))
    middle_mm = (inside * height).sum(axis=(1, 2)) / np.maximum(total, 1e-9)
    return thickness_mm.mean(axis=1), middle_mm


def _sampled(mask: NDArray[np.bool_], indices: FloatArray) -> FloatArray:
    """The mask at fractional indices `(..., 3)`, 0..1, interpolated linearly; 0 outside."""
    padded = np.pad(mask, 1).astype(np.float32)
    clipped = np.clip(indices + 1, 0, np.array(padded.shape) - 1.001)
    low = clipped.astype(np.intp)
    share = (clipped - low).astype(np.float32)
    flat, strides = padded.ravel(), np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    first = low @ strides
    z, y, x = share[..., 0], share[..., 1], share[..., 2]
    sampled = np.zeros(first.shape, np.float32)
    for dz, dy, dx in np.ndindex(2, 2, 2):
        weight = (z if dz else 1 - z) * (y if dy else 1 - y) * (x if dx else 1 - x)
        sampled += weight * flat[first + (dz * strides[0] + dy * strides[1] + dx)]
    return sampled


def _body(thickness_mm: FloatArray) -> slice | None:
    """The frontmost columns that hang together and are as long as a body is deep; they end half as high as it is."""
    is_bone = np.concatenate([[False], thickness_mm > 2.0, [False]])
    starts, stops = (
        np.flatnonzero(np.diff(is_bone.astype(int)) == 1),
        np.flatnonzero(np.diff(is_bone.astype(int)) == -1),
    )
    for start, stop in zip(starts, stops, strict=True):
        if (stop - start) * _STEP_MM[1] < _MIN_DEPTH_MM:
            continue
        high = np.flatnonzero(thickness_mm[start:stop] >= np.median(thickness_mm[start:stop]) / 2)
        return slice(int(start + high[0]), int(start + high[-1]) + 1)
    return None
