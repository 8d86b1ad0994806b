"""Pictures out of a Volume, each with the directions it is seen from: stored slices, and sheets along the spine.

A slice is shown as its Instance stores it, as a viewer would show it. A sheet is cut along the patient's own axes:
it bends from vertebra to vertebra, so that every level lies in it, whatever the neck's curve and the slices' obliquity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model import Analysis, Grid, Volume

AIR_HU = -1024

MIN_COSINE = 0.2
"""A direction this far (11.5 degrees) out of an axis is named after that axis too: "LP" is left and a bit back."""

BODY_SHARE = 0.3
"""The share of a vertebra's midline that lies in front of the middle of its body."""

_AXES = (("L", "R"), ("P", "A"), ("H", "F"))


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Which way in the patient each edge of a picture lies: letters as PatientOrientation has them."""

    left: str
    right: str
    top: str
    bottom: str

    @classmethod
    def of(cls, right_lps: Sequence[float], down_lps: Sequence[float]) -> "Marks":
        """The marks of a picture whose columns count up along `right_lps` and whose rows along `down_lps`."""
        right, down = np.asarray(right_lps, float), np.asarray(down_lps, float)
        return cls(left=letters(-right), right=letters(right), top=letters(-down), bottom=letters(down))


def letters(direction_lps: Sequence[float] | NDArray[np.float64]) -> str:
    """A direction in the patient in letters, the strongest first, e.g. "L", or "PH" when it is oblique.

    Reference: PS3.3 C.7.6.1.1.1.
    """
    cosines = np.asarray(direction_lps, float) / np.linalg.norm(direction_lps)
    order = sorted(range(3), key=lambda axis: -abs(round(float(cosines[axis]), 6)))
    return "".join(_AXES[axis][int(cosines[axis] < 0)] for axis in order if abs(cosines[axis]) > MIN_COSINE)


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A picture, all arrays `(rows, columns)`.

    hu: float32. labels: uint8, 1..7 = C1..C7. fractures: the same, of suspected fracture. plane: Z index of the slice
    it shows, None for a sheet.
    """

    hu: NDArray[np.float32]
    labels: NDArray[np.uint8]
    fractures: NDArray[np.uint8]
    marks: Marks
    plane: int | None = None


