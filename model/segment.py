"""Where are C1..C7? The vertebra U-Net on a coarse grid, again on a finer one, as one ordered chain on the source grid.

The coarse network sees the whole neck and numbers; the refiner, where the bundle has one, sees the spine at finer
spacing and what the coarse one thought, and outlines. Called by `model/pipeline.py`. Labels here run on past C7: the
networks need the thoracic levels to number, the findings do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.ndimage import distance_transform_edt
from scipy.spatial.transform import Rotation
from torch import Tensor

from model.bundle import RefineSettings, SegmentSettings
from model.geometry import FloatArray, Grid
from model.levels import LEVELS
from model.memory import answer
from model.networks import SliceVertebraUNet, VertebraUNet
from model.pose import about_long_axis, middle_of_box, turned_by_deg
from model.resample import (
    AIR_HU,
    average_pool,
    body_volume,
    crop_to_box,
    index_range,
    lps_grid,
    pool_factors,
    pooled_grid,
    sample,
)
from model.volume import Volume

LAST_LEVEL = len(LEVELS) + 3
"""T3, the last label the networks know."""

REFINED_MARGIN_MM = 12.0
"""How far beyond the vertebrae that the coarse network found the refiner looks."""

NO_BONE_LOGIT = -2.0
"""Where the coarse network is surer than this that there is no vertebra, the refiner is not believed: alone, it takes
the skull base for C1. On drawn necks: Dice of C1 from 0.56 to 0.68, the others unchanged."""

LEAN_DEG, TILT_DEG = 25.0, 10.0
"""A neck that leans forward or back, or to a side, by more than this is stood upright, too: the networks number best
what is. Each vertebra is taken from that look in which it stands more upright, since a head is held upright on a neck
that leans."""

ON_THE_SIDE_DEG = 45.0
"""Of a patient who is turned by so much about the long axis, both sides of the midplane are tried for the front."""

NEAR_END_MM = 9.0
"""A vertebra that comes so near to the last slice lies at it."""

OUTSIDE = torch.tensor([-8.0, 0.0])[:, None, None, None]
"""Scores where nothing was looked at."""

NEAR_MM = 3.0
"""Bone this close to a numbered vertebra belongs to it, if it is none of its own."""

MIN_VERTEBRAE = 3
"""A shorter chain might as well have other numbers. It is drawn only from C1 on, which has a shape of its own: in a CT
of the chest, parts of T11 to L1 had been called C2 and C3."""

MIN_VOLUME_MM3, MAX_VOLUME_MM3 = 800.0, 50_000.0
"""Less or more than this of a vertebra is not called found: C1 has about 8,000 and more, C2 up to 25,000 or so."""

NEIGHBOUR_DISTANCE_MM = (4.0, 45.0)
"""How far apart the centroids of neighbouring vertebrae may lie."""

CUT_AREA_MM2 = 12.0
"""A vertebra with this much of its cross-section on a border of the volume counts as cut by the field of view."""

SPECK_SHARE = 0.1
"""Parts smaller than this share of a level's largest part are not drawn."""

PIECE_SHARE = 0.35
"""A second piece at least this large beside the largest is of the vertebra too: the ring of C1 may well be in two."""

SLAB = 16
"""Slices drawn on the source grid at a time."""

