"""Real necks without vertebra labels: the planning CTs of OpenKBP, and what their contours say about the spine.

OpenKBP (Babier et al., Medical Physics 2021; MIT) holds coarse head-and-neck CT with contours of cord, brainstem and
mandible. None names a vertebra, but they say where bone must be spine, where it cannot be, and where the skull ends.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import FloatArray, Grid
from model.resample import body_volume, sample
from training.necks.synthetic import AUX_BRAINSTEM, AUX_CORD, AUX_MANDIBLE, AUX_NONE, AUX_UNKNOWN

BLANK_HU = -1000
"""At or below it nothing was stored, or there is air."""

OUTLINE_UNKNOWN, OUTLINE_KNOWN, OUTLINE_SOME_BONE = 0, 1, 2
"""Numbers of `RealNeck.certainty`: whether `share` holds, or only that the voxel is vertebra or skull."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contours:
    """A patient as stored, on `grid`, `(Z, Y, X)` foot to head: HU int16, and boolean contours."""

    name: str
    grid: Grid
    hu: NDArray[np.int16]
    cord: NDArray[np.bool_]
    brainstem: NDArray[np.bool_]
    mandible: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class RealNeck:
    """A patient on the U-Net's grid `(Z, Y, X)`; share, level and aux as of `training.necks.synthetic.Neck`.

    certainty: uint8, what of `share` is to be believed. cord_lps_mm: `(n, 3)`, middle of the cord, foot to head.
    brainstem_end_mm: LPS z of the lower end of the brainstem's contour, NaN where there is none.
    """

    name: str
    grid: Grid
    hu: NDArray[np.int16]
    share: NDArray[np.uint8]
    level: NDArray[np.uint8]
    aux: NDArray[np.uint8]
    certainty: NDArray[np.uint8]
    cord_lps_mm: FloatArray
    brainstem_end_mm: float


def read_contours(path: Path) -> Contours:
    """One patient; axes are turned to `(Z, Y, X)`, foot to head, front to back."""
    with np.load(path) as arrays:
        ct, mask = (arrays[name].transpose(2, 0, 1)[::-1] for name in ("ct", "mask"))
        in_plane_y, in_plane_x, along = (float(value) for value in arrays["voxel_mm"])
    z, y, x = ct.shape
    grid = Grid.axial(shape=(z, y, x), spacing_mm=(along, in_plane_y, in_plane_x), centre_lps_mm=(0.0, 0.0, 0.0))
    return Contours(
        name=path.stem.split("_", 1)[1],
        grid=grid,
        hu=(ct.astype(np.int32) - 1024).clip(-1024, 3071).astype(np.int16),
        cord=(mask & 1) > 0,
        brainstem=(mask & 2) > 0,
        mandible=(mask & 4) > 0,
    )


def holds_neck(patient: Contours) -> bool:
    """Whether voxels are stored around the cord from the brainstem's end to 150 mm below it."""
    if not patient.brainstem.any() or not patient.cord.any():
        return False
    end = np.flatnonzero(patient.brainstem.any(axis=(1, 2)))[0]
    lowest = end - int(150 / patient.grid.spacing_mm[0])
    if lowest < 0:
        return False
    around = [_around_cord(patient, z) for z in range(lowest, end)]
    return float(np.mean([stored for stored in around if stored is not None] or [0.0])) > 0.97


def _around_cord(patient: Contours, z: int) -> float | None:
    """Share of stored voxels in a square of 80 mm around the cord of a slice."""
    where = np.argwhere(patient.cord[z])
    if not len(where):
        return None
    y, x = where.mean(axis=0).astype(int)
    reach = int(40 / patient.grid.spacing_mm[1])
    square = patient.hu[z, max(y - reach, 0) : y + reach // 2, max(x - reach, 0) : x + reach]
    return float((square > BLANK_HU).mean()) if square.size else 0.0


def weak_labels(patient: Contours, spacing_mm: float, multiple: int) -> RealNeck:
    """The patient on the U-Net's grid with what contours and HU alone say."""
    hu, grid = body_volume(patient.hu, patient.grid, spacing_mm, multiple)
    cord, brainstem, mandible = (
        sample(torch.from_numpy(contour.astype(np.float32))[None], patient.grid, grid)[0].numpy() > 0.5
        for contour in (patient.cord, patient.brainstem, patient.mandible)
    )
    values = hu.numpy()
    aux = np.full(values.shape, AUX_UNKNOWN, np.uint8)
    covered = cord.any(axis=(1, 2)) if cord.any() else np.zeros(values.shape[0], bool)
    aux[covered] = AUX_NONE  # in slices with a cord contour, all else is something else
    bony = values > 150
    aux[bony] = AUX_UNKNOWN
    aux[bony & mandible] = AUX_MANDIBLE
    aux[cord], aux[brainstem] = AUX_CORD, AUX_BRAINSTEM
    aux[values <= BLANK_HU] = AUX_NONE
    certainty = np.full(values.shape, OUTLINE_UNKNOWN, np.uint8)
    line = cord_line(cord, grid)
    if len(line):
        away = _distance_to_line_mm(line, grid)
        certainty[away > 75] = OUTLINE_KNOWN
        certainty[(away < 22) & (values > 250) & ~mandible & ~cord] = OUTLINE_SOME_BONE
    certainty[(values < -50) | cord | brainstem | mandible] = OUTLINE_KNOWN
    ends = grid.to_lps_mm(np.argwhere(brainstem).astype(float))[:, 2] if brainstem.any() else np.array([np.nan])
    return RealNeck(
        name=patient.name,
        grid=grid,
        hu=values.round().clip(-1024, 3071).astype(np.int16),
        share=np.zeros(values.shape, np.uint8),
        level=np.zeros(values.shape, np.uint8),
        aux=aux,
        certainty=certainty,
        cord_lps_mm=line,
        brainstem_end_mm=float(np.percentile(ends, 2)),
    )


def cord_line(cord: NDArray[np.bool_], grid: Grid) -> FloatArray:
    """The middle of the cord in each slice that has one, smoothed, foot to head."""
    slices = np.flatnonzero(cord.any(axis=(1, 2)))
    if len(slices) < 5:
        return np.zeros((0, 3))
    index = np.array([[z, *np.argwhere(cord[z]).mean(axis=0)] for z in slices])
    index[:, 1:] = ndimage.gaussian_filter1d(index[:, 1:], 2, axis=0, mode="nearest")
    return grid.to_lps_mm(index)


def _distance_to_line_mm(line: FloatArray, grid: Grid) -> NDArray[np.float32]:
    """Of each voxel, within its slice and those near."""
    mask = np.ones(grid.shape, bool)
    index = np.rint((line - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T).astype(int)
    index = index[((index >= 0) & (index < grid.shape)).all(axis=1)]
    mask[tuple(index.T)] = False
    return np.asarray(ndimage.distance_transform_edt(mask, sampling=grid.spacing_mm), np.float32)
