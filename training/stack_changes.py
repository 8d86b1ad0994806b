"""What makes one stack of slices into many: each batch is seen turned, scanned and, for patients, grown differently."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor

from training.vertebra_stacks import Batch

UNEVEN_SHARE, UNEVEN_PIXELS = 0.36, (1.6, 9.0)
"""By how much of its HU above BONE_HU bone is brighter or darker from place to place, at most, and over how far."""

BONE_HU = 100.0

DENSER_SHARE, DENSER_LOG = 0.5, 0.4
"""Share of stacks with denser or thinner bone, and by which factor of its HU above BONE_HU, at most, as a logarithm."""

SHARPNESS, NOISE_HU = (-0.8, 2.2), (0.0, 45.0)
"""How much of what a blur of 3 x 3 pixels takes away is taken away or added, and noise: from smooth kernels to those
for bone. Kernels beyond what was trained on made whole bone look broken."""

BENT_PIXELS, BENT_OVER_PIXELS = 1.5, (8.0, 18.0)
"""How far a slice's pixels are moved, as a deviation at most, and between nodes that are so far apart."""


def changed(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each stack turned, scaled, shifted and mirrored within the slice, with another kernel, noise, offset and gain."""
    num_vertebrae = len(batch.fractured)
    theta = torch.zeros(num_vertebrae, 2, 3)
    for i in range(num_vertebrae):
        angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.88, 1.12)
        mirror = rng.choice([-1, 1])
        matrix = scale * np.array([[np.cos(angle) * mirror, -np.sin(angle)], [np.sin(angle) * mirror, np.cos(angle)]])
        theta[i, :, :2] = torch.from_numpy(matrix)
        theta[i, :, 2] = torch.from_numpy(rng.uniform(-0.1, 0.1, size=2))
    batch = _sampled(batch, F.affine_grid(theta, [num_vertebrae, 1, *batch.masks.shape[2:]], align_corners=False))
    planes_hu = batch.planes_hu
    sharpness = torch.from_numpy(rng.uniform(*SHARPNESS, size=(num_vertebrae, 1, 1, 1))).float()
    planes_hu = planes_hu + sharpness * (planes_hu - F.avg_pool2d(planes_hu, 3, 1, 1, count_include_pad=False))
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, size=(num_vertebrae, 1, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-40, 40, size=(num_vertebrae, 1, 1, 1))).float()
    sigma = torch.from_numpy(rng.uniform(*NOISE_HU, size=(num_vertebrae, 1, 1, 1))).float()
    return replace(batch, planes_hu=planes_hu * gain + offset + torch.randn_like(planes_hu) * sigma)


def uneven(batch: Batch, rng: np.random.Generator) -> Batch:
    """Bone denser or thinner, brighter and darker from place to place, finely or coarsely, and bent within the slice.

    Patients' bone is so. Bone drawn from one atlas is smooth and all alike, and whatever differs from it looked broken:
    of fractures put into real CT, AUC 0.81 without this, 0.84 after 4,000 steps with it, 0.85 after more (`LOG.md`).
    """
    batch = replace(batch, planes_hu=torch.stack([_uneven_bone(stack_hu, rng) for stack_hu in batch.planes_hu]))
    num_vertebrae, _, *sides = batch.masks.shape
    num_nodes = max(3, int(sides[0] / rng.uniform(*BENT_OVER_PIXELS)))
    pixels = rng.standard_normal((num_vertebrae, 2, num_nodes, num_nodes)) * rng.uniform(
        0, BENT_PIXELS, size=(num_vertebrae, 1, 1, 1)
    )
    moved = F.interpolate(torch.from_numpy(pixels).float(), size=sides, mode="bicubic", align_corners=True)
    in_place = F.affine_grid(
        torch.eye(2, 3).expand(num_vertebrae, 2, 3), [num_vertebrae, 1, *sides], align_corners=False
    )
    return _sampled(batch, in_place + moved.permute(0, 2, 3, 1) * 2 / sides[0])


def _sampled(batch: Batch, points: Tensor) -> Batch:
    """The stacks with planes, masks and regions taken from these points of their slices, `(B, Y, X, 2)`, -1..1."""
    stacked = torch.cat([batch.planes_hu, batch.masks, batch.regions], dim=1)
    stacked = F.grid_sample(stacked, points, padding_mode="border", align_corners=False)
    num_slices = batch.masks.shape[1]
    planes_hu, masks, regions = torch.split(stacked, [batch.planes_hu.shape[1], num_slices, num_slices], dim=1)
    return replace(batch, planes_hu=planes_hu, masks=masks, regions=(regions > 0.4).float())


def _uneven_bone(stack_hu: Tensor, rng: np.random.Generator) -> Tensor:
    """One stack `(planes, Y, X)`, its bone denser or thinner, with up to two textures, soft or with edges."""
    bone, sides = (stack_hu - BONE_HU).clamp(min=0), tuple(stack_hu.shape)
    if rng.random() < DENSER_SHARE:
        factor = float(np.exp(rng.uniform(-DENSER_LOG, DENSER_LOG)))
        stack_hu, bone = stack_hu + bone * (factor - 1), bone * factor
    for _ in range(rng.integers(0, 3)):
        over = np.exp(rng.uniform(*np.log(UNEVEN_PIXELS)))
        # Planes lie closer than pixels, or farther apart: about as far.
        nodes = [max(3, int(side / size)) for side, size in zip(sides, (max(1, 0.75 * over), over, over), strict=True)]
        noise = torch.from_numpy(rng.standard_normal((1, 1, *nodes))).float()
        texture = F.interpolate(noise, size=sides, mode="trilinear", align_corners=True)[0, 0]
        texture /= texture.std()
        if rng.random() < 0.4:
            texture = torch.tanh(3 * (texture - rng.uniform(-0.5, 1.5)))
        stack_hu = stack_hu + bone * texture * rng.uniform(0, UNEVEN_SHARE)
    return stack_hu
