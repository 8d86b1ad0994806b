"""Vertebra labels for real necks from a network that cannot count yet: its local order, anchored where contours are
sure.

The network knows bone and tells one vertebra from the next before it numbers them rightly. Along the cord's contour its
level is read in front of the canal, where bodies and discs alternate; a dynamic programme cuts this profile into
C2..T2, with the anatomy's usual lengths, discs where the profile has them, and C2's top tied to the end of the
brainstem's contour. The cuts say by how much the network is off, and its level is corrected voxel by voxel.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import FloatArray, Grid
from training.necks.openkbp import OUTLINE_KNOWN, OUTLINE_SOME_BONE, OUTLINE_UNKNOWN, RealNeck
from training.necks.synthetic import AUX_SKULL, AUX_UNKNOWN

STEP_MM = 1.5
LENGTHS_MM = np.array([36.0, 13.8, 13.5, 13.5, 13.8, 15.5, 17.5, 18.5])
"""Of C2 (with its dens), C3..C7, T1, T2 with the disc below, along the canal: usual adult lengths, which each neck
may scale by 0.85 to 1.16."""

LENGTH_SPREAD = 0.16
"""Standard deviation as a share of the length."""

TOP_SPREAD_MM = 7.0
"""Of C2's top about the lower end of the brainstem's contour."""

BODY_HU = 110.0
"""Marrow is brighter than this nearly everywhere, discs and muscles are not."""

SKULL_ABOVE_MM = 9.0
"""This far above the dens, bone is skull."""

MIN_LEVELS = 5
"""Levels that must be cut and agree for a neck to be used."""

OWN_SCALE, OWN_UNEVEN = (0.8, 1.22), (0.68, 1.4)
"""Of the network's own borders: how large a neck may be beside LENGTHS_MM, and each of its levels beside the others."""

ONCE_MM = 6.0
"""Where the network's level passes from one number to the next more than once, further apart than this, it does not
know."""


