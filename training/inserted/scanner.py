"""What the scanner does to whole slices: motion, streaks between the shoulders, noise, sharp and soft kernels.

None of it is a fracture. Drawn for broken and intact patients alike, so that it says nothing about either.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import Grid
from training.inserted.region import scanner_noise

Slab = NDArray[np.float32]
"""Consecutive slices, `(Z, Y, X)`, HU."""


def disturb(
    voxels_hu: NDArray[np.int16], grid: Grid, rng: np.random.Generator, probability: float = 0.15
) -> tuple[str, ...]:
    """Each disturbance with this probability, somewhere along the volume, in place; gives which."""
    done = []
    for kind, change in DISTURBANCES.items():
        if rng.random() < probability:
            length_mm = rng.uniform(3, 9) if kind == "motion" else rng.uniform(30, 90)
            count = min(len(voxels_hu), max(1, round(length_mm / grid.spacing_mm[0])))
            start = int(rng.integers(0, len(voxels_hu) - count + 1))
            slab = voxels_hu[start : start + count]
            slab[:] = np.clip(np.rint(change(slab.astype(np.float32), grid, rng)), -1024, 3071).astype(np.int16)
            done.append(kind)
    return tuple(done)


def _motion(slab: Slab, grid: Grid, rng: np.random.Generator) -> Slab:
    """A few slices moved within their plane by up to 2.5 mm, or doubled."""
    shift = rng.uniform(-2.5, 2.5, 2) / grid.spacing_mm[1:]
    moved: Slab = ndimage.shift(slab, (0, *shift), order=1, mode="nearest")
    share = np.float32(1.0 if rng.random() < 0.5 else rng.uniform(0.3, 0.6))
    return slab + share * (moved - slab)


def _streaks(slab: Slab, grid: Grid, rng: np.random.Generator) -> Slab:
    """Dark and bright lines from side to side, as between the shoulders."""
    lines = rng.standard_normal((*slab.shape[:2], 1 + slab.shape[2] // 24), dtype=np.float32)
    lines = ndimage.gaussian_filter(lines, (0, 0.8, 1.2))
    lines = ndimage.zoom(lines, (1, 1, slab.shape[2] / lines.shape[2]), order=1)
    lines *= np.float32(rng.uniform(15, 70) / max(float(lines.std()), 1e-6))
    return np.asarray(slab + lines)


def _noise(slab: Slab, grid: Grid, rng: np.random.Generator) -> Slab:
    return slab + scanner_noise(rng, slab.shape, float(rng.uniform(10, 50)))


def _kernel(slab: Slab, grid: Grid, rng: np.random.Generator) -> Slab:
    """Sharper, with rims that overshoot, or softer."""
    sigma = rng.uniform(0.5, 0.9) / np.asarray(grid.spacing_mm[1:])
    smooth: Slab = ndimage.gaussian_filter(slab, (0, *sigma), truncate=3)
    return smooth + np.float32(rng.choice((rng.uniform(0.2, 0.6), rng.uniform(1.5, 2.4)))) * (slab - smooth)


DISTURBANCES: dict[str, Callable[[Slab, Grid, np.random.Generator], Slab]] = {
    "motion": _motion,
    "streaks": _streaks,
    "noise": _noise,
    "kernel": _kernel,
}
