"""A cleft: the curved gap that a fracture leaves in bone, with the far side moved by a step, in any volume.

All lengths are in mm of the patient, so that a cleft of 0.3 mm darkens a voxel of 0.5 x 0.5 x 1 mm by what it takes of
it. `sites.py` says where clefts run.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.geometry import FloatArray, Grid
from training.inserted.region import (
    Float32Array,
    Neighbourhood,
    coordinates,
    distance_mm,
    edge_mm,
    half_space_share,
    scanner_noise,
    shifted,
    slab_share,
)

TAPER_MM = 4.0
"""Over this length a cleft that ends within the bone narrows to nothing."""

HINGE_MM = 12.0
"""Over this length the movement of a side that is not a loose fragment fades."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cleft:
    """A curved, rough gap around `centre_lps_mm`.

    rows: float `(3, 3)`, unit vectors in LPS along the gap (u, v) and across it (w). width_mm: opening in the middle.
    bend: curvature along u and v, 1/mm. waves: `(k, 4)`: height in mm, u and v wave numbers in 1/mm, phase.
    shift_lps_mm: how the side w > 0 has moved; is_loose: all of it, as far as it hangs together within `reach_mm`, or
    only what is near the gap. fill_hu: blood and soft tissue. rim_mm, rim_hu: bright margins of an old, healed gap.
    """

    centre_lps_mm: FloatArray
    rows: FloatArray
    reach_mm: float
    width_mm: float
    bend: tuple[float, float] = (0.0, 0.0)
    waves: FloatArray
    shift_lps_mm: FloatArray
    is_loose: bool = False
    fill_hu: float = 55.0
    rim_mm: float = 0.0
    rim_hu: float = 0.0

    @property
    def radius_mm(self) -> float:
        """Of the ball outside which nothing changes."""
        return self.reach_mm + float(np.linalg.norm(self.shift_lps_mm)) + 5.0

    def local(self, grid: Grid) -> list[Float32Array]:
        """u, v and w of every voxel of a grid."""
        matrix = self.rows @ grid.affine[:3]
        matrix[:, 3] -= self.rows @ self.centre_lps_mm
        return coordinates(matrix, grid.shape)

    def across_mm(self, u: Float32Array, v: Float32Array, w: Float32Array) -> Float32Array:
        """Signed distance to the middle of the gap, as good as its slopes are gentle."""
        across: Float32Array = w + np.float32(self.bend[0]) * u * u + np.float32(self.bend[1]) * v * v
        for height, wave_u, wave_v, phase in self.waves.astype(np.float32):
            across += height * np.sin(wave_u * u + wave_v * v + phase)
        return across

    def opening(self, u: Float32Array, v: Float32Array) -> Float32Array:
        """Share of the full width that is open: 1, less towards the end of the gap, 0 beyond it."""
        beyond = np.sqrt(u * u + v * v) - np.float32(self.reach_mm - TAPER_MM)
        return np.asarray(np.clip(1 - beyond / np.float32(TAPER_MM), 0, 1))


def cut(near: Neighbourhood, cleft: Cleft, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Makes the cleft in `near.voxels_hu`, first the step, then the gap; gives the voxels of the fracture."""
    u, v, w = cleft.local(near.grid)
    across = cleft.across_mm(u, v, w)
    opening = cleft.opening(u, v)
    sigma_mm = edge_mm(near.grid, cleft.rows[2])
    gap = _move(near, cleft, (u, v, w), across, opening, sigma_mm)
    share = slab_share(across, cleft.width_mm * opening, sigma_mm) * near.share
    _fill(near.voxels_hu, share, cleft.fill_hu)
    near.voxels_hu[:] += np.maximum(share, gap) * scanner_noise(rng, share.shape, near.noise_hu) * (share + gap > 0.15)
    if cleft.rim_mm:
        beside = np.abs(across) - np.float32(cleft.width_mm / 2 + cleft.rim_mm / 2)
        rim = slab_share(beside, cleft.rim_mm * opening, sigma_mm) * near.share * near.bone
        near.voxels_hu[:] += rim * np.maximum(np.float32(cleft.rim_hu) - near.voxels_hu, 0)
    # A gap thinner than a voxel still belongs to the voxels its surface runs through.
    half_voxel = 0.5 * float(np.linalg.norm(cleft.rows[2] @ near.grid.affine[:3, :3]))
    reached = np.abs(across) <= np.maximum(cleft.width_mm / 2, half_voxel)
    return np.asarray(near.bone & (opening > 0.25) & (reached | (gap > 0.5)) & (near.share > 0.5))


def _fill(voxels_hu: Float32Array, share: Float32Array, fill_hu: float) -> None:
    """Replaces a share of each voxel where that darkens it: bone by blood, not fat by blood."""
    voxels_hu += share * np.minimum(np.float32(fill_hu) - voxels_hu, 0)


def _move(
    near: Neighbourhood,
    cleft: Cleft,
    local: tuple[Float32Array, Float32Array, Float32Array],
    across: Float32Array,
    opening: Float32Array,
    sigma_mm: float,
) -> Float32Array:
    """Moves the far side; gives how much of each voxel lies in the gap this opened."""
    shift = cleft.shift_lps_mm
    if not shift.any():
        return np.zeros(across.shape, np.float32)
    fragment = near.bone & (across > 0) & (opening > 0)
    to_fragment_mm = distance_mm(fragment, near.grid)
    amount = np.clip(1.4 - to_fragment_mm / 4, 0, 1) * opening
    # Slower than the way to the next bone shrinks: what lies between is pressed together, never folded.
    amount = np.minimum(amount, near.to_other_mm * np.float32(0.8 / np.linalg.norm(shift)))
    if not cleft.is_loose:
        amount *= np.clip(1 - across / HINGE_MM, 0, 1)
    moved = shifted(near.voxels_hu, near.grid, -shift, amount)
    u, v, w = (axis - np.float32(part) * amount for axis, part in zip(local, cleft.rows @ shift, strict=True))
    gap = half_space_share(-cleft.across_mm(u, v, w), sigma_mm) * (amount > 0)
    _fill(moved, gap, cleft.fill_hu)
    side = half_space_share(across, sigma_mm) * (amount > 0)
    near.voxels_hu[:] += side * (moved - near.voxels_hu)
    return np.asarray(gap * side * near.share, np.float32)