CanalCoordinates = tuple[FloatArray, FloatArray, FloatArray]
"""Of each voxel: mm along the canal from the profile's first point, in front of it, and to its side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """Along the canal, head to foot, every STEP_MM: what lies 6 to 16 mm in front of it.

    points, forward: LPS mm `(n, 3)`. hu, bone (share of vertebra) and level `(n,)`; level is NaN where there is no
    bone. top_mm: position along the profile of the brainstem's lower end.
    """

    points: FloatArray
    forward: FloatArray
    hu: FloatArray
    bone: FloatArray
    level: FloatArray
    top_mm: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """Borders of C2, C3, ... along the profile, mm, and how good they are.

    borders_mm: `(m + 1,)` for m levels. contrast: mean HU of bodies over that of discs, in standard deviations. off:
    by how much the network's level is off for each level, `(m,)`.
    """

    borders_mm: FloatArray
    contrast: float
    off: FloatArray
    cost: float


def profile(neck: RealNeck, logit: NDArray[np.float32], level: NDArray[np.float32]) -> Profile | None:
    """The profile of a neck; None where cord or brainstem are not contoured."""
    if len(neck.cord_lps_mm) < 20 or np.isnan(neck.brainstem_end_mm):
        return None
    line = neck.cord_lps_mm[::-1]
    step = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0], np.cumsum(step)])
    above_mm = 40.0
    tangent_top = (line[0] - line[min(10, len(line) - 1)]) / np.linalg.norm(line[0] - line[min(10, len(line) - 1)])
    at = np.arange(-above_mm, along[-1], STEP_MM)
    points = np.stack([np.interp(at, along, line[:, axis]) for axis in range(3)], axis=1)
    points[at < 0] = line[0] - at[at < 0, None] * tangent_top
    points = ndimage.gaussian_filter1d(points, 4, axis=0, mode="nearest")
    tangent = np.gradient(points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    side = np.array([1.0, 0.0, 0.0])
    forward = np.cross(side, tangent)
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    forward *= np.where(forward[:, 1:2] > 0, -1, 1)
    offsets = np.array([(a, b) for a in np.arange(8, 17, 2.0) for b in (-5.0, -2.5, 0.0, 2.5, 5.0)])
    places = points[:, None] + offsets[None, :, :1] * forward[:, None] + offsets[None, :, 1:] * side
    index = neck.grid.to_index(places)

    def read(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(ndimage.map_coordinates(voxels, np.moveaxis(index, -1, 0), order=1, mode="nearest"))

    vertebra = 1 / (1 + np.exp(-read(logit)))
    mass = vertebra.sum(axis=1)
    levels = (vertebra * read(level)).sum(axis=1) / np.maximum(mass, 1e-3)
    bone = vertebra.mean(axis=1)
    below = np.flatnonzero(points[:, 2] < neck.brainstem_end_mm)
    return Profile(
        points=points,
        forward=forward,
        hu=ndimage.gaussian_filter1d(read(neck.hu.astype(np.float32)).mean(axis=1), 1.0),
        bone=bone,
        level=np.where(bone > 0.15, levels, np.nan),
        top_mm=STEP_MM * (below[0] if len(below) else 0),
    )


def cut_profile(found: Profile, trust: float) -> Cut | None:
    """The most likely borders of C2, C3, ... as far as the profile goes; None if it is too short.

    trust: how much the network's own numbers count beside lengths and anchors, 0 not at all.
    """
    best: Cut | None = None
    for scale in (0.85, 0.92, 1.0, 1.08, 1.16):
        cut = _cut(found, trust, LENGTHS_MM * scale, abs(np.log(scale)) / 0.12)
        if cut is not None and (best is None or cut.cost < best.cost):
            best = cut
    return best


def _cut(found: Profile, trust: float, lengths_mm: FloatArray, scale_cost: float) -> Cut | None:
    n = len(found.hu)
    disc = _disc_score(found)
    wrong = np.stack([np.nan_to_num((found.level - number) ** 2, nan=1.0).clip(max=4) for number in range(2, 10)])
    sums = np.concatenate([np.zeros((8, 1)), np.cumsum(wrong, axis=1)], axis=1) * trust * STEP_MM / 15
    position = np.arange(n) * STEP_MM
    cost = 0.5 * ((position - found.top_mm) / TOP_SPREAD_MM) ** 2
    back: list[NDArray[np.int64]] = []
    costs = [cost]
    last_usable = np.flatnonzero(found.bone > 0.15)
    if not len(last_usable):
        return None
    end = last_usable[-1]
    for number, length in enumerate(lengths_mm):
        gap = position[None, :] - position[:, None]
        spread = LENGTH_SPREAD * length if number else 0.13 * length
        fit = 0.5 * ((gap - length) / spread) ** 2
        fit = np.where((gap > 0.55 * length) & (gap < 1.5 * length), fit, np.inf)
        total = cost[:, None] + fit + sums[number][None, :n] - sums[number][:n, None]
        back.append(total.argmin(axis=0))
        cost = total.min(axis=0) - 2.0 * disc
        cost[end + 1 :] = np.inf
        costs.append(cost)
    for count in range(len(lengths_mm), MIN_LEVELS - 1, -1):
        if np.isfinite(costs[count]).any() and (
            count == len(lengths_mm) or position[end] - position[costs[count].argmin()] < 25
        ):
            break
    else:
        return None
    borders = [int(costs[count].argmin())]
    for number in range(count - 1, -1, -1):
        borders.append(int(back[number][borders[-1]]))
    borders = borders[::-1]
    off = np.array(
        [
            np.nanmedian(found.level[a + 1 : b]) - number if np.isfinite(found.level[a + 1 : b]).any() else np.nan
            for number, (a, b) in enumerate(pairwise(borders), start=2)
        ]
    )
    return Cut(
        borders_mm=np.array(borders) * STEP_MM,
        contrast=float(disc[borders[1:]].mean()),
        off=off,
        cost=float(costs[count].min() / count + scale_cost / count),
    )


def own_cut(found: Profile) -> Cut | None:
    """The borders that the network itself sees, where its level passes from one number to the next.

    For a network that numbers well already, and necks of which too little is in view for `cut_profile`. None where it
    sees fewer than MIN_LEVELS borders, or lengths that no neck has. `cost` and `contrast` are 0: they are not measured.
    """
    known = np.flatnonzero(np.isfinite(found.level))
    if not len(known):
        return None
    level = np.interp(np.arange(len(found.level)), known, found.level[known])
    level = ndimage.gaussian_filter1d(level, 1.5)
    borders = []
    for number in range(2, 2 + len(LENGTHS_MM) - 1):
        half = number + 0.5
        passes = np.flatnonzero((level[:-1] < half) & (level[1:] >= half))
        if not len(passes):
            break
        if np.ptp(passes) * STEP_MM > ONCE_MM:
            return None
        before = passes[-1]
        borders.append(STEP_MM * (before + (half - level[before]) / (level[before + 1] - level[before])))
    if len(borders) < MIN_LEVELS:
        return None
    relative = np.diff(borders) / LENGTHS_MM[1 : len(borders)]
    scale = float(np.median(relative))
    uneven = relative / scale
    if not OWN_SCALE[0] < scale < OWN_SCALE[1] or uneven.min() < OWN_UNEVEN[0] or uneven.max() > OWN_UNEVEN[1]:
        return None
    borders_mm = np.array([borders[0] - LENGTHS_MM[0] * scale, *borders])
    return Cut(borders_mm=borders_mm, contrast=0.0, off=np.zeros(len(borders)), cost=0.0)


def _disc_score(found: Profile) -> FloatArray:
    """Where bodies give way to discs: dark between bright, and the level half way between two numbers; about -1..2."""
    trend = ndimage.gaussian_filter1d(found.hu, 9 / STEP_MM)
    detail = ndimage.gaussian_filter1d(found.hu, 1.5 / STEP_MM) - trend
    spread = np.sqrt(ndimage.gaussian_filter1d(detail**2, 20 / STEP_MM)) + 15
    dark = (-detail / spread).clip(-1, 2)
    slope = np.abs(np.gradient(ndimage.gaussian_filter1d(np.nan_to_num(found.level, nan=0.0), 1.0))) / STEP_MM * 15
    steep = np.where(np.isnan(found.level), 0, (slope - 1).clip(-1, 2))
    return np.asarray(0.6 * dark + 0.4 * steep)


def relabelled(
    neck: RealNeck, logit: NDArray[np.float32], level: NDArray[np.float32], found: Profile, cut: Cut
) -> RealNeck:
    """The neck with vertebrae where the network sees them and with the numbers of the cut."""
    at = _canal_coordinates(neck.grid, found)
    numbers = np.arange(2, 2 + len(cut.off), dtype=float)
    good = np.isfinite(cut.off)
    seen = (numbers + cut.off)[good]
    order = np.argsort(seen)
    seen, numbers = seen[order], numbers[good][order]
    corrected = np.interp(level, seen, numbers)
    corrected = np.where(level < seen[0], level - seen[0] + numbers[0], corrected)
    corrected = np.where(level > seen[-1], level - seen[-1] + numbers[-1], corrected).clip(0.6, 10)
    vertebra = logit > 0
    corrected[_dens(at, cut) & vertebra & (corrected < 2.4)] = 2.0
    rounded = np.rint(corrected)
    unsure = (np.abs(corrected - rounded) > 0.36) | (np.abs(logit) < 0.7)
    inside = _between(at, cut)
    body, segment = _bodies(at, cut)
    body &= neck.hu > BODY_HU
    certainty = neck.certainty.copy()
    certainty[inside & (certainty != OUTLINE_KNOWN)] = OUTLINE_KNOWN
    certainty[inside & vertebra & (unsure | _may_be_arch(at, cut) & (rounded == 2))] = OUTLINE_SOME_BONE
    # The network may have missed bone: what is bright and was not seen is left open.
    certainty[inside & ~vertebra & (neck.hu > BODY_HU)] = OUTLINE_UNKNOWN
    certainty[body] = OUTLINE_KNOWN
    along, _, side = at
    skull = (along < cut.borders_mm[0] - SKULL_ABOVE_MM) & (np.abs(side) < 60)
    certainty[skull] = OUTLINE_KNOWN
    aux = neck.aux.copy()
    aux[skull & (neck.hu > 250) & (aux == AUX_UNKNOWN)] = AUX_SKULL
    share = np.where((inside & vertebra) | body, 255, 0).astype(np.uint8)
    rounded = np.where(body, segment, rounded)
    return RealNeck(
        name=neck.name,
        grid=neck.grid,
        hu=neck.hu,
        share=share,
        level=np.where(share > 0, rounded, 0).astype(np.uint8),
        aux=aux,
        certainty=certainty,
        cord_lps_mm=neck.cord_lps_mm,
        brainstem_end_mm=neck.brainstem_end_mm,
    )


def _bodies(at: CanalCoordinates, cut: Cut) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The cores of the vertebral bodies between the cuts, without discs and C2's upper part, and their numbers."""
    along, forward, side = at
    segment = np.searchsorted(cut.borders_mm, along) - 1
    place = np.clip(segment, 0, len(cut.off) - 1)
    to_disc = np.minimum(along - cut.borders_mm[place], cut.borders_mm[place + 1] - along)
    core = (
        (forward > 8)
        & (forward < 18)
        & (np.abs(side) < 8)
        & (to_disc > 2.5)
        & (segment >= 0)
        & (segment < len(cut.off))
    )
    core &= (segment > 0) | (along > cut.borders_mm[0] + 18)
    return core, place + 2


