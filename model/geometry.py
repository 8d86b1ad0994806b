"""Where voxels lie in the patient: one convention for the whole project.

Patient coordinates are DICOM's LPS in mm (x to the patient's left, y to the back, z to the head; PS3.3 C.7.6.2.1.1).
Arrays are ordered `(Z, Y, X)`. An affine maps homogeneous voxel indices `(z, y, x, 1)` (centre of the voxel) to LPS mm.
This module holds no voxels and reads no files.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """A box of voxels in the patient, without the voxels.

    shape: number of voxels along `(Z, Y, X)`.
    affine: float64 `(4, 4)`, maps `(z, y, x, 1)` to LPS mm; may be oblique or sheared (gantry tilt).
    """

    shape: tuple[int, int, int]
    affine: FloatArray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along `(Z, Y, X)`, mm."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel, mm³ (right for sheared grids too)."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def to_lps_mm(self, indices_zyx: FloatArray) -> FloatArray:
        """LPS mm `(..., 3)` of voxel indices `(..., 3)` in `(z, y, x)` order."""
        return np.asarray(indices_zyx, float) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, points_lps_mm: FloatArray) -> FloatArray:
        """Fractional voxel indices `(..., 3)`, `(z, y, x)`, of LPS points `(..., 3)` in mm."""
        return (np.asarray(points_lps_mm, float) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def part(self, first_zyx: NDArray[np.int64], shape: tuple[int, ...]) -> "Grid":
        """The grid of a box of voxels inside this one, whose first voxel has these indices."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_lps_mm(np.asarray(first_zyx, float))
        z, y, x = shape
        return Grid(shape=(z, y, x), affine=affine)

    @classmethod
    def axial(
        cls,
        *,
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        centre_lps_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> "Grid":
        """An axis-aligned grid around a centre: Z runs foot to head, Y front to back, X to the patient's left."""
        linear = np.zeros((3, 3))
        linear[2, 0], linear[1, 1], linear[0, 2] = spacing_mm
        affine = np.eye(4)
        affine[:3, :3] = linear
        affine[:3, 3] = np.asarray(centre_lps_mm) - linear @ ((np.asarray(shape) - 1) / 2)
        return cls(shape=shape, affine=affine)
