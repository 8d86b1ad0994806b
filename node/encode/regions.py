"""Fracture findings: the marked voxels of a level, divided into those that hang together."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.sr.coding import Code
from scipy import ndimage

from model import LEVELS, Grid, Midline, find_midline
from node import codes
from node.encode.frames import Marked
from node.encode.seg import Segment

MAX_GAP_MM = 3.0
"""Parts that are closer than this are one finding: a threshold breaks a line into dashes."""

MAX_FINDINGS = 30
"""Findings of a level that are told apart; the smallest beyond share the last number."""

CLEAR_OF_MIDLINE_MM = 4.0
"""How far from the midline 95 % of a finding must lie for it to have a side; the midline itself is known to 3 mm."""


@dataclass(frozen=True, kw_only=True)
class FractureRegion(Segment):
    """A finding. laterality: None when it lies on both sides, or near the midline. planes: Z indices, largest first."""

    volume_mm3: float
    laterality: Code | None
    planes: tuple[int, ...]


def find_regions(fractures: Marked, vertebrae: Marked | None, grid: Grid) -> tuple[Marked, tuple[FractureRegion, ...]]:
    """The findings, level by level, the largest of a level first; and `fractures` with their labels.

    fractures, vertebrae: 1..7 = C1..C7; sides are judged from the vertebra.
    """
    numbered = np.zeros(fractures.labels.shape, np.uint8)
    regions: list[FractureRegion] = []
    for level_label, level in enumerate(LEVELS, start=1):
        of_level = fractures.labels == level_label
        if not of_level.any():
            continue
        midline = _midline(vertebrae, level_label, grid)
        for number, part in enumerate(_parts(of_level, grid), start=1):
            label = len(regions) + 1
            numbered[part] = label
            areas = part.sum(axis=(1, 2))
            planes = sorted(np.flatnonzero(areas), key=lambda z: (-areas[z], z))
            points = grid.to_lps_mm((np.argwhere(part) + fractures.corner).astype(float))
            regions.append(
                FractureRegion(
                    label=label,
                    level=level,
                    name=f"{level} fracture {number}",
                    volume_mm3=float(areas.sum()) * grid.voxel_volume_mm3,
                    laterality=_side(midline.to_left_mm(points)) if midline else None,
                    planes=tuple(int(z) + fractures.corner[0] for z in planes),
                )
            )
    return Marked(labels=numbered, corner=fractures.corner), tuple(regions)


def _parts(mask: NDArray[np.bool_], grid: Grid) -> list[NDArray[np.bool_]]:
    """The parts of a mask `(Z, Y, X)`, the largest first."""
    reach = np.ceil(MAX_GAP_MM / 2 / np.array(grid.spacing_mm)).astype(int)
    padded = np.pad(mask, [(n, n) for n in reach])
    grown = ndimage.maximum_filter(padded, size=tuple(2 * reach + 1))
    inner = tuple(slice(n, n + size) for n, size in zip(reach, mask.shape, strict=True))
    components, _ = ndimage.label(grown, structure=np.ones((3, 3, 3)))
    labels = np.where(mask, components[inner], 0)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    head, tail = order[: MAX_FINDINGS - 1], order[MAX_FINDINGS - 1 :]
    return [labels == label for label in head] + ([np.isin(labels, tail)] if tail.size else [])


def _midline(vertebrae: Marked | None, label: int, grid: Grid) -> Midline | None:
    if vertebrae is None:
        return None
    indices = np.argwhere(vertebrae.labels == label) + vertebrae.corner
    return find_midline(grid.to_lps_mm(indices.astype(float)))


def _side(to_left_mm: NDArray[np.float64]) -> Code | None:
    low, high = np.percentile(to_left_mm, (5, 95))
    if low > CLEAR_OF_MIDLINE_MM:
        return codes.LEFT
    return codes.RIGHT if high < -CLEAR_OF_MIDLINE_MM else None
