"""From an anatomy and a grid to Hounsfield units with ground truth.

Soft tissue is painted on the grid thinned to about a millimetre and interpolated; vertebrae are drawn voxel by voxel in
their boxes. Partial volume and the scanner's blur come from the width of every edge, so no convolution of the whole
volume is needed and thin cortex fades on coarse grids as in averaged CT.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, label, map_coordinates, uniform_filter1d

from model.geometry import Grid
from model.phantom.anatomy import Anatomy, Bone
from model.phantom.solids import (
    Box,
    Float32Array,
    Float64Array,
    combine,
    coordinates,
    coverage,
    evaluate,
    index_box,
    inner_box,
    inverse,
)
from model.phantom.tissues import Paint

AIR_HU = -1000.0
JOINT_GAP_MM = 1.3
"""Between the surfaces of neighbouring vertebrae: joint space with its cartilage."""
_PAINT_SPACING_MM = 1.25
_SMOOTH_SPACING_MM = 6.5
_FAR_OUTLINE_MM = 60.0
_PAD_MM = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Phantom:
    """A rendered patient and its truth, all arrays `(Z, Y, X)` on one grid.

    voxels_hu: int16. vertebrae: uint8, 0 background, 1..7 = C1..C7, 8 = T1. fractures: uint8, the level's number in
    the gap of a fracture, 0 elsewhere; gaps keep their vertebra's label in `vertebrae`.
    """

    voxels_hu: NDArray[np.int16]
    grid: Grid
    vertebrae: NDArray[np.uint8]
    fractures: NDArray[np.uint8]


def default_grid(
    anatomy: Anatomy,
    spacing_mm: tuple[float, float, float] = (0.8, 0.5, 0.5),
    shape: tuple[int, int, int] | None = None,
) -> Grid:
    """An axial grid from the skull base to T2 and across the whole neck; `shape`, if given, around its centre."""
    top, bottom = anatomy.place("C1"), anatomy.place("T1")
    lower, upper = bottom.lower_lps_mm[2] - 2.0, top.upper_lps_mm[2] + 24.0
    middle = anatomy.place("C4").centre_lps_mm
    centre = (middle[0], middle[1] - 6.0, (lower + upper) / 2)
    extent_mm = (upper - lower, 240.0, 256.0)
    if shape is None:
        z, y, x = (int(np.ceil(extent / step)) for extent, step in zip(extent_mm, spacing_mm, strict=True))
        shape = (z, y, x)
    return Grid.axial(shape=shape, spacing_mm=spacing_mm, centre_lps_mm=centre)


def render(anatomy: Anatomy, grid: Grid, *, noise_hu: float = 12.0, blur_mm: float = 0.6, seed: int = 0) -> Phantom:
    """The patient on a grid, which may be oblique, reversed, sheared, anisotropic or a small box.

    noise_hu: standard deviation in the neck; more between the shoulders. blur_mm: full width at half maximum of the
    scanner's point spread. seed: of the noise alone.

    Raises:
        ValueError: negative noise or blur.
    """
    if noise_hu < 0 or blur_mm < 0:
        raise ValueError(f"Noise is {noise_hu} HU and blur {blur_mm} mm; expected 0 or more of both.")
    to_patient = inverse(anatomy.pose) @ grid.affine
    voxels = _soft_tissue(anatomy, to_patient, grid.shape, blur_mm)
    vertebrae = np.zeros(grid.shape, np.uint8)
    fractures = np.zeros(grid.shape, np.uint8)
    _draw_bones(anatomy, to_patient, blur_mm, voxels, vertebrae, fractures)
    stored = _with_noise(voxels, anatomy, to_patient, noise_hu, np.random.default_rng([anatomy.seed, 3, seed]))
    return Phantom(voxels_hu=stored, grid=grid, vertebrae=vertebrae, fractures=fractures)


def _edge_mm(to_patient: Float64Array, blur_mm: float) -> float:
    """Width of a smooth step that equals the scanner's blur and the averaging over a voxel."""
    spacing = np.linalg.norm(to_patient[:3, :3], axis=0)
    variance = (blur_mm / 2.355) ** 2 + float(np.mean(spacing**2)) / 12
    return 4.4 * float(np.sqrt(variance))


