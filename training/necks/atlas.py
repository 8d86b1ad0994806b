"""The SPL/NAC head and neck atlas as a body that can be drawn: its hand-made labels and what they lack.

The atlas (Open Anatomy, 2016) names 58 structures of one head and neck and holds no grey values. Added here: smooth
surfaces as signed distances, the body's outline, brain, lungs, airway, spinal canal and cord, and discs.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import FloatArray, Grid

SPACING_MM = 1.0
"""Of the grid everything is held on."""

CERVICAL = (11, 12, 13, 14, 15, 16, 17)
THORACIC = (21, 22, 23, 24, 36)
SKULL, MANDIBLE, HYOID = 10, 25, 9
OTHER_BONES = (1, 2, 26, 27, 28, 31, 32, 33, 34, 35)
CARTILAGE = (119, 120)
VESSELS = tuple(range(101, 118))

FIRST_THORACIC, NUM_VERTEBRAE = 8, 12
BONE_SKULL, BONE_MANDIBLE, BONE_OTHER = 13, 14, 15
"""Numbers of `Atlas.bones`: 1..7 = C1..C7, 8..12 = T1..T5, then these."""

AIR, FAT, MUSCLE, SKIN, BRAIN, LUNG, CORD, CSF, DISC, VESSEL, GLAND, CARTILAGE_TISSUE = range(12)
"""Numbers of `Atlas.tissues`: what fills the space between bones."""

MAX_DISTANCE_MM = 12.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Atlas:
    """All arrays `(Z, Y, X)` on `grid` (LPS, Z foot to head), SPACING_MM apart.

    bones: uint8, the nearest bone (within MAX_DISTANCE_MM), see the numbers above. distance_mm: float16, depth inside
    that bone's surface, negative outside. tissues: uint8. centres_lps_mm: `(12, 3)`, the middles of C1..T5.
    """

    bones: NDArray[np.uint8]
    distance_mm: NDArray[np.float16]
    tissues: NDArray[np.uint8]
    centres_lps_mm: FloatArray
    origin_lps_mm: FloatArray

    @property
    def grid(self) -> Grid:
        """The place of the voxels."""
        affine = np.zeros((4, 4))
        affine[[2, 1, 0], [0, 1, 2]] = SPACING_MM
        affine[:3, 3] = self.origin_lps_mm
        affine[3, 3] = 1
        z, y, x = self.bones.shape
        return Grid(shape=(z, y, x), affine=affine)


def load_atlas(labels: Path, cache: Path) -> Atlas:
    """The atlas built from its label map (`HN-Atlas-labels.nrrd`), or as an earlier call left it in `cache`."""
    if not cache.exists():
        atlas = build_atlas(labels)
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **{field.name: getattr(atlas, field.name) for field in fields(Atlas)})
        unfinished.replace(cache)
    with np.load(cache) as arrays:
        return Atlas(**{field.name: arrays[field.name] for field in fields(Atlas)})


def build_atlas(path: Path) -> Atlas:
    """Everything from the label map; half a minute."""
    labels, origin_lps_mm = _read(path)
    bones, distance_mm = _bones(labels)
    canal, centres = _canal(bones, distance_mm)
    tissues = _tissues(labels, bones, distance_mm, canal)
    return Atlas(
        bones=bones,
        distance_mm=distance_mm,
        tissues=tissues,
        centres_lps_mm=centres[:, ::-1] * SPACING_MM + origin_lps_mm,
        origin_lps_mm=origin_lps_mm,
    )


def _read(path: Path) -> tuple[NDArray[np.uint8], FloatArray]:
    """Labels `(Z, Y, X)` in LPS, resampled to SPACING_MM, and the place of the first voxel."""
    import nrrd

    stored, header = nrrd.read(str(path))
    directions = np.asarray(header["space directions"], float)
    if not np.allclose(directions, np.diag(np.diag(directions))):
        raise ValueError(f"{path} is not stored along the patient's axes: space directions {directions.tolist()}.")
    spacing_mm, first = np.abs(np.diag(directions)), np.asarray(header["space origin"], float)
    for axis in range(3):
        if directions[axis, axis] < 0:
            stored = np.flip(stored, axis)
            first[axis] += directions[axis, axis] * (stored.shape[axis] - 1)
    shape = [round(n * mm / SPACING_MM) for n, mm in zip(stored.shape, spacing_mm, strict=True)]
    picks = [
        np.minimum(np.rint(np.arange(n) * SPACING_MM / mm).astype(int), size - 1)
        for n, mm, size in zip(shape, spacing_mm, stored.shape, strict=True)
    ]
    return stored[np.ix_(*picks)].transpose(2, 1, 0).astype(np.uint8), first


def _bones(labels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """The nearest bone of each voxel and the signed distance to its surface, made smooth."""
    groups: list[tuple[int, ...]] = [(number,) for number in (*CERVICAL, *THORACIC, SKULL, MANDIBLE)]
    groups.append((*OTHER_BONES, HYOID))
    best = np.full(labels.shape, -MAX_DISTANCE_MM, np.float32)
    bones = np.zeros(labels.shape, np.uint8)
    for number, group in enumerate(groups, start=1):
        mask = np.isin(labels, group)
        if not mask.any():
            continue
        if number <= NUM_VERTEBRAE:
            components, _ = ndimage.label(mask, np.ones((3, 3, 3)))
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            mask = (sizes > 0.03 * sizes.max())[components]
        box = tuple(
            slice(max(side.start - 14, 0), side.stop + 14) for side in ndimage.find_objects(mask.astype(np.uint8))[0]
        )
        part = mask[box]
        inside = ndimage.distance_transform_edt(part) - ndimage.distance_transform_edt(~part)
        # The map was drawn slice by slice: its steps are smoothed, thin parts (arches, plates) are kept by their core.
        signed = SPACING_MM * ndimage.gaussian_filter(inside - np.sign(inside) * 0.5, 0.7)
        better = signed > best[box]
        best[box][better] = signed[better]
        bones[box][better] = number
    return bones, best.astype(np.float16)


def _canal(bones: NDArray[np.uint8], distance_mm: NDArray[np.float16]) -> tuple[FloatArray, FloatArray]:
    """Voxel indices `(n, 3)` of the middle of the canal, one a slice, head to foot, and the middles of C1..T5."""
    solid = distance_mm > 0
    points, centres = [], []
    for number in range(1, NUM_VERTEBRAE + 1):
        mask = solid & (bones == number)
        where = np.argwhere(mask)
        centres.append(where.mean(axis=0))
        outline = mask.any(axis=0)
        holes = (
            ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(outline, 8), iterations=3))[8:-8, 8:-8] & ~outline
        )
        holes = ndimage.binary_opening(holes, iterations=4)
        components, count = ndimage.label(holes)
        if count:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            y, x = np.argwhere(components == sizes.argmax()).mean(axis=0)
            points.append((where[:, 0].mean(), y, x))
    points_array = np.array(points)
    order = np.argsort(points_array[:, 0])
    z = np.arange(0, bones.shape[0])
    slope = np.polyfit(points_array[:3, 0], points_array[:3, 1:], 1)[0]  # goes on upward as it goes through C1..C3
    top = points_array[order[-1]]
    yx = np.stack([np.interp(z, points_array[order, 0], points_array[order, axis]) for axis in (1, 2)], axis=1)
    above = z > top[0]
    yx[above] = top[1:] + np.clip(z[above] - top[0], 0, 25)[:, None] * slope * 0.5
    yx = ndimage.gaussian_filter1d(yx, 6, axis=0)
    return np.column_stack([z, yx])[::-1], np.array(centres)


def _tissues(
    labels: NDArray[np.uint8], bones: NDArray[np.uint8], distance_mm: NDArray[np.float16], canal: FloatArray
) -> NDArray[np.uint8]:
    """What fills the space between bones, voxel by voxel."""
    around_spine = ((bones >= 1) & (bones <= NUM_VERTEBRAE) & (distance_mm > 0)).astype(np.uint8)
    near = ndimage.distance_transform_edt(ndimage.zoom(around_spine, 0.5, order=0) == 0) < 9  # 18 mm of muscle and fat
    wide = np.zeros(labels.shape, bool)
    doubled = near.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    z, y, x = map(min, doubled.shape, wide.shape)
    wide[:z, :y, :x] = doubled[:z, :y, :x]
    hull = _hull((labels > 0) | wide)
    tissues = np.where(hull, MUSCLE, AIR).astype(np.uint8)
    depth = ndimage.distance_transform_edt(hull)
    tissues[hull & (depth < 7)] = FAT
    tissues[hull & (depth < 2.5)] = SKIN
    tissues[np.isin(labels, (8, *range(51, 65)))] = MUSCLE
    tissues[np.isin(labels, (49, 50, 118))] = GLAND
    tissues[np.isin(labels, CARTILAGE)] = CARTILAGE_TISSUE
    tissues[np.isin(labels, VESSELS)] = VESSEL
    skull = (bones == BONE_SKULL) & (distance_mm > 0)
    for z in range(labels.shape[0]):
        if skull[z].any():
            closed = ndimage.binary_closing(np.pad(skull[z], 20), iterations=12)
            filled = ndimage.binary_fill_holes(closed)[20:-20, 20:-20]
            brain = ndimage.binary_opening(filled & ~skull[z], iterations=8)
            rear = np.arange(labels.shape[1])[:, None] > canal[::-1][z, 1] - 120
            tissues[z][brain & rear] = BRAIN
    _hollow(tissues, labels, bones, distance_mm, canal)
    _inside_canal(tissues, bones, distance_mm, canal)
    return tissues


def _hull(anything: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The body: what the labels enclose in each slice, 7 mm more, smooth."""
    hull = np.zeros_like(anything)
    for z in range(anything.shape[0]):
        here = anything[max(z - 4, 0) : z + 5].any(axis=0)
        if here.any():
            padded = np.pad(here, 45)
            disc = ndimage.distance_transform_edt(~padded) < 38
            hull[z] = ndimage.binary_fill_holes(ndimage.distance_transform_edt(disc) > 31)[45:-45, 45:-45]
    return np.asarray(ndimage.gaussian_filter(hull.astype(np.float32), 4) > 0.5)


