"""The NIfTI mask of a study on the grid of its CT: through both affines, righted if reversed, without stray voxels."""

import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from scipy import ndimage

from model import LEVELS, Grid, Volume

REVERSED_MASKS = ("43.1363", "43.20120", "43.2243", "43.24606", "43.32071")
"""Ends of the StudyInstanceUIDs whose masks run from head to foot where their CT runs from foot to head."""

MAX_LABEL = 19
"""T12. 1..7 are C1..C7."""

MAX_OFF_LABEL = 0.1
"""From a whole number: labels up to 19, stored scaled into 8 bits, are off by up to 0.04."""

BONE_HU = 150
"""Brighter voxels are bone, or contrast medium."""

MIN_BONE_SHARE = 0.4
"""Of a mask. On generated necks: 1.0 where it belongs, 0.3 to 0.5 upside down, 0.3 to 0.4 if it is 10 mm off to the
side or to the front; 12 mm off along the spine it still has 0.6. Real bone with little calcium has less of it."""

CLEAR_DIFFERENCE = 0.05
"""By so much the bone share must differ for it to decide which way round a mask is."""


class MaskError(Exception):
    """This mask cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """A mask on its CT's grid.

    labels: uint8 `(Z, Y, X)`, 1..7 = C1..C7, 8.. = T1... was_reversed: it was righted. bone_share: of its voxels, how
    many are bone; other_bone_share: if it were the other way round. num_stray_voxels: removed.
    """

    labels: NDArray[np.uint8]
    was_reversed: bool
    bone_share: float
    other_bone_share: float
    num_stray_voxels: int


def read_mask(path: Path, volume: Volume) -> Mask:
    """The mask of a study on the grid of its CT.

    Which way round it is, its content says: the bone under it, and that C1 lies above C7. Only where the bone does not
    decide, the list of reversed masks does.

    Raises:
        MaskError: not a label map, or it does not lie on the bone of this CT, whichever way round.
    """
    stored, grid = _read_nifti(path)
    upward = int(np.abs(grid.affine[2, :3]).argmax())
    as_stored = labels_on(stored, grid, volume.grid)
    flipped = labels_on(np.flip(stored, upward), grid, volume.grid)
    share, other_share = bone_share(as_stored, volume), bone_share(flipped, volume)
    is_reversed = other_share > share
    if abs(other_share - share) < CLEAR_DIFFERENCE:
        is_reversed = volume.study_instance_uid.endswith(REVERSED_MASKS)
    if is_reversed:
        as_stored, share, other_share = flipped, other_share, share
    if share < MIN_BONE_SHARE:
        raise MaskError(
            f"{share:.0%} of the mask lies on bone, {other_share:.0%} if it is turned upside down; at least "
            f"{MIN_BONE_SHARE:.0%} is expected. It belongs to another CT or another place."
        )
    labels, num_stray_voxels = without_stray_voxels(as_stored)
    _check_order(labels)
    return Mask(
        labels=labels,
        was_reversed=is_reversed,
        bone_share=share,
        other_bone_share=other_share,
        num_stray_voxels=num_stray_voxels,
    )


def _read_nifti(path: Path) -> tuple[NDArray[np.uint8], Grid]:
    """Labels `(I, J, K)` as stored, and their grid in LPS; NIfTI has RAS, where x and y run the other way."""
    try:
        image: Any = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise MaskError(f"{path.name} cannot be read as NIfTI ({error}).") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise MaskError(f"{path.name} has shape {values.shape}; three dimensions are expected.")
    if values.dtype.kind == "f":
        # Software that computes in floats stores them scaled: 3 comes back as 2.99995.
        labels = np.rint(values)
        if np.abs(values - labels).max() > MAX_OFF_LABEL:
            raise MaskError(f"{path.name} has values between its labels, as after interpolation; labels are expected.")
        values = labels
    low, high = values.min(), values.max()
    if not (low >= 0 and 1 <= high <= MAX_LABEL):
        raise MaskError(f"{path.name} has values from {low} to {high}; labels from 0 to {MAX_LABEL} are expected.")
    i, j, k = values.shape
    return values.astype(np.uint8), Grid(shape=(i, j, k), affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine)


def labels_on(labels: NDArray[np.uint8], source: Grid, target: Grid) -> NDArray[np.uint8]:
    """Labels of one grid at the voxel centres of another, the nearest of each; 0 outside."""
    index = np.linalg.inv(source.affine) @ target.affine
    along = np.abs(index[:3, :3]) > 1e-3 * np.abs(index[:3, :3]).max()
    if (along.sum(axis=0) != 1).any() or (along.sum(axis=1) != 1).any():
        oblique = ndimage.affine_transform(
            labels, index[:3, :3], index[:3, 3], output_shape=target.shape, order=0, mode="grid-constant"
        )
        return np.asarray(oblique, np.uint8)
    # The axes run along one another: a whole CT takes a tenth of the time.
    axes = along.argmax(axis=0)
    turned = labels.transpose(axes)
    here, there = [], []
    for axis, source_axis in enumerate(axes):
        places = index[source_axis, axis] * np.arange(target.shape[axis]) + index[source_axis, 3]
        nearest = np.floor(places + 0.5).astype(int)
        inside = (nearest >= 0) & (nearest < turned.shape[axis])
        here.append(np.flatnonzero(inside))
        there.append(nearest[inside])
    found = np.zeros(target.shape, np.uint8)
    found[np.ix_(*here)] = turned[np.ix_(*there)]
    return found


def bone_share(labels: NDArray[np.uint8], volume: Volume) -> float:
    """Of the labelled voxels, the share that is bone; 0 if there are none."""
    labelled = labels > 0
    return float((volume.voxels_hu[labelled] > BONE_HU).mean()) if labelled.any() else 0.0


def without_stray_voxels(labels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """The largest component of each level, and how many voxels were removed; voxels are connected at corners too."""
    kept = np.zeros_like(labels)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        parts, _ = ndimage.label(labels[box] == number, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        kept[box][parts == sizes.argmax()] = number
    return kept, int((labels > 0).sum() - (kept > 0).sum())


def _check_order(labels: NDArray[np.uint8]) -> None:
    """Refuses a mask whose levels do not follow one another from head to foot."""
    heights = {
        number: (box[0].start + box[0].stop) / 2
        for number, box in enumerate(ndimage.find_objects(labels), start=1)
        if box is not None
    }
    for upper, lower in pairwise(sorted(heights)):
        if heights[upper] <= heights[lower]:
            names = [LEVELS[n - 1] if n <= len(LEVELS) else f"T{n - len(LEVELS)}" for n in (upper, lower)]
            raise MaskError(f"{names[0]} does not lie above {names[1]}: its levels are not in order.")
