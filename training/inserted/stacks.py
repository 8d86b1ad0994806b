"""The fracture network's training stacks of a real or synthetic volume with fractures inserted, as `samples.py` cuts
them from phantoms: `training/fractures.py` reads both.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from model.bundle import ClassifySettings
from model.classify import sample_mask, sample_planes, slice_grid, stack_grid
from model.geometry import Grid
from model.levels import LEVELS
from model.pose import middle_of_box
from training.inserted.insertion import Inserted


def inserted_stacks(
    inserted: Inserted, labels: NDArray[np.uint8], grid: Grid, classify: ClassifySettings
) -> dict[str, NDArray[Any]]:
    """The N vertebrae of a changed volume that are there and whole, in level order.

    labels: as `insert` had them, or as a network draws them of the changed volume.

    `planes` int16 HU `(N, planes, Y, X)`, `masks` and `regions` uint8 0..255 `(N, slices, Y, X)`, `fractured` bool and
    `levels` uint8 1..7 `(N,)`.

    Raises:
        ValueError: no vertebra is whole.
    """
    boxes = ndimage.find_objects(labels, max_label=len(LEVELS))
    there = [label for label in inserted.eligible if boxes[label - 1] is not None]
    if not there:
        raise ValueError("No vertebra of this volume is whole and large enough to be cut. Leave the volume out.")
    planes, masks, regions = [], [], []
    for label in there:
        box = boxes[label - 1]
        points = grid.to_lps_mm(np.argwhere(labels[box] == label) + [float(side.start) for side in box])
        stack = stack_grid(middle_of_box(points), float(np.ptp(points[:, 2])), classify)
        slices = slice_grid(stack)
        planes.append(sample_planes(inserted.voxels_hu, grid, stack).round().to(torch.int16).numpy())
        masks.append((sample_mask(labels, grid, slices, label) * 255).to(torch.uint8).numpy())
        regions.append((sample_mask(inserted.regions, grid, slices, label) * 255).to(torch.uint8).numpy())
    broken = {fracture.level for fracture in inserted.fractures}
    return {
        "planes": np.stack(planes),
        "masks": np.stack(masks),
        "regions": np.stack(regions),
        "fractured": np.array([LEVELS[label - 1] in broken for label in there]),
        "levels": np.array(there, np.uint8),
    }
