"""Trains the fracture network: from cached stacks of slices, half of them fractured, changed anew at every step."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor

from model.classify import network_input
from model.memory import in_bfloat16
from model.networks import FractureNet
from training.schedule import EMA_DECAY, train
from training.stack_changes import changed, uneven
from training.vertebra_stacks import PATCH_MIDDLE, Batch, Stack, collate, patches, read_stack, vertebrae_by_level

PATCH_LEARNING_RATE, STACK_LEARNING_RATE = 3e-3, 1e-3
LONG_DECAY = 0.998
"""Of the averaged weights where bone is changed so much that single steps differ."""

EVIDENCE_WEIGHT = 0.1
"""Of a network for patients, in place of what drawn bone would teach (0.7): of fractures put into real CT six networks
told more with less of it, AUC 0.85 to 0.88, and on drawn bone as much (`LOG.md`)."""

SHARE_FRACTURED = 0.5
"""Share of fractured vertebrae in a batch. Of either kind each level comes as often: drawn as often as patients break
them, C3 to C6 were too few, and their fractures were missed."""


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

    batch_size: stacks in a step; patches come from twice as many. is_for_patients: bone is made `uneven`, too, and the
    evidence has a fixed weight.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    fractured, intact = vertebrae_by_level(paths)
    if is_for_patients:
        network.evidence_weight.requires_grad_(False).fill_(EVIDENCE_WEIGHT)
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
        with in_bfloat16("cpu"):
            logits = network.decoder(network.encoder(inputs))
        return region_loss(logits.float(), batch.regions[PATCH_MIDDLE])

    def stack_loss(step: int) -> Tensor:
        batch = varied([draw() for _ in range(batch_size)])
        with in_bfloat16("cpu"):
            said = network(network_input(batch.planes_hu, batch.masks))
        return loss(said.logits.float(), said.attention.float(), said.regions.float(), batch)

    decay = LONG_DECAY if is_for_patients else EMA_DECAY
    for first, of_step, num_steps, rate in (
        (0, patch_loss, num_patch_steps, PATCH_LEARNING_RATE),
        (num_patch_steps, stack_loss, num_stack_steps, STACK_LEARNING_RATE),
    ):
        for step, value in train(network, of_step, num_steps=num_steps, learning_rate=rate, decay=decay):
            yield first + step, value


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
