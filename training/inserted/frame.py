"""A vertebra's own frame and the landmarks of its mask: where its body, canal and processes lie, in mm.

From a label map alone, drawn by a network as often as not: holes, missing laminae and ragged edges are to be expected,
so that every landmark falls back on the anatomy of an average vertebra. `sites.py` and `negatives.py` place by them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import FloatArray, Grid
from model.levels import LEVELS
from model.measure import find_midline

MIN_VOLUME_MM3 = 2500.0
"""Less of a vertebra than this gives no landmarks; C1, the smallest, has about 8,000."""

CUT_AREA_MM2 = 40.0
"""With this much of a mask on a border of the volume, the vertebra is cut."""

MAX_TILT = 0.7
"""Cosine of the greatest angle between spine and long axis of the patient that the masks are believed."""

MAX_TURN = 0.44
"""Radians a vertebra may be turned against the others of the neck (25 degrees) before its symmetry is not believed."""

BONE_HU, MIN_BRIGHT = 150.0, 0.3
"""What counts as bone, and the share of a mask that must be bone for its landmarks to mean anything."""

_MAX_POINTS = 12_000


@dataclass(frozen=True, kw_only=True, eq=False)
class VertebraFrame:
    """One vertebra in coordinates `(u, v, w)`: to its left, to the back, along the spine to the head; mm.

    rows: float `(3, 3)`, the unit vectors u, v, w in LPS. points: `(n, 3)`, where its mask has bone, in the frame.
    mm3_a_point: of bone that a point stands for. front, back: v of the front and back wall of the body (of C1: of the
    anterior arch). canal_back: v where the canal ends. half_width: of the body. floor, ceiling: the end plates as
    planes `a + b u + c v`, which gives w. tip: v of the end of the spinous process.
    """

    label: int
    centre_lps_mm: FloatArray
    rows: FloatArray
    points: FloatArray
    mm3_a_point: float
    front: float
    back: float
    canal_back: float
    half_width: float
    floor: FloatArray
    ceiling: FloatArray
    tip: float

    @property
    def level(self) -> str:
        """Its name, "C1" to "C7"."""
        return LEVELS[self.label - 1]

    def to_lps_mm(self, points: FloatArray) -> FloatArray:
        """LPS mm of points `(..., 3)` of the frame."""
        return np.asarray(points, float) @ self.rows + self.centre_lps_mm

    def index_to_frame(self, grid: Grid) -> FloatArray:
        """`(3, 4)`: from voxel indices `(z, y, x, 1)` of a grid to `(u, v, w)`."""
        matrix = self.rows @ grid.affine[:3]
        matrix[:, 3] -= self.rows @ self.centre_lps_mm
        return matrix


def vertebra_frames(voxels_hu: NDArray[np.int16], labels: NDArray[np.uint8], grid: Grid) -> list[VertebraFrame]:
    """The frames of all vertebrae that are there, large enough and not cut by the field of view, C1 first.

    labels: uint8 `(Z, Y, X)`, 0 and 1..7 = C1..C7, on the grid of the volume; other labels are bone of no level.
    """
    boxes = ndimage.find_objects(labels, max_label=len(LEVELS))
    masks = {}
    for label, box in enumerate(boxes, start=1):
        if box is None:
            continue
        indices = np.argwhere(labels[box] == label) + [side.start for side in box]
        if len(indices) * grid.voxel_volume_mm3 >= MIN_VOLUME_MM3:
            masks[label] = indices
    centres = {label: grid.to_lps_mm(indices.mean(axis=0)) for label, indices in masks.items()}
    points, mm3_a_point = {}, {}
    for label, indices in masks.items():
        bright = indices[voxels_hu[tuple(indices.T)] > BONE_HU]
        if not _is_cut(indices, grid) and len(bright) >= MIN_BRIGHT * len(indices):
            step = max(1, len(bright) // _MAX_POINTS)
            points[label] = grid.to_lps_mm(bright[::step].astype(float))
            mm3_a_point[label] = step * grid.voxel_volume_mm3
    lefts = _to_the_left(points)
    return [
        _frame(label, points[label], mm3_a_point[label], _spine_axis(label, centres), lefts[label]) for label in points
    ]


def _to_the_left(points: dict[int, FloatArray]) -> dict[int, FloatArray]:
    """Unit vector to the left of each vertebra, from its symmetry; where that is far off the others', as theirs."""
    midlines = {label: find_midline(of_level) for label, of_level in points.items()}
    angles = {
        label: float(np.arctan2(midline.left[1], midline.left[0]))
        for label, midline in midlines.items()
        if midline is not None
    }
    middle = float(np.median(list(angles.values()))) if angles else 0.0
    turned = {label: angles.get(label, middle) for label in points}
    turned = {label: angle if abs(angle - middle) < MAX_TURN else middle for label, angle in turned.items()}
    return {label: np.array([np.cos(angle), np.sin(angle), 0.0]) for label, angle in turned.items()}