def _thinned(
    to_patient: Float64Array, shape: tuple[int, ...], spacing_mm: float
) -> tuple[list[int], Float64Array, tuple[int, int, int]]:
    """Whole steps per axis that bring the spacing near spacing_mm, the thinned grid's map and its shape."""
    spacing = np.linalg.norm(to_patient[:3, :3], axis=0)
    steps = [max(1, int(spacing_mm / value + 1e-6)) for value in spacing]
    z, y, x = ((size - 1 + step - 1) // step + 1 if step > 1 else size for size, step in zip(shape, steps, strict=True))
    return steps, to_patient @ np.diag([*steps, 1.0]), (z, y, x)


def _stretched(values: Float32Array, steps: list[int], shape: tuple[int, ...]) -> Float32Array:
    """Linear interpolation of a thinned array back to `shape`."""
    for axis, (step, size) in enumerate(zip(steps, shape, strict=True)):
        if step == 1:
            continue
        first = np.moveaxis(values, axis, 0)
        full = np.empty((size, *first.shape[1:]), np.float32)
        for offset in range(step):
            target = full[offset::step]
            count = len(target)
            if offset == 0:
                target[:] = first[:count]
                continue
            share = np.float32(offset / step)
            np.multiply(first[1 : count + 1], share, out=target)
            target += first[:count] * (1 - share)
        values = np.moveaxis(full, 0, axis)
    return np.ascontiguousarray(values)


def _soft_tissue(
    anatomy: Anatomy, to_patient: Float64Array, shape: tuple[int, int, int], blur_mm: float
) -> Float32Array:
    """Everything but the spine, painted on a thinned grid."""
    steps, thin, thin_shape = _thinned(to_patient, shape, _PAINT_SPACING_MM)
    canvas = np.full(thin_shape, AIR_HU, np.float32)
    edge = _edge_mm(thin, blur_mm)
    to_index = inverse(thin)
    whole = (slice(0, thin_shape[0]), slice(0, thin_shape[1]), slice(0, thin_shape[2]))
    body = _paint_distance(anatomy.outline, thin, whole)
    _layer(anatomy.outline, body, edge, canvas)
    under_skin = None if float(body.max()) < -20 else coverage(body + np.float32(2.6), edge + 1.0)
    for paint in anatomy.tissues:
        box = index_box(paint.corners_mm, to_index, thin_shape, edge)
        if box is None:
            continue
        distance = _paint_distance(paint, thin, box)
        within = under_skin[box] if paint.flesh and under_skin is not None else None
        _layer(paint, distance, edge, canvas[box], within)
    return _stretched(canvas, steps, shape)


def _paint_distance(paint: Paint, to_patient: Float64Array, box: Box) -> Float32Array:
    if len(paint.solids) == 1 and not paint.smooth:
        return evaluate(paint.solids[0], to_patient, box)
    parts = [(solid, paint.blend_mm, False) for solid in paint.solids]
    if not paint.smooth:
        return combine(parts, to_patient, box)
    shifted = to_patient.copy()
    shifted[:, 3] = to_patient @ np.array([*(part.start for part in box), 1.0])
    size = (box[0].stop - box[0].start, box[1].stop - box[1].start, box[2].stop - box[2].start)
    steps, thin, thin_shape = _thinned(shifted, size, _SMOOTH_SPACING_MM)
    whole = (slice(0, thin_shape[0]), slice(0, thin_shape[1]), slice(0, thin_shape[2]))
    return _stretched(combine(parts, thin, whole, far_mm=_FAR_OUTLINE_MM), steps, size)


def _layer(
    paint: Paint, distance: Float32Array, edge_mm: float, view: Float32Array, within: Float32Array | None = None
) -> None:
    """Paint the layers over `view`, in place, only where `within` (0..1) allows."""
    for depth_mm, hu in paint.layers:
        share = coverage(distance + np.float32(depth_mm), edge_mm)
        if within is not None:
            share *= within
        share *= np.float32(hu) - view
        view += share


def _draw_bones(
    anatomy: Anatomy,
    to_patient: Float64Array,
    blur_mm: float,
    voxels: Float32Array,
    vertebrae: NDArray[np.uint8],
    fractures: NDArray[np.uint8],
) -> None:
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    to_index = inverse(to_patient)
    solids: list[tuple[Bone, Box, Float64Array, Float32Array]] = []
    for bone in anatomy.bones:
        box = index_box(bone.corners_mm, to_index, shape, _PAD_MM)
        if box is not None:
            to_bone = inverse(bone.to_patient) @ to_patient
            solids.append((bone, box, to_bone, _displaced(bone, to_bone, box)))
    intact = [distance.copy() for _, _, _, distance in solids]
    for number in range(len(solids) - 1):
        _open_joint(solids[number], solids[number + 1], intact[number], intact[number + 1])
    edge = _edge_mm(to_patient, blur_mm)
    for bone, box, to_bone, distance in solids:
        hu = _bone_hu(bone, to_bone, box, distance, edge, anatomy)
        share = coverage(distance, edge)
        inside = _without_crumbs(distance < 0)
        for crack in bone.cracks:
            across, beyond = crack.across_mm(to_bone, box)
            gap = coverage(np.abs(across) - np.float32(crack.width_mm / 2), edge) * coverage(beyond, 2.0)
            hu += gap * (np.float32(45.0) - hu)
            # A gap thinner than a voxel still belongs to the voxels its surface runs through.
            normal = (crack.to_local @ to_bone)[2, :3]
            reach = max(crack.width_mm / 2, 0.5 * float(np.linalg.norm(normal)))
            if bone.label:
                fractures[box][inside & (np.abs(across) <= reach) & (beyond < 0)] = bone.label
        if bone.label:
            vertebrae[box][inside] = bone.label
        view = voxels[box]
        view += share * (hu - view)


def _without_crumbs(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without pieces of a few voxels, which joints can shear off a rim."""
    pieces, num_pieces = label(mask, np.ones((3, 3, 3)))
    if num_pieces < 2:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray((sizes > 0.01 * sizes.max())[pieces])


def _displaced(bone: Bone, to_bone: Float64Array, box: Box) -> Float32Array:
    """Distance of the bone with the far side of each fracture slightly out of place."""
    parts = [(part.solid, part.blend_mm, part.cut) for part in bone.shape.parts]
    distance = combine(parts, to_bone, box)
    for crack in bone.cracks:
        moved = combine(parts, crack.moved() @ to_bone, box)
        across, beyond = crack.across_mm(to_bone, box)
        share = coverage(-across, 0.4) * coverage(beyond, 4.0)
        distance += share * (moved - distance)
    return distance


def _open_joint(
    first: tuple[Bone, Box, Float64Array, Float32Array],
    second: tuple[Bone, Box, Float64Array, Float32Array],
    first_intact: Float32Array,
    second_intact: Float32Array,
) -> None:
    """Move the facing surfaces of two bones apart to a joint space, in place, along the middle between them."""
    box_a, box_b = first[1], second[1]
    shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box_a, box_b, strict=True)]
    if any(part.start >= part.stop for part in shared):
        return
    in_a = tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(shared, box_a, strict=True))
    in_b = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(shared, box_b, strict=True))
    middle = (first_intact[in_a] - second_intact[in_b]) / 2
    first[3][in_a] = np.maximum(first[3][in_a], middle + np.float32(JOINT_GAP_MM / 2))
    second[3][in_b] = np.maximum(second[3][in_b], np.float32(JOINT_GAP_MM / 2) - middle)


def _bone_hu(
    bone: Bone, to_bone: Float64Array, box: Box, distance: Float32Array, edge_mm: float, anatomy: Anatomy
) -> Float32Array:
    """Units inside the bone: cortex, and trabecular bone with grain and vessels."""
    (back,) = coordinates(to_bone[1:2], box)
    arch = np.clip((back - np.float32(bone.shape.arch_y_mm)) / np.float32(5), 0, 1)
    cortex_mm = np.float32(bone.cortex_body_mm) + arch * np.float32(bone.cortex_arch_mm - bone.cortex_body_mm)
    marrow = np.empty(distance.shape, np.float32)
    marrow[:] = np.float32(bone.trabecular_hu) * (1 + np.float32(0.55) * arch)
    where = np.nonzero(distance < -0.2)
    if len(where[0]):
        indices = np.stack([axis + part.start for axis, part in zip(where, box, strict=True)])
        points = (to_bone[:3, :3] @ indices + to_bone[:3, 3:]) / 0.8
        grain = map_coordinates(anatomy.texture, points.astype(np.float32), order=1, mode="grid-wrap")
        marrow[where] *= 1 + np.float32(0.22) * grain
    to_index = inverse(to_bone)
    for solid in bone.shape.canals:
        boxes = inner_box(solid, to_index, box, 1.0)
        if boxes is None:
            continue
        near, local = boxes
        share = coverage(evaluate(solid, to_bone, near), edge_mm)
        marrow[local] += share * (np.float32(40.0) - marrow[local])
    core = coverage(distance + cortex_mm, edge_mm)
    hu: Float32Array = np.float32(bone.cortex_hu) + core * (marrow - np.float32(bone.cortex_hu))
    return hu


def _with_noise(
    voxels: Float32Array, anatomy: Anatomy, to_patient: Float64Array, noise_hu: float, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Rounded units with noise that is correlated in the slice and grows towards the shoulders."""
    stored = np.empty(voxels.shape, np.int16)
    rows = max(1, 2_000_000 // max(1, voxels[0].size))
    height = to_patient[2]
    for start in range(0, len(voxels), rows):
        slab = voxels[start : start + rows]
        if noise_hu:
            noise = rng.standard_normal(slab.shape, dtype=np.float32)
            for axis in (1, 2):
                noise = gaussian_filter1d(noise, 0.6, axis=axis, truncate=2.5)
            box = (slice(start, start + len(slab)), slice(0, slab.shape[1]), slice(0, slab.shape[2]))
            (z,) = coordinates(height[None], box)
            below = np.clip((np.float32(anatomy.shoulder_z_mm + 22) - z) / 45, 0, 1)
            if float(below.max()) > 0:
                streaks = rng.standard_normal(slab.shape, dtype=np.float32)
                for _ in range(2):
                    streaks = uniform_filter1d(streaks, 31, axis=2)
                noise += streaks * (4.0 * below)
            # 2.16: what the smoothing above takes from the deviation.
            noise *= np.float32(noise_hu * 2.16) * (1 + np.float32(1.2) * below)
            slab = slab + noise
        stored[start : start + rows] = np.clip(np.rint(slab), -1024, 3071).astype(np.int16)
    return stored
