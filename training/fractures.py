"""Trains the fracture network: from cached stacks of slices, half of them fractured, changed anew at every step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from torch import Tensor

from model.classify import NUM_NEIGHBOURS, network_input
from model.networks import FractureNet
from training.schedule import train

LEARNING_RATE = 2e-3
SHARE_FRACTURED = 0.5
"""Share of fractured vertebrae in a batch."""

SHORT_STACK = 6
"""Slices of a stack in the first part of the run: neighbouring slices teach the encoder little that is new."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """One cached vertebra: planes int16 HU `(planes, Y, X)`, masks uint8 0..255 and regions bool `(S, Y, X)`."""

    planes: NDArray[np.int16]
    masks: NDArray[np.uint8]
    regions: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """planes_hu `(B, planes, Y, X)`, masks and regions `(B, S, Y, X)` 0..1, fractured `(B,)`; all float32."""

    planes_hu: Tensor
    masks: Tensor
    regions: Tensor
    fractured: Tensor


def train_fracture_net(
    network: FractureNet, paths: list[Path], *, num_steps: int, batch_size: int, seed: int
) -> Iterator[tuple[int, float]]:
    """Trains in place, leaving the averaged weights; gives step and loss.

    batch_size: short stacks in a step; half as many of the full-length stacks that end the run.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    fractured, intact = _vertebrae(paths)

    def loss_of_step(step: int) -> Tensor:
        is_short = step < 0.6 * num_steps
        stacks = []
        for _ in range(batch_size if is_short else batch_size // 2):
            pool = fractured if rng.random() < SHARE_FRACTURED else intact
            stack = read_stack(*pool[rng.integers(len(pool))])
            stacks.append(shortened(stack, rng) if is_short else stack)
        batch = changed(collate(stacks), rng)
        return loss(*network(network_input(batch.planes_hu, batch.masks)), batch)

    yield from train(network, loss_of_step, num_steps=num_steps, learning_rate=LEARNING_RATE)


def loss(logits: Tensor, attention: Tensor, regions: Tensor, batch: Batch) -> Tensor:
    """Verdict, regions (cross-entropy and Dice), and attention that shall fall on slices with a fracture in them."""
    verdict = F.binary_cross_entropy_with_logits(logits, batch.fractured)
    # A cleft is a few hundred of 140,000 pixels: the sum is scaled by what could be fracture, not by all there is.
    pixels = F.binary_cross_entropy_with_logits(regions, batch.regions, reduction="sum")
    outline = pixels / (batch.masks.sum() * 0.1 + 1)
    probability = regions.sigmoid()
    overlap = 2 * (probability * batch.regions).sum() + 1
    dice = 1 - overlap / (probability.sum() + batch.regions.sum() + 1)
    broken = batch.regions.amax(dim=(2, 3)) > 0.5
    total = verdict + outline + dice
    if broken.any():
        seen = (attention * broken).sum(dim=1)[broken.any(dim=1)]
        total = total - 0.2 * seen.clamp(min=1e-4).log().mean()
    return total


def read_stack(path: Path, index: int) -> Stack:
    """One vertebra of a cached patient; index 0 is C1."""
    with np.load(path) as arrays:
        return Stack(
            planes=arrays["planes"][index],
            masks=arrays["masks"][index],
            # Interpolation thins a gap of one voxel; from a quarter on a pixel counts.
            regions=arrays["regions"][index] > 64,
        )


def shortened(stack: Stack, rng: np.random.Generator) -> Stack:
    """SHORT_STACK neighbouring slices: through the fracture if there is one, else anywhere."""
    last_start = len(stack.masks) - SHORT_STACK
    broken = np.flatnonzero(stack.regions.any(axis=(1, 2)))
    start = int(rng.integers(last_start + 1))
    if len(broken):
        start = int(np.clip(rng.choice(broken) - rng.integers(SHORT_STACK), 0, last_start))
    planes = slice(2 * start, 2 * (start + SHORT_STACK - 1) + 2 * NUM_NEIGHBOURS + 1)
    slices = slice(start, start + SHORT_STACK)
    return Stack(planes=stack.planes[planes], masks=stack.masks[slices], regions=stack.regions[slices])


def collate(stacks: list[Stack]) -> Batch:
    """Stacks of equal length as one batch; fractured is what has a region."""
    return Batch(
        planes_hu=torch.from_numpy(np.stack([stack.planes for stack in stacks])).float(),
        masks=torch.from_numpy(np.stack([stack.masks for stack in stacks])).float() / 255,
        regions=torch.from_numpy(np.stack([stack.regions for stack in stacks])).float(),
        fractured=torch.tensor([float(stack.regions.any()) for stack in stacks]),
    )


def changed(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each stack turned, scaled, shifted, mirrored within the slice; other noise and gain; an imperfect mask."""
    num_vertebrae = len(batch.fractured)
    theta = torch.zeros(num_vertebrae, 2, 3)
    for i in range(num_vertebrae):
        angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.88, 1.12)
        mirror = rng.choice([-1, 1])
        matrix = scale * np.array([[np.cos(angle) * mirror, -np.sin(angle)], [np.sin(angle) * mirror, np.cos(angle)]])
        theta[i, :, :2] = torch.from_numpy(matrix)
        theta[i, :, 2] = torch.from_numpy(rng.uniform(-0.1, 0.1, size=2))
    num_planes, num_slices = batch.planes_hu.shape[1], batch.masks.shape[1]
    stacked = torch.cat([batch.planes_hu, batch.masks, batch.regions], dim=1)
    points = F.affine_grid(theta, list(stacked.shape), align_corners=False)
    stacked = F.grid_sample(stacked, points, padding_mode="border", align_corners=False)
    planes_hu, masks, regions = stacked.split([num_planes, num_slices, num_slices], dim=1)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, size=(num_vertebrae, 1, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-40, 40, size=(num_vertebrae, 1, 1, 1))).float()
    sigma = torch.from_numpy(rng.uniform(0, 25, size=(num_vertebrae, 1, 1, 1))).float()
    planes_hu = planes_hu * gain + offset + torch.randn_like(planes_hu) * sigma
    return Batch(
        planes_hu=planes_hu, masks=_imperfect(masks, rng), regions=(regions > 0.4).float(), fractured=batch.fractured
    )


def _imperfect(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Masks as the coarse U-Net draws them: rounder, and a little too large or too small."""
    smooth = F.avg_pool2d(masks, 5, 1, 2)
    level = torch.from_numpy(rng.uniform(0.25, 0.75, size=(len(masks), 1, 1, 1))).float()
    rounded = ((smooth - level) * 4 + 0.5).clamp(0, 1)
    return rounded if rng.random() < 0.7 else masks


def _vertebrae(paths: list[Path]) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """All cached vertebrae: the fractured and the intact."""
    fractured, intact = [], []
    for path in paths:
        with np.load(path) as arrays:
            for index, is_fractured in enumerate(arrays["fractured"]):
                (fractured if is_fractured else intact).append((path, index))
    if not fractured or not intact:
        raise ValueError(
            f"The {len(paths)} patients drawn hold {len(fractured)} fractured and {len(intact)} intact vertebrae; "
            "both are needed. Draw more patients."
        )
    return fractured, intact