BONE_HU, BONE_WEIGHT, REFINED_BONE_WEIGHT = 200.0, 1.5, 0.75
"""Where the outline is in doubt, voxels brighter than BONE_HU join the bone and darker ones leave it. On phantoms this
lifts the mean Dice of a coarse outline from 0.81 to 0.89 (training/LOG.md); a refined one needs it less."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Vertebra:
    """One found level. lower_lps_mm, upper_lps_mm: its box in the patient. is_cut: the field of view ends inside it.

    twist_deg: how far the patient lies turned about the long axis, from the front to the left above 0; 0 for little.
    middle_lps_mm: of its box, seen as the patient faces forward (`middle_of_box`).
    """

    label: int
    centroid_lps_mm: FloatArray
    volume_mm3: float
    lower_lps_mm: FloatArray
    upper_lps_mm: FloatArray
    middle_lps_mm: FloatArray
    is_cut: bool
    twist_deg: float = 0.0

    @property
    def height_mm(self) -> float:
        """Of its box, along the patient."""
        return float(self.upper_lps_mm[2] - self.lower_lps_mm[2])


def network_input(voxels_hu: Tensor) -> Tensor:
    """The U-Net's input `(2, Z, Y, X)`: HU `(Z, Y, X)` through a wide and a soft-tissue window."""
    return torch.stack([((voxels_hu - 200) / 400).clamp(-2, 3), ((voxels_hu - 100) / 150).clamp(-2, 2)])


def refiner_input(voxels_hu: Tensor, logit: Tensor, level: Tensor) -> Tensor:
    """The refiner's input `(4, Z, Y, X)`: the U-Net's two windows, and what it thought: vertebra 0..1, and the level
    there.

    All `(Z, Y, X)` on the refiner's grid.
    """
    vertebra = logit.sigmoid()
    there = torch.where(vertebra > 0.1, (level - 4.5) / 3, 0.0)
    return torch.cat([network_input(voxels_hu), torch.stack([vertebra, there])])


def find_vertebrae(
    volume: Volume,
    network: VertebraUNet | SliceVertebraUNet,
    settings: SegmentSettings,
    device: torch.device,
    refiner: VertebraUNet | None = None,
    refine: RefineSettings | None = None,
) -> tuple[NDArray[np.uint8], list[Vertebra]]:
    """Labels on the source grid, uint8 `(Z, Y, X)`, 0 and 1..7 = C1..C7, and what was found, head to foot."""
    scanned = _coarse(volume, network, settings, device)
    goes_on = settings.continued_mm > 0 and _ends_in_neck(scanned)
    if goes_on:
        scanned = _coarse(volume, network, settings, device, goes_on=True)
    scanned, twist_deg = _facing_forward(scanned, network, settings, device, goes_on=goes_on)
    looks, turn = [scanned], _to_upright(scanned)
    if turn is not None:
        upright = _coarse(_turned(scanned.volume, turn), network, settings, device, goes_on=goes_on)
        if upright.found.any():  # or what leaned was no neck: then the first look counts
            looks.append(upright)
    bone_weight = BONE_WEIGHT
    if refiner is not None and refine is not None and scanned.found.any():
        looks = [_refined(look, refiner, refine, device) for look in looks]
        bone_weight = REFINED_BONE_WEIGHT
    look = looks[0]
    if turn is not None and len(looks) > 1:
        look = _joined(looks[0], looks[1], turn, _share_as_scanned(scanned, turn))
    labels = np.zeros(volume.grid.shape, np.uint8)
    if not look.found.any():
        return labels, []
    part = _draw(labels, look, bone_weight)
    vertebrae = _describe(labels, volume.grid, part, twist_deg)
    if len(vertebrae) < MIN_VERTEBRAE and not (vertebrae and vertebrae[0].label == 1):
        return np.zeros_like(labels), []
    return labels, vertebrae


