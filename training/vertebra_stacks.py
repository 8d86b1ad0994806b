"""Cached stacks of slices, one for each vertebra: read, cut into patches, put together to batches."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.classify import NUM_NEIGHBOURS

PATCH_PIXELS, PATCH_MARGIN, PATCHES_PER_STACK = 48, 12, 4
"""Side of a patch, what is cut with it and dropped after turning it, and how many come from a stack."""

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
