"""Where are C1..C7? The vertebra U-Net on a coarse grid, made one ordered chain, drawn on the source grid.

Called by `model/pipeline.py`. Labels here run 1..8, where 8 is T1: the network needs it to number, the findings do not.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from model.bundle import SegmentSettings
from model.geometry import FloatArray, Grid
from model.levels import LEVELS
from model.memory import answer
from model.networks import SliceVertebraUNet, VertebraUNet
from model.resample import AIR_HU, body_volume, index_range, sample
from model.volume import Volume

T1 = len(LEVELS) + 1
"""Label of the first thoracic vertebra, and the last label the network knows."""

MIN_VOLUME_MM3 = 800.0
"""Less than this of a vertebra is not called found; C1, the smallest, has about 8,000."""

NEIGHBOUR_DISTANCE_MM = (4.0, 45.0)
"""How far apart the centroids of neighbouring vertebrae may lie."""

CUT_AREA_MM2 = 12.0
"""A vertebra with this much of its cross-section on a border of the volume counts as cut by the field of view."""

SPECK_SHARE = 0.1
"""Parts smaller than this share of a level's largest part are not drawn."""

SLAB = 16
"""Slices drawn on the source grid at a time."""

BONE_HU, BONE_WEIGHT = 200.0, 1.5
"""Where the outline is in doubt, voxels brighter than BONE_HU join the bone and darker ones leave it. On phantoms this
lifts the mean Dice from 0.81 to 0.89 (training/LOG.md)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Vertebra:
    """One found level. lower_lps_mm, upper_lps_mm: its box in the patient. is_cut: the field of view ends inside it."""

    label: int
    centroid_lps_mm: FloatArray
    volume_mm3: float
    lower_lps_mm: FloatArray
    upper_lps_mm: FloatArray
    is_cut: bool


def network_input(voxels_hu: Tensor) -> Tensor:
    """The U-Net's input `(2, Z, Y, X)`: HU `(Z, Y, X)` through a wide and a soft-tissue window."""
    return torch.stack([((voxels_hu - 200) / 400).clamp(-2, 3), ((voxels_hu - 100) / 150).clamp(-2, 2)])


def find_vertebrae(
    volume: Volume, network: VertebraUNet | SliceVertebraUNet, settings: SegmentSettings, device: torch.device
) -> tuple[NDArray[np.uint8], list[Vertebra]]:
    """Labels on the source grid, uint8 `(Z, Y, X)`, 0 and 1..7 = C1..C7, and what was found, head to foot."""
    coarse_hu, coarse_grid = body_volume(volume.voxels_hu, volume.grid, settings.spacing_mm, network.stride)
    scores = answer(network, network_input(coarse_hu)[None], device)[-1][0].float()
    scores, found = one_chain(scores, coarse_grid)
    labels = np.zeros(volume.grid.shape, np.uint8)
    if not found.any():
        return labels, []
    _draw(labels, volume, scores, coarse_grid, found)
    return labels, _describe(labels, volume.grid)


def one_chain(scores: Tensor, grid: Grid) -> tuple[Tensor, NDArray[np.bool_]]:
    """Scores `(2, Z, Y, X)` with everything outside one chain of neighbouring vertebrae erased, and its voxels.

    A level is its largest component. The chain grows from the largest level up and down while the next level lies at a
    plausible distance on the right side; levels beyond a gap are dropped, since their numbers cannot be trusted.
    The level coordinate is continued outward from the bone, so that interpolation at its surface means something.
    """
    bone = (scores[0] > 0).numpy()
    labels = np.where(bone, scores[1].round().clamp(1, T1).numpy().astype(np.uint8), 0)
    parts = {int(label): _largest_component(labels == label) for label in np.unique(labels[labels > 0])}
    parts = {label: part for label, part in parts.items() if part.sum() * grid.voxel_volume_mm3 >= MIN_VOLUME_MM3}
    found = np.zeros(bone.shape, bool)
    centroids = {label: grid.to_lps_mm(np.argwhere(part).mean(axis=0)) for label, part in parts.items()}
    for label in _chain(centroids, parts):
        found |= parts[label]
    if not found.any():
        return scores, found
    nearest = distance_transform_edt(~found, return_distances=False, return_indices=True)
    level = scores[1].numpy()[tuple(nearest)]
    logit = np.where(bone & ~found, -4.0, scores[0].numpy())
    return torch.from_numpy(np.stack([logit, level]).astype(np.float32)), found


