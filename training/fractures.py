"""Trains the fracture network: from cached stacks of slices, half of them fractured, changed anew at every step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from torch import Tensor

from model.classify import NUM_NEIGHBOURS, network_input
from model.networks import FractureNet
from training.schedule import train

PATCH_LEARNING_RATE, STACK_LEARNING_RATE = 3e-3, 1e-3
SHARE_FRACTURED = 0.5
"""Share of fractured vertebrae in a batch. Of either kind each level comes as often: drawn as often as patients break
them, C3 to C6 were too few, and their fractures were missed."""

PATCH_PIXELS, PATCH_MARGIN, PATCHES_PER_STACK = 48, 12, 4
"""Side of a patch, what is cut with it and dropped after turning it, and how many come from a stack."""

UNEVEN_SHARE, UNEVEN_PIXELS = 0.28, (1.6, 9.0)
"""By how much of its HU above BONE_HU bone is brighter or darker from place to place, at most, and over how far."""

BONE_HU = 100.0

BENT_PIXELS, BENT_OVER_PIXELS = 1.3, (8.0, 18.0)
"""How far a slice's pixels are moved, as a deviation at most, and between nodes that are so far apart."""

PATCH_MIDDLE = (..., slice(PATCH_MARGIN, -PATCH_MARGIN), slice(PATCH_MARGIN, -PATCH_MARGIN))


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
    network: FractureNet,
    paths: list[Path],
    *,
    num_patch_steps: int,
    num_stack_steps: int,
    batch_size: int,
    seed: int,
    is_for_patients: bool = False,
) -> Iterator[tuple[int, float]]:
    """Trains in place, leaving the averaged weights; gives step and loss.

    First encoder and region decoder learn from small patches what a fracture looks like; then everything learns from
    whole stacks what to conclude. From stacks alone nothing was learned in the same time: a cleft is 0.1 % of them.

    batch_size: stacks in a step; patches come from twice as many. is_for_patients: bone is made `uneven`, too.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    fractured, intact = vertebrae_by_level(paths)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster

    def varied(stacks: list[Stack]) -> Batch:
        batch = changed(collate(stacks), rng)
        return uneven(batch, rng) if is_for_patients else batch

    def draw() -> Stack:
        levels = fractured if rng.random() < SHARE_FRACTURED else intact
        of_level = levels[rng.integers(len(levels))]
        return read_stack(*of_level[rng.integers(len(of_level))])

    def patch_loss(step: int) -> Tensor:
        batch = varied([patch for _ in range(2 * batch_size) for patch in patches(draw(), rng)])
        inputs = network_input(batch.planes_hu, batch.masks).flatten(0, 1)[PATCH_MIDDLE]
        return region_loss(network.decoder(network.encoder(inputs)), batch.regions[PATCH_MIDDLE])

    def stack_loss(step: int) -> Tensor:
        batch = varied([draw() for _ in range(batch_size)])
        logits, attention, regions = network(network_input(batch.planes_hu, batch.masks))[:3]
        return loss(logits, attention, regions, batch)

    yield from train(network, patch_loss, num_steps=num_patch_steps, learning_rate=PATCH_LEARNING_RATE)
    for step, value in train(network, stack_loss, num_steps=num_stack_steps, learning_rate=STACK_LEARNING_RATE):
        yield num_patch_steps + step, value


def region_loss(logits: Tensor, regions: Tensor) -> Tensor:
    """Cross-entropy and Dice of the fractured pixels of a whole batch; both of the same shape but for a channel."""
    logits = logits.reshape(regions.shape)
    # Summed and scaled by what could be fracture, not by all there is, or the answer would be "none".
    pixels = F.binary_cross_entropy_with_logits(logits, regions, reduction="sum") / (regions.sum() + 100)
    probability = logits.sigmoid()
    overlap = 2 * (probability * regions).sum() + 1
    return pixels + 1 - overlap / (probability.sum() + regions.sum() + 1)


def loss(logits: Tensor, attention: Tensor, regions: Tensor, batch: Batch) -> Tensor:
    """Verdict, regions, and attention that shall fall on slices with a fracture in them."""
    verdict = F.binary_cross_entropy_with_logits(logits, batch.fractured)
    return 2 * verdict + region_loss(regions, batch.regions) + attention_loss(attention, batch.regions)


def attention_loss(attention: Tensor, regions: Tensor) -> Tensor:
    """0 if all attention falls on slices with a region in them, or there are none."""
    broken = regions.amax(dim=(2, 3)) > 0.5
    seen = (attention * broken).sum(dim=1)[broken.any(dim=1)]
    return -0.2 * seen.clamp(min=1e-4).log().mean() if len(seen) else attention.sum() * 0


def read_stack(path: Path, index: int) -> Stack:
    """One vertebra of a cached patient; index 0 is C1."""
    with np.load(path) as arrays:
        return Stack(
            planes=arrays["planes"][index],
            masks=arrays["masks"][index],
            # Interpolation thins a gap of one voxel; from a quarter on a pixel counts.
            regions=arrays["regions"][index] > 64,
        )


def patches(stack: Stack, rng: np.random.Generator, num_pixels: int = PATCH_PIXELS) -> list[Stack]:
    """PATCHES_PER_STACK squares of single slices with their neighbours: most on a fracture if there is one.

    num_pixels: side of a square, to which PATCH_MARGIN comes on each side.
    """
    half = num_pixels // 2 + PATCH_MARGIN
    broken, bone = np.argwhere(stack.regions), np.argwhere(stack.masks > 127)
    cut = []
    for number in range(PATCHES_PER_STACK):
        candidates = broken if len(broken) and number % 4 != 3 else bone
        s, y, x = candidates[rng.integers(len(candidates))]
        y, x = np.clip(np.array([y, x]) + rng.integers(-14, 15, size=2), half, stack.masks.shape[1] - half)
        square = np.s_[y - half : y + half, x - half : x + half]
        planes = slice(2 * s, 2 * s + 2 * NUM_NEIGHBOURS + 1)
        cut.append(
            Stack(
                planes=stack.planes[planes][:, square[0], square[1]],
                masks=stack.masks[s : s + 1][:, square[0], square[1]],
                regions=stack.regions[s : s + 1][:, square[0], square[1]],
            )
        )
    return cut


def collate(stacks: list[Stack]) -> Batch:
    """Stacks of equal length as one batch; fractured is what has a region."""
    return Batch(
        planes_hu=torch.from_numpy(np.stack([stack.planes for stack in stacks])).float(),
        masks=torch.from_numpy(np.stack([stack.masks for stack in stacks])).float() / 255,
        regions=torch.from_numpy(np.stack([stack.regions for stack in stacks])).float(),
        fractured=torch.tensor([float(stack.regions.any()) for stack in stacks]),
    )


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
    sharpness = torch.from_numpy(rng.uniform(-0.8, 1.2, size=(num_vertebrae, 1, 1, 1))).float()
    planes_hu = planes_hu + sharpness * (planes_hu - F.avg_pool2d(planes_hu, 3, 1, 1, count_include_pad=False))
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, size=(num_vertebrae, 1, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-40, 40, size=(num_vertebrae, 1, 1, 1))).float()
    sigma = torch.from_numpy(rng.uniform(0, 25, size=(num_vertebrae, 1, 1, 1))).float()
    return replace(batch, planes_hu=planes_hu * gain + offset + torch.randn_like(planes_hu) * sigma)


def uneven(batch: Batch, rng: np.random.Generator) -> Batch:
    """Bone brighter and darker from place to place, in each stack finely or coarsely, and bent within the slice.

    Patients' bone is so. Bone drawn from one atlas is smooth and all alike, and whatever differs from it looked broken:
    of fractures put into real CT, AUC 0.81 without this and 0.84 with it (`LOG.md`).
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
    """One stack `(planes, Y, X)` with none, one or two textures in its bone, soft ones or patches with edges."""
    bone, sides = (stack_hu - BONE_HU).clamp(min=0), tuple(stack_hu.shape)
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


_Vertebrae = list[tuple[Path, int]]


def vertebrae_by_level(paths: list[Path]) -> tuple[list[_Vertebrae], list[_Vertebrae]]:
    """All cached vertebrae, by level: the fractured and the intact."""
    found: dict[tuple[bool, int], _Vertebrae] = {}
    for path in paths:
        with np.load(path) as arrays:
            for index, (is_fractured, level) in enumerate(zip(arrays["fractured"], arrays["levels"], strict=True)):
                found.setdefault((bool(is_fractured), int(level)), []).append((path, index))
    fractured, intact = ([found[key] for key in sorted(found) if key[0] is kind] for kind in (True, False))
    if not fractured or not intact:
        raise ValueError(
            f"The {len(paths)} patients drawn hold {sum(map(len, fractured))} fractured and {sum(map(len, intact))} "
            "intact vertebrae; both are needed. Draw more patients."
        )
    return fractured, intact
