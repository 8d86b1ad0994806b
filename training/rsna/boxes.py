"""Boxes of fractures, which lie in slices of the CT, drawn on any grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model import Grid


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a radiologist saw a fracture in one slice.

    z: index of the slice in `Study.grid`. x, y, width, height: pixels of the slice as stored; (0, 0) is the corner of
    the first pixel.
    """

    z: int
    x: float
    y: float
    width: float
    height: float


def draw_boxes(boxes: Sequence[Box], source: Grid, target: Grid) -> NDArray[np.bool_]:
    """Which voxels `(Z, Y, X)` of the target have their centre in a box of the source; see `Study.boxes_on`."""
    inside = np.zeros(target.shape, bool)
    if not boxes:
        return inside
    step = np.abs(np.linalg.inv(source.affine)[0, :3] @ target.affine[:3, :3]).max()
    half = max(0.5, step / 2)
    # Only the part of the target around all boxes is looked at.
    bounds = np.array([(b.z - half, b.y, b.x, b.z + half, b.y + b.height, b.x + b.width) for b in boxes])
    lower, upper = bounds[:, :3].min(axis=0), bounds[:, 3:].max(axis=0)
    corners = np.stack(np.meshgrid(*zip(lower, upper, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
    reached = target.to_index(source.to_lps_mm(corners))
    first = np.clip(np.floor(reached.min(axis=0)).astype(int), 0, target.shape)
    last = np.clip(np.ceil(reached.max(axis=0)).astype(int) + 1, first, target.shape)
    part = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    places = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(first, last, strict=True)), indexing="ij"), axis=-1)
    z, y, x = np.moveaxis(source.to_index(target.to_lps_mm(places)), -1, 0)
    for box in boxes:
        inside[part] |= (
            (np.abs(z - box.z) <= half)
            & (np.abs(y + 0.5 - box.y - box.height / 2) <= box.height / 2)
            & (np.abs(x + 0.5 - box.x - box.width / 2) <= box.width / 2)
        )
    return inside