def _chain(centroids: dict[int, FloatArray], parts: dict[int, NDArray[np.bool_]]) -> list[int]:
    """The labels of the chain of neighbours around the largest level."""
    if not parts:
        return []
    start = max(parts, key=lambda label: int(parts[label].sum()))
    chain = [start]
    for step in (-1, 1):
        label = start
        while label + step in centroids:
            apart = centroids[label + step] - centroids[label]
            near, far = NEIGHBOUR_DISTANCE_MM
            if not near <= np.linalg.norm(apart) <= far or apart[2] * step > 0:
                break
            label += step
            chain.append(label)
    return chain


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest face-connected part of a mask that is not empty."""
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = components == sizes.argmax()
    return largest


def _without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without parts much smaller than the largest; a fractured vertebra may well be in two pieces."""
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = (sizes >= SPECK_SHARE * sizes.max())[components]
    return kept


def _draw(
    labels: NDArray[np.uint8], volume: Volume, scores: Tensor, coarse_grid: Grid, found: NDArray[np.bool_]
) -> None:
    """Fills `labels` on the source grid from coarse scores: interpolated, sharpened by the voxel's own HU."""
    where = coarse_grid.to_lps_mm(np.argwhere(found).astype(float))
    margin_mm = 1.5 * coarse_grid.spacing_mm[0]
    first, last = index_range(volume.grid, where.min(axis=0) - margin_mm, where.max(axis=0) + margin_mm, margin=0)
    (z0, y0, x0), (z1, y1, x1) = first, last
    outside = torch.tensor([-8.0, 0.0])[:, None, None, None]
    for z in range(z0, z1, SLAB):
        top = min(z + SLAB, z1)
        affine = volume.grid.affine.copy()
        affine[:3, 3] = volume.grid.to_lps_mm(np.array([z, y0, x0], float))
        part = Grid(shape=(top - z, int(y1 - y0), int(x1 - x0)), affine=affine)
        fine = sample(scores - outside, coarse_grid, part) + outside
        hu = torch.from_numpy(volume.voxels_hu[z:top, y0:y1, x0:x1].astype(np.float32))
        logit = fine[0] + BONE_WEIGHT * ((hu - BONE_HU) / 100).clamp(-1, 1)
        level = fine[1].round().clamp(1, T1).to(torch.uint8)
        drawn = torch.where((logit > 0) & (hu > AIR_HU), level, 0)
        labels[z:top, y0:y1, x0:x1] = torch.where(drawn == T1, 0, drawn).numpy()
    for label, box in enumerate(ndimage.find_objects(labels, max_label=len(LEVELS)), start=1):
        if box is not None:
            part_labels = labels[box]
            mine = part_labels == label
            part_labels[mine & ~_without_specks(mine)] = 0


def _describe(labels: NDArray[np.uint8], grid: Grid) -> list[Vertebra]:
    """What was drawn, measured on the source grid, head to foot."""
    vertebrae = []
    for label, box in enumerate(ndimage.find_objects(labels, max_label=len(LEVELS)), start=1):
        if box is None:
            continue
        mask = labels[box] == label
        num_voxels = int(mask.sum())
        volume_mm3 = num_voxels * grid.voxel_volume_mm3
        if volume_mm3 < MIN_VOLUME_MM3:
            labels[box][mask] = 0
            continue
        start = np.array([side.start for side in box], float)
        # Of many voxels, every other one along each axis tells the box well enough.
        step = 2 if num_voxels > 5000 else 1
        points = grid.to_lps_mm(step * np.argwhere(mask[::step, ::step, ::step]).astype(float) + start)
        vertebrae.append(
            Vertebra(
                label=label,
                centroid_lps_mm=grid.to_lps_mm(start + _mean_index(mask, num_voxels)),
                volume_mm3=volume_mm3,
                lower_lps_mm=points.min(axis=0),
                upper_lps_mm=points.max(axis=0),
                is_cut=_is_cut(labels, label, grid),
            )
        )
    return vertebrae


def _mean_index(mask: NDArray[np.bool_], num_voxels: int) -> FloatArray:
    sums = [mask.sum(axis=others) @ np.arange(mask.shape[axis]) for axis, others in enumerate(((1, 2), (0, 2), (0, 1)))]
    return np.array(sums, float) / num_voxels


def _is_cut(labels: NDArray[np.uint8], label: int, grid: Grid) -> bool:
    spacing_mm = np.asarray(grid.spacing_mm)
    for axis in range(3):
        pixel_mm2 = float(np.prod(np.delete(spacing_mm, axis)))
        for end in (0, -1):
            if (np.take(labels, end, axis=axis) == label).sum() * pixel_mm2 > CUT_AREA_MM2:
                return True
    return False
