"""What is changed in a whole vertebra's stack for training, beyond `training.stack_changes.changed`."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.classify import network_input
from training.stack_changes import changed
from training.vertebra_stacks import Batch, Stack, collate

MAX_SHIFT = 1
"""Slices by which a stack is shifted along the spine."""

SHUFFLE_SHARE, SHUFFLE_SLICES = 0.2, 1.5
"""Share of stacks whose slices change places, and by how many places, as a standard deviation."""

CUTOUT_SHARE, MAX_CUTOUTS, CUTOUT_SIDES = 0.5, 3, (0.1, 0.3)
"""Share of stacks with boxes cut out, how many at most, and their sides as shares of the slice's."""


class Sample(NamedTuple):
    """One vertebra for the fracture network.

    inputs: `(S, 6, Y, X)`. regions: `(S, Y, X)`, 0 or 1. known: 1. where regions are a target. fractured: 0..1; between
    in a mixture. level: 0 is C1.
    """

    inputs: Tensor
    regions: Tensor
    known: Tensor
    fractured: Tensor
    level: Tensor


def plain(stack: Stack, *, fractured: bool, known: bool, level: int) -> Sample:
    """A stack as analysis sees it."""
    return _sample(collate([stack]), fractured=fractured, known=known, level=level)


def augmented(stack: Stack, rng: np.random.Generator, *, fractured: bool, known: bool, level: int) -> Sample:
    """A stack turned, scaled, mirrored and degraded, with slices that changed places and boxes cut out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(1 << 62)))  # the noise of `changed`
        batch = changed(collate([stack]), rng)
    sample = _sample(batch, fractured=fractured, known=known, level=level)
    inputs, regions = sample.inputs, sample.regions
    if rng.random() < SHUFFLE_SHARE:
        num_slices = len(inputs)
        places = np.argsort(np.arange(num_slices) + rng.normal(0, SHUFFLE_SLICES, num_slices))
        inputs, regions = inputs[places], regions[places]
    if rng.random() < CUTOUT_SHARE:
        for _ in range(rng.integers(1, MAX_CUTOUTS + 1)):
            _cut_out(inputs, regions, rng)
    return sample._replace(inputs=inputs, regions=regions)


def mixed(first: Sample, second: Sample, rng: np.random.Generator) -> Sample:
    """Both at once, each in part; two vertebrae of the same level. Reference: Zhang et al., mixup, ICLR 2018."""
    share = float(rng.beta(0.5, 0.5))
    return Sample(
        inputs=share * first.inputs + (1 - share) * second.inputs,
        regions=first.regions,
        known=torch.zeros(()),
        fractured=share * first.fractured + (1 - share) * second.fractured,
        level=first.level,
    )


def _sample(batch: Batch, *, fractured: bool, known: bool, level: int) -> Sample:
    return Sample(
        inputs=network_input(batch.planes_hu, batch.masks)[0],
        regions=batch.regions[0],
        known=torch.tensor(float(known)),
        fractured=torch.tensor(float(fractured)),
        level=torch.tensor(level),
    )


def _cut_out(inputs: Tensor, regions: Tensor, rng: np.random.Generator) -> None:
    """Blanks a box of all slices, but not their mask."""
    sides = np.array(inputs.shape[-2:])
    size = (sides * rng.uniform(*CUTOUT_SIDES, size=2)).astype(int)
    y, x = rng.integers(0, sides - size)
    box = (..., slice(y, y + size[0]), slice(x, x + size[1]))
    inputs[:, :-1][box] = 0
    regions[box] = 0
