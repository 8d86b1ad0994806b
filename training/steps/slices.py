"""Axial slices of a neck with their neighbours, as the 2.5D U-Net reads them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from torch import Tensor

from model.resample import AIR_HU
from model.segment import network_input


def draw_slice(
    voxels_hu: NDArray[np.int16], labels: NDArray[np.uint8], rng: np.random.Generator, num_pixels: int
) -> tuple[Tensor, Tensor]:
    """One slice, nine times of ten with bone in it, turned, scaled, mirrored and degraded.

    Gives the input `(3, num_pixels, num_pixels)` and labels int64 `(num_pixels, num_pixels)`.
    """
    with_bone = np.flatnonzero(labels.any(axis=(1, 2)))
    index = int(rng.choice(with_bone) if rng.random() < 0.9 else rng.integers(len(labels)))
    rows = np.clip(index + np.array([-1, 0, 1]), 0, len(labels) - 1)
    hu = torch.from_numpy(voxels_hu[rows].astype(np.float32))[None]
    truth = torch.from_numpy(labels[index].astype(np.float32))[None, None]
    points = _points(hu.shape[-2:], rng, num_pixels)
    hu = F.grid_sample(hu - AIR_HU, points, align_corners=False)[0] + AIR_HU
    truth = F.grid_sample(truth, points, mode="nearest", align_corners=False)[0, 0]
    noise = torch.from_numpy(rng.normal(0, rng.uniform(0, 30), size=hu.shape)).float()
    hu = hu * rng.uniform(0.85, 1.15) + rng.uniform(-30, 30) + noise
    # Of the two windows that a vertebra network is given, this one reads the first.
    return network_input(hu)[0], truth.long()


def _points(shape: Sequence[int], rng: np.random.Generator, num_pixels: int) -> Tensor:
    """Where to sample a slice of this shape, for `grid_sample`: at its own pixel size, turned, scaled, shifted."""
    angle, scale, mirror = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.85, 1.15), rng.choice([-1, 1])
    turn = scale * np.array([[np.cos(angle) * mirror, -np.sin(angle)], [np.sin(angle) * mirror, np.cos(angle)]])
    # grid_sample counts x before y, each side from -1 to 1.
    matrix = np.diag(1 / np.array([shape[1], shape[0]])) @ turn @ np.diag([num_pixels, num_pixels])
    theta = np.concatenate([matrix, rng.uniform(-0.15, 0.15, size=(2, 1))], axis=1)
    return F.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, num_pixels, num_pixels], align_corners=False)
