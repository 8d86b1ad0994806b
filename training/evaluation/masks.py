"""Two label maps on one grid: overlap, distance of surfaces, and whether each vertebra has its own number.

Distances are in mm through the grid's affine, so oblique and sheared grids (gantry tilt) are measured rightly. Classes
that the truth lacks are left out of every mean, and counted where they were drawn nevertheless.

Reference: Taha and Hanbury 2015 (Dice, Hausdorff distance at 95 %, average symmetric surface distance); Sekuboyina et
al. 2021, VerSe (identification rate).
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

from model.geometry import Grid
from model.levels import LEVELS

Array = NDArray[np.float64]
Labels = NDArray[np.uint8]

MAX_IDENTIFIED_MM = 20.0
"""A vertebra's centroid further from the true one than this is not identified, as VerSe counts it."""


def measure_masks(true: Labels, drawn: Labels, grid: Grid) -> dict[str, Any]:
    """Both label maps, `(Z, Y, X)`, 1..7 = C1..C7, compared level by level.

    Each of `dice`, `hd95_mm`, `surface_distance_mm` and `identified` maps level names to values, of the levels that the
    truth has; distances are None where nothing was drawn. `invented`: levels drawn that the truth lacks.

    Raises:
        ValueError: the two differ in shape.
    """
    if true.shape != drawn.shape:
        raise ValueError(f"Label maps have shapes {true.shape} and {drawn.shape}; bring them onto one grid first.")
    found: dict[str, Any] = {"dice": {}, "hd95_mm": {}, "surface_distance_mm": {}, "invented": []}
    centroids_true, centroids_drawn = {}, {}
    for label, name in enumerate(LEVELS, start=1):
        a, b, first = _cropped(true == label, drawn == label)
        if b.any():
            centroids_drawn[name] = grid.to_lps_mm(np.argwhere(b).mean(axis=0) + first)
        if not a.any():
            if b.any():
                found["invented"].append(name)
            continue
        centroids_true[name] = grid.to_lps_mm(np.argwhere(a).mean(axis=0) + first)
        found["dice"][name] = dice(a, b)
        hd95, average = surface_distances_mm(a, b, grid)
        found["hd95_mm"][name], found["surface_distance_mm"][name] = hd95, average
    found["identified"] = identified(centroids_true, centroids_drawn)
    return found


def dice(true: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> float:
    """Twice what both share over the sum of both; 1 if both are empty."""
    total = int(true.sum()) + int(drawn.sum())
    return 2 * int((true & drawn).sum()) / total if total else 1.0


def surface_distances_mm(
    true: NDArray[np.bool_], drawn: NDArray[np.bool_], grid: Grid
) -> tuple[float | None, float | None]:
    """HD95 and average symmetric surface distance; None if one of the two is empty.

    Surfaces are the voxels with a neighbour outside, at their centres. HD95 is the greater of both directions' 95th
    percentiles; the average is over all surface voxels of both.
    """
    if not true.any() or not drawn.any():
        return None, None
    a, b = (grid.to_lps_mm(np.argwhere(mask & ~binary_erosion(mask)).astype(float)) for mask in (true, drawn))
    to_b, to_a = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    hd95 = max(float(np.percentile(to_b, 95)), float(np.percentile(to_a, 95)))
    return hd95, float((to_a.sum() + to_b.sum()) / (len(to_a) + len(to_b)))


def identified(true: Mapping[str, Array], drawn: Mapping[str, Array]) -> dict[str, bool]:
    """Of each true centroid (LPS mm): whether the drawn one of its level is within 20 mm, and nearest to it of all."""
    found = {}
    for name in true:
        if name not in drawn:
            found[name] = False
            continue
        distances = {other: float(np.linalg.norm(drawn[name] - centroid)) for other, centroid in true.items()}
        found[name] = distances[name] <= MAX_IDENTIFIED_MM and distances[name] == min(distances.values())
    return found


def attention_alignment(weights: Mapping[int, float], fractured_slices: Collection[int]) -> tuple[float, float] | None:
    """Share of a level's attention on slices with a true fracture, and what even attention would give.

    weights: attention of each slice number. None if there is no attention, or no slice of the level is fractured: then
    there is nothing to align with.
    """
    total = sum(weights.values())
    inside = [number for number in weights if number in fractured_slices]
    if total <= 0 or not inside:
        return None
    return sum(weights[number] for number in inside) / total, len(inside) / len(weights)


def _cropped(
    true: NDArray[np.bool_], drawn: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """Both masks in the box around either, and its first index."""
    either = true | drawn
    if not either.any():
        return true[:0], drawn[:0], np.zeros(3, np.int64)
    box, first = [], []
    for axis in range(3):
        inside = np.flatnonzero(either.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
        first.append(int(inside[0]))
    z, y, x = box
    return true[z, y, x], drawn[z, y, x], np.array(first)