def slice_view(
    volume: Volume,
    analysis: Analysis,
    plane: int,
    *,
    centre_lps_mm: Sequence[float],
    shape: tuple[int, int],
    pixel_mm: float,
) -> View:
    """A part of one slice, rows and columns as stored, its middle at the point of the slice next to `centre_lps_mm`."""
    grid = volume.grid
    middle = grid.to_index(np.asarray(centre_lps_mm, float))[1:]
    steps = pixel_mm / np.asarray(grid.spacing_mm[1:])
    offset = middle - steps * (np.asarray(shape) - 1) / 2

    def cut(array: NDArray[np.generic], order: int, dtype: type[np.generic], outside: float) -> NDArray[np.generic]:
        cut_out: NDArray[np.generic] = ndimage.affine_transform(
            array[plane], steps, offset, shape, output=dtype, order=order, mode="constant", cval=outside
        )
        return cut_out

    return View(
        hu=cut(volume.voxels_hu, 1, np.float32, AIR_HU),  # type: ignore[arg-type]
        labels=cut(analysis.vertebrae, 0, np.uint8, 0),  # type: ignore[arg-type]
        fractures=cut(analysis.fractures, 0, np.uint8, 0),  # type: ignore[arg-type]
        marks=Marks.of(grid.affine[:3, 2], grid.affine[:3, 1]),  # type: ignore[arg-type]
        plane=plane,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Spine:
    """The line a sheet follows: at these heights (z, mm, rising) it lies at this x and this y."""

    z_mm: NDArray[np.float64]
    x_mm: NDArray[np.float64]
    y_mm: NDArray[np.float64]

    @classmethod
    def of(cls, analysis: Analysis, grid: Grid) -> "Spine":
        """Through the centroids of the levels that were found; through the middle of the volume when none was."""
        found = [level.centroid_lps_mm for level in analysis.findings.levels.values() if level.centroid_lps_mm]
        points = np.array(found if found else [grid.to_lps_mm((np.array(grid.shape) - 1) / 2).tolist()], float)
        x, y, z = points[np.argsort(points[:, 2])].T
        return cls(z_mm=z, x_mm=x, y_mm=y)

    @property
    def middle_lps_mm(self) -> tuple[float, float, float]:
        """The middle of the box around it."""
        x, y, z = (float(a.min() + a.max()) / 2 for a in (self.x_mm, self.y_mm, self.z_mm))
        return x, y, z

    def moved_to(self, point_lps_mm: Sequence[float]) -> "Spine":
        """The same line, moved so that it runs through a point's x and y at its height."""
        x, y, z = point_lps_mm
        return Spine(
            z_mm=self.z_mm,
            x_mm=self.x_mm + (x - np.interp(z, self.z_mm, self.x_mm)),
            y_mm=self.y_mm + (y - np.interp(z, self.z_mm, self.y_mm)),
        )

    def beside(self, point_lps_mm: Sequence[float]) -> tuple[float, float, float]:
        """The point with this one's x and z, as far to the front or back as the line is at its height."""
        x, _, z = point_lps_mm
        return x, float(np.interp(z, self.z_mm, self.y_mm)), z

    def through_bodies(
        self, sagittal_labels: NDArray[np.uint8], pixel_mm: float, centre_lps_mm: Sequence[float]
    ) -> "Spine":
        """A line further to the front, where a sagittal sheet around `centre_lps_mm` has the vertebral bodies.

        A vertebra's centroid lies at the back of its body, where a coronal sheet would show the canal.
        """
        heights, fronts = [], []
        for label in np.unique(sagittal_labels[sagittal_labels > 0]):
            rows, columns = np.nonzero(sagittal_labels == label)
            size = np.asarray(sagittal_labels.shape)
            heights.append(centre_lps_mm[2] - pixel_mm * (np.median(rows) - (size[0] - 1) / 2))
            fronts.append(centre_lps_mm[1] + pixel_mm * (np.quantile(columns, BODY_SHARE) - (size[1] - 1) / 2))
        if not heights:
            return self
        order = np.argsort(heights)
        z, y = np.array(heights)[order], np.array(fronts)[order]
        return Spine(z_mm=z, x_mm=np.interp(z, self.z_mm, self.x_mm), y_mm=y)


def sagittal_sheet(
    volume: Volume,
    analysis: Analysis,
    spine: Spine,
    *,
    centre_lps_mm: Sequence[float],
    shape: tuple[int, int],
    pixel_mm: float,
) -> View:
    """Seen from the patient's left: front on the left, head up; its x follows the spine."""
    z, y = _rows_and_columns(centre_lps_mm[2], centre_lps_mm[1], shape, pixel_mm)
    x = np.broadcast_to(np.interp(z, spine.z_mm, spine.x_mm), shape)
    points = np.stack([x, np.broadcast_to(y, shape), np.broadcast_to(z, shape)], axis=-1)
    return _sampled(volume, analysis, points, Marks.of((0, 1, 0), (0, 0, -1)))


def coronal_sheet(
    volume: Volume,
    analysis: Analysis,
    spine: Spine,
    *,
    centre_lps_mm: Sequence[float],
    shape: tuple[int, int],
    pixel_mm: float,
) -> View:
    """Seen from the front: the patient's right on the left, head up; its y follows the spine."""
    z, x = _rows_and_columns(centre_lps_mm[2], centre_lps_mm[0], shape, pixel_mm)
    y = np.broadcast_to(np.interp(z, spine.z_mm, spine.y_mm), shape)
    points = np.stack([np.broadcast_to(x, shape), y, np.broadcast_to(z, shape)], axis=-1)
    return _sampled(volume, analysis, points, Marks.of((1, 0, 0), (0, 0, -1)))


def _rows_and_columns(
    middle_z_mm: float, middle_mm: float, shape: tuple[int, int], pixel_mm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """z of the rows, falling, `(rows, 1)`, and the other coordinate of the columns, rising, `(1, columns)`."""
    rows, columns = (pixel_mm * np.arange(-(size - 1) / 2, size / 2, dtype=np.float64) for size in shape)
    return middle_z_mm - rows[:, None], middle_mm + columns[None, :]


def _sampled(volume: Volume, analysis: Analysis, points_lps_mm: NDArray[np.float64], marks: Marks) -> View:
    """HU interpolated and masks taken from the nearest voxel at points `(rows, columns, 3)`."""
    index = np.moveaxis(volume.grid.to_index(points_lps_mm), -1, 0)
    hu = ndimage.map_coordinates(volume.voxels_hu, index, output=np.float32, order=1, mode="constant", cval=AIR_HU)
    nearest = np.rint(index).astype(np.intp)
    limits = np.asarray(volume.grid.shape)[:, None, None]
    inside = ((nearest >= 0) & (nearest < limits)).all(axis=0)
    voxels = tuple(np.where(inside, nearest, 0))
    return View(
        hu=hu,
        labels=np.where(inside, analysis.vertebrae[voxels], 0),
        fractures=np.where(inside, analysis.fractures[voxels], 0),
        marks=marks,
    )