def _is_cut(indices: NDArray[np.int64], grid: Grid) -> bool:
    spacing_mm = np.asarray(grid.spacing_mm)
    for axis in range(3):
        pixel_mm2 = float(np.prod(np.delete(spacing_mm, axis)))
        for border in (0, grid.shape[axis] - 1):
            if (indices[:, axis] == border).sum() * pixel_mm2 > CUT_AREA_MM2:
                return True
    return False


def _spine_axis(label: int, centres: dict[int, FloatArray]) -> FloatArray:
    """Unit vector to the head, from the centroids of the neighbours, steadied by those of the whole neck."""
    first, last = min(centres), max(centres)
    above, below = centres.get(label - 1, centres[label]), centres.get(label + 1, centres[label])
    axis = _unit(above - below) + 0.7 * _unit(centres[first] - centres[last]) + np.array([0, 0, 0.3])
    axis = _unit(axis)
    return axis if axis[2] > MAX_TILT else np.array([0.0, 0.0, 1.0])


def _unit(vector: FloatArray) -> FloatArray:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-6 else np.zeros(3)


def _frame(
    label: int, points_lps_mm: FloatArray, mm3_a_point: float, up: FloatArray, left: FloatArray
) -> VertebraFrame:
    left = _unit(left - (left @ up) * up)
    rows = np.stack([left, np.cross(up, left), up])
    centre = points_lps_mm.mean(axis=0)
    points = (points_lps_mm - centre) @ rows.T
    front, back, canal_back = _midline_marks(label, points, mm3_a_point)
    half_width = _half_width(points, front, back)
    floor, ceiling = _end_plates(points, front, back, half_width)
    return VertebraFrame(
        label=label,
        centre_lps_mm=centre,
        rows=rows,
        points=points,
        mm3_a_point=mm3_a_point,
        front=front,
        back=back,
        canal_back=canal_back,
        half_width=half_width,
        floor=floor,
        ceiling=ceiling,
        tip=float(np.percentile(points[:, 1], 99.5)),
    )


def _midline_marks(label: int, points: FloatArray, mm3_a_point: float) -> tuple[float, float, float]:
    """v of front wall, back wall and back of the canal, from how much bone there is along the midline."""
    deep, canal, least = (5.0, 22.0, 3.0) if label == 1 else (15.0, 15.0, 5.0)
    middle = points[np.abs(points[:, 0]) < 4]
    start, stop = (float(value) for value in np.percentile(points[:, 1], (0.5, 99.5)))
    edges = np.arange(np.floor(start), np.ceil(stop) + 2)
    thickness_mm = np.histogram(middle[:, 1], edges)[0] * mm3_a_point / 8.0
    is_bone = ndimage.binary_closing(thickness_mm > least, np.ones(3))
    runs, num_runs = ndimage.label(is_bone)
    front, back = start, start + deep
    for run in range(1, num_runs + 1):
        where = np.flatnonzero(runs == run)
        if len(where) >= (2 if label == 1 else 7):
            front, back = float(edges[where[0]]), float(edges[where[-1] + 1])
            break
    # A run on through a canal that the mask filled in, or one that ends in a hole of the mask, is not the body.
    if not 0.6 * deep <= back - front <= 1.5 * deep:
        back = front + deep
    behind = np.flatnonzero((edges[:-1] > back + 7) & (thickness_mm > 2))
    canal_back = float(edges[behind[0]]) if len(behind) else back + canal
    return front, back, canal_back if canal_back - back < canal + 10 else back + canal


def _half_width(points: FloatArray, front: float, back: float) -> float:
    """Where, going sideways through the middle of the body, half of its height is gone."""
    inside = points[(points[:, 1] > front + 3) & (points[:, 1] < back - 4)]
    counts = np.histogram(np.abs(inside[:, 0]), np.arange(0, 20))[0]
    low = np.flatnonzero(counts < 0.5 * max(1, float(np.median(counts[:5]))))
    return float(np.clip(low[0] if len(low) else 10, 7, 13))


def _end_plates(points: FloatArray, front: float, back: float, half_width: float) -> tuple[FloatArray, FloatArray]:
    """Floor and ceiling of the body as planes over (u, v)."""
    u, v, w = points[(np.abs(points[:, 0]) < half_width) & (points[:, 1] > front) & (points[:, 1] < back)].T
    if len(w) < 50:
        low, high = np.percentile(points[:, 2], (10, 90))
        return np.array([low, 0, 0]), np.array([high, 0, 0])
    column = np.floor(u / 3).astype(int) * 1000 + np.floor(v / 3).astype(int)
    planes = []
    for share in (4, 96):
        cells = [
            (u[column == cell].mean(), v[column == cell].mean(), np.percentile(w[column == cell], share))
            for cell in np.unique(column)
            if (column == cell).sum() > 8
        ]
        if len(cells) < 6:
            planes.append(np.array([np.percentile(w, share), 0, 0]))
            continue
        cell_u, cell_v, height = np.array(cells).T
        fit, *_ = np.linalg.lstsq(np.stack([np.ones_like(cell_u), cell_u, cell_v], axis=1), height, rcond=None)
        fit[1:] = np.clip(fit[1:], -0.5, 0.5)
        fit[0] = np.mean(height - fit[1] * cell_u - fit[2] * cell_v)
        planes.append(fit)
    return planes[0], planes[1]