def _hollow(
    tissues: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    bones: NDArray[np.uint8],
    distance_mm: NDArray[np.float16],
    canal: FloatArray,
) -> None:
    """Airway in front of the spine, and lungs inside the ribs."""
    y, x = np.indices(labels.shape[1:])
    vertebra = (bones >= 1) & (bones <= NUM_VERTEBRAE) & (distance_mm > 0)
    larynx = np.isin(labels, CARTILAGE)
    ribs = np.isin(labels, (31, 32, 33, 34, 35, 28))
    solid_near = distance_mm > -6
    front = []
    for z in range(labels.shape[0]):
        cy, cx = canal[::-1][z, 1:]
        rows = np.argwhere(vertebra[z][:, max(int(cx) - 8, 0) : int(cx) + 8])
        body = rows[rows[:, 0] < cy, 0]
        front.append(body.min() if len(body) else np.nan)
    front_y = np.array(front)
    known = ~np.isnan(front_y)
    front_y = ndimage.gaussian_filter1d(np.interp(np.arange(len(front_y)), np.flatnonzero(known), front_y[known]), 5)
    for z in range(labels.shape[0]):
        cx = canal[::-1][z, 2]
        cy = front_y[z] - 14
        if larynx[z].any():
            cy, cx = np.argwhere(larynx[z]).mean(axis=0)
        top = np.flatnonzero((bones == BONE_MANDIBLE).any(axis=(1, 2)))[-1]
        if z < top + 15:
            airway = ((y - cy) / 7) ** 2 + ((x - cx) / 9) ** 2 < 1
            tissues[z][airway & (distance_mm[z] < -1)] = AIR
        if ribs[z].sum() > 200 and z < np.flatnonzero((bones == FIRST_THORACIC).any(axis=(1, 2)))[-1]:
            cage = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(ribs[z] | vertebra[z], 30), iterations=28))
            cage = ndimage.binary_erosion(cage[30:-30, 30:-30], iterations=9)
            middle = np.abs(x - cx) < 26
            tissues[z][cage & ~middle & ~solid_near[z]] = LUNG


def _inside_canal(
    tissues: NDArray[np.uint8], bones: NDArray[np.uint8], distance_mm: NDArray[np.float16], canal: FloatArray
) -> None:
    """Discs between the bodies, then fluid and cord in the canal."""
    y, x = np.indices(tissues.shape[1:])
    spine = (bones >= 2) & (bones <= NUM_VERTEBRAE) & (distance_mm > 0)
    closed = ndimage.binary_closing(spine, structure=np.ones((9, 3, 3)), iterations=1) & ~spine
    for z in range(tissues.shape[0]):
        cy, cx = canal[::-1][z, 1:]
        from_canal = np.hypot(y - cy, x - cx)
        disc = closed[z] & (y < cy - 6) & (from_canal < 28) & (np.abs(x - cx) < 14)
        tissues[z][disc] = DISC
        if (tissues[z][from_canal < 4] == AIR).any():
            continue
        canal_here = (from_canal < 9) & (tissues[z] != DISC) & (tissues[z] != BRAIN)
        tissues[z][canal_here] = CSF
        tissues[z][(np.hypot((y - cy) / 0.85, x - cx) < 5.5) & canal_here] = CORD
