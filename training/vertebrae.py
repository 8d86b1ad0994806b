"""Trains the vertebra U-Net: from the cached necks, turned, cut and degraded anew at every step."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from model.geometry import FloatArray, Grid
from model.networks import VertebraUNet
from model.resample import AIR_HU, sample
from model.segment import network_input
from training.schedule import train

LEARNING_RATE = 3e-3
BATCH_SIZE = 2  # PyTorch's fast 3D convolutions need more than one on a CPU
SMALL_CROP, LARGE_CROP = (64, 48, 48), (80, 64, 64)
"""Voxels of a training crop `(Z, Y, X)`; the large ones, later in the run, see what numbers the levels."""

NORM_SHARE, LARGE_CROP_SHARE = 0.5, 0.8
"""Shares of the run after which norms are frozen, and after which crops are large."""

SHARE_ANYWHERE = 0.1
"""Share of crops that lie anywhere, so that the network sees jaws, shoulders and air too."""


def train_unet(network: VertebraUNet, paths: list[Path], *, num_steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Trains in place, leaving the averaged weights; gives step and loss."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def loss_of_step(step: int) -> Tensor:
        if step >= NORM_SHARE * num_steps:
            freeze_norms(network)
        crop = SMALL_CROP if step < LARGE_CROP_SHARE * num_steps else LARGE_CROP
        crops = [draw_crop(paths[rng.integers(len(paths))], rng, crop) for _ in range(BATCH_SIZE)]
        inputs = torch.stack([network_input(hu) for hu, _, _ in crops]).contiguous(memory_format=torch.channels_last_3d)
        return loss(network(inputs), torch.stack([crop[1] for crop in crops]), torch.stack([crop[2] for crop in crops]))

    yield from train(network, loss_of_step, num_steps=num_steps, learning_rate=LEARNING_RATE)


def freeze_norms(network: nn.Module) -> None:
    """From here on norms use what they have learned of activations, as in analysis, not what one crop holds."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()


def draw_crop(path: Path, rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """One crop around some point of the spine: HU, share of vertebra 0..1 and level, each float32 `(Z, Y, X)`."""
    with np.load(path) as arrays:
        hu, share, level = (torch.from_numpy(arrays[name]).float() for name in ("hu", "share", "level"))
    z, y, x = hu.shape
    source = Grid(shape=(z, y, x), affine=np.eye(4))
    bone = np.argwhere(level.numpy() > 0)
    centre = bone[rng.integers(len(bone))] + rng.uniform(-12, 12, size=3)
    if rng.random() < SHARE_ANYWHERE:
        centre = rng.uniform(0, hu.shape)
    target = Grid(shape=shape, affine=turned(centre, np.asarray(shape), rng))
    hu, share = sample(torch.stack([hu - AIR_HU, share / 255]), source, target)
    hu = hu + AIR_HU
    level = sample(level[None], source, target, nearest=True)[0]
    if rng.random() < 0.5:
        cut_field_of_view(hu, share, rng)
    return degraded(hu, rng), share, level


def loss(scores: list[Tensor], share: Tensor, level: Tensor) -> Tensor:
    """Outline (cross-entropy and Dice) plus numbering (smooth L1 on the level at every scale).

    scores: as `VertebraUNet` gives them. share, level: `(B, Z, Y, X)`.
    """
    logit = scores[-1][:, 0]
    probability = logit.sigmoid()
    outline = F.binary_cross_entropy_with_logits(logit, share)
    dice = 1 - (2 * (probability * share).sum() + 1) / (probability.square().sum() + share.square().sum() + 1)
    total = 3 * outline + dice
    weight = share * (level > 0)
    if not weight.any():
        return total
    for score in scores:
        factor = share.shape[1] // score.shape[2]
        mass = F.avg_pool3d(weight, factor)
        mean = F.avg_pool3d(weight * level, factor) / mass.clamp(min=1e-6)
        error = F.smooth_l1_loss(score[:, 1], mean, reduction="none", beta=0.5)
        total = total + 0.75 * (error * mass).sum() / mass.sum()
    return total


TURN_DEG = 12.0
"""How far a crop is turned about each axis."""


def turned(
    centre: FloatArray,
    shape: FloatArray,
    rng: np.random.Generator,
    most_deg: tuple[float, float, float] = (TURN_DEG, TURN_DEG, TURN_DEG),
) -> FloatArray:
    """Affine of a crop around `centre`, turned by up to `most_deg`, scaled, mirrored half the time.

    most_deg: forward or back, to a side, about the long axis.
    """
    matrix = np.eye(3)
    for first, second, most in zip((0, 0, 1), (1, 2, 2), most_deg, strict=True):
        angle = np.deg2rad(rng.uniform(-most, most))
        turn = np.eye(3)
        turn[np.ix_((first, second), (first, second))] = [
            [np.cos(angle), -np.sin(angle)],
            [np.sin(angle), np.cos(angle)],
        ]
        matrix = matrix @ turn
    matrix = matrix @ np.diag(rng.uniform(0.88, 1.12, size=3) * [1, 1, rng.choice([-1, 1])])
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = centre - matrix @ ((shape - 1) / 2)
    return affine


def cut_field_of_view(hu: Tensor, share: Tensor, rng: np.random.Generator) -> None:
    """Puts air above or below a plane, as beyond the first or last slice."""
    at = int(rng.integers(2, hu.shape[0] // 3))
    beyond = slice(None, at) if rng.random() < 0.5 else slice(-at, None)
    hu[beyond] = AIR_HU
    share[beyond] = 0


def degraded(hu: Tensor, rng: np.random.Generator) -> Tensor:
    """Other gain, offset, noise and sharpness, as other scanners and kernels have."""
    body = hu > -900
    if rng.random() < 0.3:
        hu = 0.5 * hu + 0.5 * F.avg_pool3d(hu[None], 3, 1, 1, count_include_pad=False)[0]
    noise = torch.randn_like(hu) * rng.uniform(0, 30)
    changed = hu * rng.uniform(0.85, 1.15) + rng.uniform(-30, 30) + noise
    return torch.where(body, changed, hu)
