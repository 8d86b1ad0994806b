"""How a patient lies turned about the long axis, and the middle of a vertebra seen facing forward: geometry alone."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from model.geometry import FloatArray, Grid
from model.levels import LEVELS

SEEN_MM, BLUR_PIXELS = 1.5, 2.5
"""Pixels of the picture from above in which the midplane is looked for, and their blur: fine and blurred, or the
voxels' own grid would show in it."""

TWIST_DEG, TWIST_STEP_DEG, MIN_FIT_GAIN = 15.0, 3.0, 0.03
"""A patient turned about the long axis by more than TWIST_DEG is looked at facing forward. How far is found in steps by
the symmetry of the vertebrae, which has to be so much better there than as scanned, or the spine has no one midplane.
Off by up to 9 degrees on real CT that was turned by up to 45 (training/LOG.md)."""


def about_long_axis(turn_deg: float) -> FloatArray:
    """The turn of a patient about the long axis, `(4, 4)` in LPS mm, from the front to the left above 0."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", turn_deg, degrees=True).as_matrix()
    return turn


def middle_of_box(points_lps_mm: FloatArray, twist_deg: float = 0.0) -> FloatArray:
    """The middle, in LPS mm, of the box about points `(n, 3)`, along the axes of a patient who lies turned so far.

    A vertebra is longer than wide: in a patient turned by 45 degrees the box along the scanner's axes lies 6 to 8 mm
    elsewhere.
    """
    turn = about_long_axis(twist_deg)[:3, :3]
    facing = points_lps_mm @ turn
    return np.asarray(turn @ (facing.min(axis=0) + facing.max(axis=0)) / 2)


def turned_by_deg(labels: NDArray[np.uint8], grid: Grid) -> float:
    """How far the patient is turned about the long axis, as `Vertebra.twist_deg`; 0 if that cannot be told either.

    A vertebra is its own mirror image about the midplane. Seen from above, the spine stood upright and all its layers
    laid upon each other, that plane is the one whose mirror image fits best.

    labels: uint8 `(Z, Y, X)`, 1..7 = C1..C7, others ignored.
    """
    z, y, x = (max(1, int(SEEN_MM / spacing_mm)) for spacing_mm in grid.spacing_mm)
    some = labels[::z, ::y, ::x]
    where = np.nonzero((some > 0) & (some <= len(LEVELS)))
    if not len(where[0]):
        return 0.0
    indices = (np.stack(where, axis=1) * (z, y, x)).astype(float)
    points, of_level = grid.to_lps_mm(indices), some[where]
    upper, lower = (points[(of_level >= first) & (of_level <= last)] for first, last in ((2, 4), (5, 7)))
    if len(upper) and len(lower):
        up = upper.mean(axis=0) - lower.mean(axis=0)
        points = points @ Rotation.align_vectors((0, 0, 1), up / np.linalg.norm(up))[0].as_matrix().T
    step_mm = max(n * spacing_mm for n, spacing_mm in zip((z, y, x), grid.spacing_mm, strict=True))
    _, layer = np.unique(np.floor(points[:, 2] / step_mm), return_inverse=True)
    middles = [np.bincount(layer, points[:, axis]) / np.bincount(layer) for axis in (0, 1)]
    seen = points[:, :2] - np.stack(middles, axis=1)[layer]
    edges = np.arange(-60, 60 + SEEN_MM, SEEN_MM)
    fits = {}
    for twist_deg in np.arange(-90, 91, TWIST_STEP_DEG):
        across, along = about_long_axis(-twist_deg)[:2, :2] @ seen.T
        picture = ndimage.gaussian_filter(np.histogram2d(across, along, bins=(edges, edges))[0], BLUR_PIXELS)
        fits[float(twist_deg)] = (picture * picture[::-1]).sum() / (picture**2).sum()
    best = max(fits, key=lambda twist_deg: fits[twist_deg])
    return best if abs(best) > TWIST_DEG and fits[best] > fits[0.0] + MIN_FIT_GAIN else 0.0