def _dens(at: CanalCoordinates, cut: Cut) -> NDArray[np.bool_]:
    """The core in front of the cord, from C2's top on down 20 mm: the dens, and not the ring around it."""
    along, forward, side = at
    top = float(cut.borders_mm[0])
    return (along > top - 3) & (along < top + 20) & (forward > 5) & (forward < 14) & (np.abs(side) < 6)


def _may_be_arch(at: CanalCoordinates, cut: Cut) -> NDArray[np.bool_]:
    """In front of the dens, where the anterior arch of C1 lies: in thick slices it looks as if it were of the dens."""
    along, forward, side = at
    top = float(cut.borders_mm[0])
    return (along > top - 8) & (along < top + 14) & (forward > 15) & (np.abs(side) < 12)


def _between(at: CanalCoordinates, cut: Cut) -> NDArray[np.bool_]:
    """From the skull to the last cut vertebra, near the canal: where labels are to be believed."""
    along, forward, side = at
    # Arches lie lower than their bodies: 12 mm more behind the canal would reach into a vertebra that was not cut.
    top, last = float(cut.borders_mm[0]), float(cut.borders_mm[-1]) - 4
    return (along > top - 8) & (along < last) & (np.abs(side) < 45) & (forward < 32) & (forward > -60)


def _canal_coordinates(grid: Grid, found: Profile) -> CanalCoordinates:
    """Of each voxel: mm along the canal, in front of it, and to its side."""
    index = np.rint(grid.to_index(found.points)).astype(int)
    usable = np.flatnonzero(((index >= 0) & (index < grid.shape)).all(axis=1))
    off_line, point = np.ones(grid.shape, bool), np.zeros(grid.shape, np.int64)
    off_line[tuple(index[usable].T)] = False
    point[tuple(index[usable].T)] = usable
    away = ndimage.distance_transform_edt(
        off_line, sampling=grid.spacing_mm, return_distances=False, return_indices=True
    )
    nearest = point[tuple(away)]
    offset = grid.to_lps_mm(np.stack(list(np.indices(grid.shape)), axis=-1).astype(float)) - found.points[nearest]
    tangent = np.gradient(found.points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    along = nearest * STEP_MM + (offset * tangent[nearest]).sum(axis=-1)
    return along, (offset * found.forward[nearest]).sum(axis=-1), offset[..., 0]