@dataclass(frozen=True, kw_only=True, eq=False)
class _Look:
    """What a network says of a volume, in whatever pose that is: scores `(2, Z, Y, X)` and their grid."""

    volume: Volume
    scores: Tensor
    grid: Grid

    @cached_property
    def chain(self) -> tuple[Tensor, NDArray[np.bool_]]:
        """The scores without what is outside the chain, and its voxels (`one_chain`)."""
        return one_chain(self.scores, self.grid)

    @property
    def found(self) -> NDArray[np.bool_]:
        """The voxels of the chain."""
        return self.chain[1]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The level of each voxel of the chain; 0 elsewhere."""
        return np.where(self.found, self.chain[0][1].round().clamp(1, LAST_LEVEL), 0).astype(np.uint8)

    @property
    def num_levels(self) -> int:
        """How many of C1..C7 the chain holds."""
        return len(np.intersect1d(self.labels, np.arange(1, len(LEVELS) + 1)))

    @property
    def certainty(self) -> float:
        """Mean logit of bone in the chain; 0 without one."""
        return float(self.scores[0].numpy()[self.found].mean()) if self.found.any() else 0.0

    def centroid_lps_mm(self, first: float, last: float) -> FloatArray | None:
        """Of the chain from one level coordinate to another; None if there is nothing."""
        level = self.chain[0][1].numpy()
        part = self.found & (level >= first) & (level < last)
        return self.grid.to_lps_mm(np.argwhere(part).mean(axis=0)) if part.any() else None


def _coarse(
    volume: Volume,
    network: VertebraUNet | SliceVertebraUNet,
    settings: SegmentSettings,
    device: torch.device,
    *,
    goes_on: bool = False,
) -> _Look:
    """Of the whole body. goes_on: the network sees it `continued`."""
    continued_mm = settings.continued_mm if goes_on else 0.0
    hu, grid = body_volume(volume.voxels_hu, volume.grid, settings.spacing_mm, network.stride, continued_mm)
    scores = answer(network, network_input(hu)[None], device)[-1][0]
    if goes_on:
        plane = volume.grid.to_index(grid.to_lps_mm(np.argwhere(np.ones(grid.shape, bool)).astype(float)))[:, 0]
        added = (plane < -0.5) | (plane > volume.grid.shape[0] - 0.5)
        scores = torch.where(torch.from_numpy(added.reshape(grid.shape)), OUTSIDE, scores)
    return _Look(volume=volume, scores=scores, grid=grid)


def _ends_in_neck(look: _Look) -> bool:
    """Whether the slices end, towards the feet, before the chain has come to the thoracic vertebrae."""
    if not look.found.any():
        return False
    where, grid = np.argwhere(look.found), look.volume.grid
    plane = grid.to_index(look.grid.to_lps_mm(where.astype(float)))[:, 0]
    from_end = plane if grid.affine[2, 0] > 0 else grid.shape[0] - 1 - plane
    level = look.scores[1].numpy()[tuple(where[from_end * grid.spacing_mm[0] < NEAR_END_MM].T)]
    return level.size > 0 and float(np.median(level)) < len(LEVELS) + 0.5


def _turned(volume: Volume, turn: FloatArray) -> Volume:
    """The volume as of a patient who was turned, `(4, 4)`, in LPS mm."""
    return replace(volume, grid=Grid(shape=volume.grid.shape, affine=turn @ volume.grid.affine))


def _facing_forward(
    scanned: _Look,
    network: VertebraUNet | SliceVertebraUNet,
    settings: SegmentSettings,
    device: torch.device,
    *,
    goes_on: bool,
) -> tuple[_Look, float]:
    """The look at the patient turned to face forward, and how far turned he lies; as scanned, and 0, if he is not or
    if fewer levels are found so: then the angle was misread.
    """
    twist_deg = turned_by_deg(scanned.labels, scanned.grid)
    if not twist_deg:
        return scanned, 0.0
    # A mirror does not tell front from back. Of the right one the network is surer.
    angles = [twist_deg] if abs(twist_deg) < ON_THE_SIDE_DEG else [twist_deg, twist_deg - np.copysign(180, twist_deg)]
    looks = [
        _coarse(_turned(scanned.volume, about_long_axis(-angle)), network, settings, device, goes_on=goes_on)
        for angle in angles
    ]
    best = int(np.argmax([look.certainty for look in looks]))
    if looks[best].num_levels < scanned.num_levels:
        return scanned, 0.0
    return looks[best], float(angles[best])


def _to_upright(look: _Look) -> FloatArray | None:
    """The turn of the patient `(4, 4)` that stands the cervical spine upright; None if it does or little is found."""
    upper, lower = look.centroid_lps_mm(1.5, 4.5), look.centroid_lps_mm(5.5, 8.5)
    if upper is None or lower is None:
        return None
    up = (upper - lower) / np.linalg.norm(upper - lower)
    off_deg = np.rad2deg(np.arctan2(up, up[2]))[:2]
    leans = np.abs(off_deg) > (TILT_DEG, LEAN_DEG)
    if not leans.any():
        return None
    aim = np.where(leans, 0.0, up[:2])
    aim = np.append(aim, np.sqrt(1 - aim @ aim))
    turn = np.eye(4)
    turn[:3, :3] = Rotation.align_vectors(aim, up)[0].as_matrix()
    return turn


def _share_as_scanned(scanned: _Look, turn: FloatArray) -> FloatArray:
    """For C1..C7, 1 where a vertebra stands more upright as scanned than turned, or else 0."""
    shares = []
    for label in range(1, len(LEVELS) + 1):
        above, below = (scanned.centroid_lps_mm(at - 0.5, at + 0.5) for at in (max(label - 1, 1), label + 1))
        shares.append(
            float(above is not None and below is not None and (above - below) @ (np.array([0, 0, 1]) - turn[2, :3]) > 0)
        )
    return np.array(shares)


def _joined(scanned: _Look, upright: _Look, turn: FloatArray, share_as_scanned: FloatArray) -> _Look:
    """Both looks in one, on the grid of the upright one: by the level, shares of the one and the other."""
    grid = upright.grid
    there = Grid(shape=grid.shape, affine=np.linalg.inv(turn) @ grid.affine)
    scores = sample(scanned.scores - OUTSIDE, scanned.grid, there) + OUTSIDE
    level = upright.scores[1].numpy()
    share = torch.from_numpy(np.interp(level, np.arange(1, len(LEVELS) + 1), share_as_scanned).astype(np.float32))
    return _Look(volume=upright.volume, scores=share * scores + (1 - share) * upright.scores, grid=grid)


def _refined(coarse: _Look, refiner: VertebraUNet, settings: RefineSettings, device: torch.device) -> _Look:
    """What the refiner says around C1..T1 as the coarse scores have them."""
    volume, (scores, found) = coarse.volume, coarse.chain
    wanted = found & (scores[1].numpy() < len(LEVELS) + 1.5)
    where = coarse.grid.to_lps_mm(np.argwhere(wanted if wanted.any() else found).astype(float))
    grid = lps_grid(
        lower_lps_mm=where.min(axis=0) - REFINED_MARGIN_MM,
        upper_lps_mm=where.max(axis=0) + REFINED_MARGIN_MM,
        spacing_mm=settings.spacing_mm,
        multiple=refiner.stride,
    )
    corner = np.asarray(grid.shape, float) - 1
    ends = grid.to_lps_mm(np.array([[0.0, 0.0, 0.0], corner]))
    part, part_grid = crop_to_box(volume.voxels_hu, volume.grid, ends.min(axis=0), ends.max(axis=0))
    factors = pool_factors(part_grid, settings.spacing_mm)
    hu = sample((average_pool(part, factors) - AIR_HU)[None], pooled_grid(part_grid, factors), grid)[0] + AIR_HU
    logit, level = sample(scores - OUTSIDE, coarse.grid, grid) + OUTSIDE
    fine = answer(refiner, refiner_input(hu, logit, level)[None], device)[-1][0]
    fine[0] = torch.where(logit < NO_BONE_LOGIT, -8.0, fine[0])
    return _Look(volume=volume, scores=fine, grid=grid)


def one_chain(scores: Tensor, grid: Grid) -> tuple[Tensor, NDArray[np.bool_]]:
    """Scores `(2, Z, Y, X)` with everything outside one chain of neighbouring vertebrae erased, and its voxels.

    A level is its largest component, and others nearly as large. A chain goes on while the next level lies at a
    plausible distance on the right side; levels beyond a gap are dropped, since their numbers cannot be trusted.
    The level coordinate is continued outward from the bone, so that interpolation at its surface means something.
    """
    bone = (scores[0] > 0).numpy()
    labels = np.where(bone, scores[1].round().clamp(1, LAST_LEVEL).numpy().astype(np.uint8), 0)
    parts = {part.label: part for part in _parts(labels) if part.size * grid.voxel_volume_mm3 >= MIN_VOLUME_MM3}
    found = np.zeros(bone.shape, bool)
    for label in _chain(parts, grid):
        found[parts[label].box] |= parts[label].mask
    if not found.any():
        return scores, found
    nearest = distance_transform_edt(~found, sampling=grid.spacing_mm, return_distances=False, return_indices=True)
    level = scores[1].numpy().ravel()[np.ravel_multi_index(tuple(nearest), found.shape)]
    logit = scores[0].numpy().copy()
    away = np.nonzero(bone & ~found)
    apart_mm = (nearest[(slice(None), *away)] - np.stack(away)) * np.array(grid.spacing_mm)[:, None]
    logit[away] = np.where(np.linalg.norm(apart_mm, axis=0) > NEAR_MM, -4.0, logit[away])
    return torch.from_numpy(np.stack([logit, level]).astype(np.float32)), found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """The largest component of a label, and others nearly as large: `mask` in `box`. centroid: in the whole grid."""

    label: int
    box: tuple[slice, ...]
    mask: NDArray[np.bool_]
    size: int
    centroid: FloatArray


def _parts(labels: NDArray[np.uint8]) -> Iterator[_Part]:
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            mask = _large_components(labels[box] == label, PIECE_SHARE)
            size = int(mask.sum())
            start = np.array([side.start for side in box], float)
            yield _Part(label=label, box=box, mask=mask, size=size, centroid=start + _mean_index(mask, size))


def _chain(parts: dict[int, _Part], grid: Grid) -> list[int]:
    """The labels of the chain of neighbours that has the most cervical ones; of chains with as many the largest."""
    centroids = {label: grid.to_lps_mm(part.centroid) for label, part in parts.items()}
    chains: list[list[int]] = []
    for label in sorted(parts):
        if chains and chains[-1][-1] == label - 1 and _are_neighbours(centroids[label - 1], centroids[label]):
            chains[-1].append(label)
        else:
            chains.append([label])

    def rank(chain: list[int]) -> tuple[int, int]:
        return sum(label <= len(LEVELS) for label in chain), sum(parts[label].size for label in chain)

    return max((chain for chain in chains if chain[0] <= len(LEVELS)), key=rank, default=[])


def _are_neighbours(upper_lps_mm: FloatArray, lower_lps_mm: FloatArray) -> bool:
    """Whether they lie at a plausible distance, the right one above."""
    near, far = NEIGHBOUR_DISTANCE_MM
    apart = lower_lps_mm - upper_lps_mm
    return bool(near <= np.linalg.norm(apart) <= far and apart[2] <= 0)


def _large_components(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """The face-connected parts of a mask that have at least this share of the largest one's voxels."""
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = (sizes >= share * sizes.max())[components]
    return kept


