"""A compressed body: its upper end plate sinks in with a step, what is below it is pressed together and denser."""

import numpy as np
from numpy.typing import NDArray

from training.inserted.frame import VertebraFrame
from training.inserted.region import Neighbourhood, coordinates, half_space_share, shifted

DISC_MM = 2.5
"""So much above the end plate is stretched to follow it down."""

BAND_MM = 1.3
"""Deviation of the dense band below the end plate, across it."""


def compress(near: Neighbourhood, frame: VertebraFrame, depth_mm: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Lowers the upper end plate by up to `depth_mm`, in place; gives the voxels of the impaction.

    As a wedge (most in front), a biconcave body (most in the middle) or a plateau; step-like at its borders.
    """
    u, v, w = coordinates(frame.index_to_frame(near.grid), near.grid.shape)
    sunk = np.float32(depth_mm) * _profile(frame, u, v, rng)
    floor = _plane(frame.floor, u, v)
    ceiling = _plane(frame.ceiling, u, v)
    sunk = np.minimum(sunk, np.float32(0.6) * np.maximum(ceiling - floor, 1))
    lowered = ceiling - sunk
    ratio = (ceiling - floor) / np.maximum(lowered - floor, 1)
    within = (w > floor) & (w < ceiling + np.float32(DISC_MM))
    below = floor + (w - floor) * ratio
    above = ceiling + (w - lowered) * np.float32(DISC_MM) / (np.float32(DISC_MM) + sunk)
    source = np.where(w < lowered, below, above)
    amount = np.where(within, source - w, 0) * np.clip(near.to_other_mm / 1.5, 0, 1)
    moved = shifted(near.voxels_hu, near.grid, frame.rows[2], amount)
    denser = np.clip(ratio, 1, 1.4) * half_space_share(lowered - w, 0.6)
    moved = np.where(moved > 100, 60 + (moved - 60) * np.maximum(denser, 1), moved)
    band = np.exp(-(((w - lowered + np.float32(1.6 * BAND_MM)) / np.float32(BAND_MM)) ** 2) / 2)
    band *= np.clip(sunk / 1.5, 0, 1) * (moved > 100)
    moved += band * np.float32(rng.uniform(60, 200))
    changed = (np.abs(amount) > 1e-3) | (band > 0.05)
    near.voxels_hu[:] = np.where(changed, np.clip(moved, -1024, 2200), near.voxels_hu)
    return np.asarray((band > 0.3) & (sunk > 0.5) & near.bone)


def _plane(plane: NDArray[np.float64], u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.float32(plane[0]) + np.float32(plane[1]) * u + np.float32(plane[2]) * v


def _profile(
    frame: VertebraFrame, u: NDArray[np.float32], v: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """0..1: how far each column of the body sinks."""
    depth_mm = frame.back - frame.front
    along = np.clip((v - np.float32(frame.front)) / np.float32(depth_mm), 0, 1)
    kind = rng.choice(("wedge", "middle", "plateau"), p=(0.5, 0.25, 0.25))
    if kind == "wedge":
        profile = np.clip(np.float32(rng.uniform(1.0, 1.4)) * (1 - along), 0, 1)
    elif kind == "middle":
        profile = np.sin(np.pi * along)
    else:
        profile = half_space_share(np.float32(rng.uniform(0.6, 0.95)) - along, 0.06)
    edge = np.float32(frame.half_width * rng.uniform(0.8, 1.3))
    centre = np.float32(rng.normal(0, 1.5))
    inside = half_space_share(edge - np.abs(u - centre), 0.8)
    inside *= half_space_share(v - np.float32(frame.front - 1.5), 0.6)
    inside *= half_space_share(np.float32(frame.back + 1) - v, 0.6)
    return np.asarray(profile * inside, np.float32)
