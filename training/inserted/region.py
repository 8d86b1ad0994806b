"""The box of voxels an insertion works on: a float copy, its distances to bone, and what of it is written back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtr

from model.geometry import FloatArray, Grid
from model.resample import index_range

Float32Array = NDArray[np.float32]

NEAR_MM = (1.5, 3.0)
"""Up to the first distance from its mask a vertebra's bone is changed fully, beyond the second not at all."""

OTHER_BONE_HU = 150.0
"""A network's masks take soft tissue along; what is darker in the mask of another vertebra is not in the way."""

POINT_SPREAD_MM = 0.6
"""Full width at half maximum of a sharp scanner. Coarse pixels go with a smoother kernel: at least 1.1 of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbourhood:
    """A box of a volume around a place at one vertebra, all arrays `(Z, Y, X)`.

    voxels_hu: float32, changed in place; `before` is its first state. own: the mask of the vertebra. other: the bone
    of all others. share: 0..1, how much a voxel belongs to the vertebra, in its mask or near it. bone: its bone in
    `before`. noise_hu: deviation of the scanner's noise in soft tissue. texture_hu: of what bone looks like at its
    finest, noise included.
    """

    grid: Grid
    box: tuple[slice, slice, slice]
    voxels_hu: Float32Array
    before: Float32Array
    own: NDArray[np.bool_]
    other: NDArray[np.bool_]
    to_other_mm: Float32Array
    share: Float32Array
    bone: NDArray[np.bool_]
    noise_hu: float
    texture_hu: float

    def write(self, voxels_hu: NDArray[np.int16]) -> None:
        """What changed, rounded, into the volume."""
        changed = np.abs(self.voxels_hu - self.before) >= 0.5
        part = voxels_hu[self.box]
        part[changed] = np.clip(np.rint(self.voxels_hu[changed]), -1024, 3071).astype(np.int16)


def neighbourhood(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    label: int,
    centre_lps_mm: FloatArray,
    radius_mm: float,
) -> Neighbourhood:
    """The box that holds a ball, as far as the volume reaches."""
    first, last = index_range(grid, centre_lps_mm - radius_mm, centre_lps_mm + radius_mm, margin=1)
    box = (slice(int(first[0]), int(last[0])), slice(int(first[1]), int(last[1])), slice(int(first[2]), int(last[2])))
    before = voxels_hu[box].astype(np.float32)
    near_labels = labels[box]
    own, other = near_labels == label, (near_labels > 0) & (near_labels != label) & (before > OTHER_BONE_HU)
    part = grid.part(first, before.shape)
    to_own_mm, to_other_mm = distance_mm(own, part), distance_mm(other, part)
    share = np.clip((NEAR_MM[1] - to_own_mm) / (NEAR_MM[1] - NEAR_MM[0]), 0, 1) * (to_own_mm <= to_other_mm)
    fine = before - ndimage.uniform_filter(before, 3)
    soft = np.abs(fine[(before > -50) & (before < 130) & ~own & ~other])
    grain = np.abs(fine[own])
    noise_hu = float(np.median(soft)) * 1.55 if len(soft) > 50 else 10.0
    return Neighbourhood(
        grid=part,
        box=box,
        voxels_hu=before.copy(),
        before=before,
        own=own,
        other=other,
        to_other_mm=to_other_mm,
        share=share.astype(np.float32),
        bone=(own & (before > 60)) | ((before > 200) & (share > 0.5)),
        noise_hu=noise_hu,
        texture_hu=max(5.0, noise_hu, float(np.median(grain)) * 1.55 if len(grain) else 5.0),
    )


def distance_mm(mask: NDArray[np.bool_], grid: Grid) -> Float32Array:
    """Distance of every voxel to the mask; a kilometre where it is empty."""
    if not mask.any():
        return np.full(mask.shape, 1e6, np.float32)
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=grid.spacing_mm), np.float32)


def coordinates(index_to_frame: FloatArray, shape: tuple[int, ...]) -> list[Float32Array]:
    """The coordinates in a frame, given as `(k, 4)`, of all voxels of a box: k arrays."""
    z, y, x = np.ogrid[tuple(slice(0, size) for size in shape)]
    return [
        ((row[0] * z + row[3]).astype(np.float32) + (row[1] * y).astype(np.float32) + (row[2] * x).astype(np.float32))
        for row in index_to_frame
    ]


def edge_mm(grid: Grid, normal_lps: FloatArray) -> float:
    """Standard deviation of a sharp edge with this normal in the image: a voxel's width along it, and the scanner's."""
    along = normal_lps @ grid.affine[:3, :3]
    fwhm_mm = max(POINT_SPREAD_MM, 1.1 * min(grid.spacing_mm))
    return float(np.sqrt((along**2).sum() / 12 + (fwhm_mm / 2.355) ** 2))


def slab_share(across_mm: Float32Array, width_mm: Float32Array | float, sigma_mm: float) -> Float32Array:
    """How much of each voxel lies in a slab, given the distance to its middle: integrates to the slab's width."""
    half = np.asarray(width_mm, np.float32) / 2
    scale = np.float32(1 / sigma_mm)
    return np.asarray(ndtr((across_mm + half) * scale) - ndtr((across_mm - half) * scale), np.float32)


def half_space_share(across_mm: Float32Array, sigma_mm: float) -> Float32Array:
    """How much of each voxel lies on the positive side."""
    return np.asarray(ndtr(across_mm * np.float32(1 / sigma_mm)), np.float32)


def shifted(voxels_hu: Float32Array, grid: Grid, shift_lps_mm: FloatArray, amount: Float32Array) -> Float32Array:
    """What lies `amount` (of each voxel) times a shift away is brought here; nothing changes where amount is 0.

    Cubic: linear interpolation would smooth the noise, and a network would learn that.
    """
    step = np.linalg.solve(grid.affine[:3, :3], shift_lps_mm)
    indices = np.ogrid[tuple(slice(0, size) for size in voxels_hu.shape)]
    sources = [index + np.float32(part) * amount for index, part in zip(indices, step, strict=True)]
    moved = ndimage.map_coordinates(voxels_hu, sources, order=3, mode="nearest")
    return np.where(amount != 0, moved, voxels_hu)


def scanner_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma_hu: float) -> Float32Array:
    """Noise that hangs together over neighbouring pixels, as that of a scanner does."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (0, 0.6, 0.6), truncate=2.5)
    return np.asarray(noise * np.float32(sigma_hu / max(float(noise.std()), 1e-6)))