def _draw(labels: NDArray[np.uint8], look: _Look, bone_weight: float) -> tuple[slice, ...]:
    """Fills `labels` on the source grid from coarser scores: interpolated, sharpened by the voxel's own HU.

    Gives the part of the grid outside which nothing was drawn.
    """
    volume, (scores, found) = look.volume, look.chain
    where = look.grid.to_lps_mm(np.argwhere(found).astype(float))
    margin_mm = 1.5 * look.grid.spacing_mm[0]
    first, last = index_range(volume.grid, where.min(axis=0) - margin_mm, where.max(axis=0) + margin_mm, margin=0)
    # Elsewhere no brightness makes bone of it. Interpolation reaches as far as the next coarse voxel.
    near_bone = np.argwhere((scores[0] > -bone_weight).numpy()).astype(float)
    indices = volume.grid.to_index(look.grid.to_lps_mm(near_bone))
    reach = np.abs(np.linalg.inv(volume.grid.affine[:3, :3]) @ look.grid.affine[:3, :3]).sum(axis=1)
    inner = scores - OUTSIDE
    for z in range(first[0], last[0], SLAB):
        top = min(z + SLAB, last[0])
        inside = indices[(indices[:, 0] > z - reach[0]) & (indices[:, 0] < top + reach[0])]
        if not len(inside):
            continue
        y0, x0 = np.maximum(first, np.floor(inside.min(axis=0) - reach).astype(int))[1:]
        y1, x1 = np.minimum(last, np.ceil(inside.max(axis=0) + reach).astype(int) + 1)[1:]
        if y0 >= y1 or x0 >= x1:
            continue
        part = volume.grid.part(np.array([z, y0, x0]), (int(top - z), int(y1 - y0), int(x1 - x0)))
        fine = sample(inner, look.grid, part) + OUTSIDE
        hu = torch.from_numpy(volume.voxels_hu[z:top, y0:y1, x0:x1].astype(np.float32))
        logit = fine[0] + bone_weight * ((hu - BONE_HU) / 100).clamp(-1, 1)
        level = fine[1].round().clamp(1, LAST_LEVEL).to(torch.uint8)
        drawn = torch.where((logit > 0) & (hu > AIR_HU), level, 0)
        labels[z:top, y0:y1, x0:x1] = torch.where(drawn > len(LEVELS), 0, drawn).numpy()
    drawn_in = tuple(slice(int(start), int(stop)) for start, stop in zip(first, last, strict=True))
    for label, box in _boxes(labels, drawn_in):
        part_labels = labels[box]
        mine = part_labels == label
        part_labels[mine & ~_large_components(mine, SPECK_SHARE)] = 0
    return drawn_in


def _boxes(labels: NDArray[np.uint8], part: tuple[slice, ...]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """The labels of C1..C7 that are there, all inside `part`, and the box of each in the whole grid."""
    for label, box in enumerate(ndimage.find_objects(labels[part], max_label=len(LEVELS)), start=1):
        if box is not None:
            sides = zip(box, part, strict=True)
            yield label, tuple(slice(side.start + of.start, side.stop + of.start) for side, of in sides)


def _describe(labels: NDArray[np.uint8], grid: Grid, part: tuple[slice, ...], twist_deg: float) -> list[Vertebra]:
    """What was drawn, measured on the source grid, head to foot. part: nothing was drawn outside it."""
    vertebrae = []
    for label, box in _boxes(labels, part):
        mask = labels[box] == label
        num_voxels = int(mask.sum())
        volume_mm3 = num_voxels * grid.voxel_volume_mm3
        if not MIN_VOLUME_MM3 <= volume_mm3 <= MAX_VOLUME_MM3:
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
                middle_lps_mm=middle_of_box(points, twist_deg),
                is_cut=_is_cut(mask, box, grid),
                twist_deg=twist_deg,
            )
        )
    return vertebrae


def _mean_index(mask: NDArray[np.bool_], num_voxels: int) -> FloatArray:
    sums = [mask.sum(axis=others) @ np.arange(mask.shape[axis]) for axis, others in enumerate(((1, 2), (0, 2), (0, 1)))]
    return np.array(sums, float) / num_voxels


def _is_cut(mask: NDArray[np.bool_], box: tuple[slice, ...], grid: Grid) -> bool:
    """Whether the mask of a vertebra, in its box of the grid, lies on a border of the grid."""
    for axis, side in enumerate(box):
        pixel_mm2 = float(np.prod(np.delete(grid.spacing_mm, axis)))
        for end, is_border in ((0, side.start == 0), (-1, side.stop == grid.shape[axis])):
            if is_border and np.take(mask, end, axis=axis).sum() * pixel_mm2 > CUT_AREA_MM2:
                return True
    return False
