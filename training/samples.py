"""Training samples cut from rendered phantoms, and the cache that holds them: two files for each imaginary patient.

A patient is rendered twice: the whole neck coarsely for the vertebra U-Net, and, once that is trained, the spine at a
scanner's spacing for the fracture network. Both are cut by the functions the pipeline itself uses, so that training
and analysis cannot disagree.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bundle import ClassifySettings, SegmentSettings
from model.classify import sample_mask, sample_planes, slice_grid, stack_grid
from model.geometry import Grid
from model.levels import LEVELS
from model.networks import VertebraUNet
from model.phantom import Anatomy, Fracture, Phantom, kinds_at, render
from model.pose import middle_of_box
from model.resample import average_pool
from model.segment import find_vertebrae
from model.volume import SliceSource, Volume
from training.files import write_npz

PREVALENCE = 0.28
"""Share of fractured vertebrae: far above real life, so that training sees enough of them."""

MIN_DICE = 0.6
"""Where the U-Net draws a vertebra worse than this, the fracture network learns on the true mask."""


def random_fractures(rng: np.random.Generator, prevalence: float = PREVALENCE) -> tuple[Fracture, ...]:
    """Fractures of any kind, 0.8 to 3 mm wide, each level broken with probability `prevalence`."""
    return tuple(
        Fracture(level=level, kind=str(rng.choice(kinds_at(level))), width_mm=float(rng.uniform(0.8, 3.0)))
        for level in LEVELS
        if rng.random() < prevalence
    )


def whole_neck_grid(anatomy: Anatomy, rng: np.random.Generator, spacing_mm: float) -> Grid:
    """An axial grid over neck and shoulders, from up to 30 mm below T1 to up to 60 mm above C1."""
    lower = anatomy.place("T1").lower_lps_mm[2] - rng.uniform(0, 30)
    upper = anatomy.place("C1").upper_lps_mm[2] + rng.uniform(5, 60)
    middle = anatomy.place("C4").centre_lps_mm
    width = 2 * int(rng.uniform(160, 260) / spacing_mm / 2)
    depth = 2 * int(rng.uniform(150, 250) / spacing_mm / 2)
    height = 2 * int((upper - lower) / spacing_mm / 2)
    centre = (middle[0] + rng.uniform(-10, 10), middle[1] + rng.uniform(-16, 4), (lower + upper) / 2)
    return Grid.axial(shape=(height, depth, width), spacing_mm=(spacing_mm,) * 3, centre_lps_mm=centre)


def segment_sample(anatomy: Anatomy, rng: np.random.Generator, settings: SegmentSettings) -> dict[str, NDArray[Any]]:
    """The whole neck on the U-Net's grid: `hu` int16, `share` uint8 0..255 of each voxel that is vertebra, `level`.

    The share, not a yes or no, lets the network place an outline between the centres of its coarse voxels.
    """
    grid = whole_neck_grid(anatomy, rng, settings.spacing_mm / 2)
    phantom = render(
        anatomy, grid, noise_hu=rng.uniform(5, 50), blur_mm=rng.uniform(0.4, 2.0), seed=int(rng.integers(1 << 31))
    )
    share, level = pooled_truth(phantom, 2)
    return {
        "hu": average_pool(phantom.voxels_hu, (2, 2, 2)).round().to(torch.int16).numpy(),
        "share": (share * 255).round().to(torch.uint8).numpy(),
        "level": level.round().to(torch.uint8).numpy(),
    }


def pooled_truth(phantom: Phantom, factor: int) -> tuple[Tensor, Tensor]:
    """How much of each voxel of a grid `factor` times as coarse is vertebra, 0..1, and the mean level of that."""
    factors = (factor, factor, factor)
    share = average_pool((phantom.vertebrae > 0).astype(np.int16), factors)
    level_sum = average_pool(phantom.vertebrae.astype(np.int16), factors)
    return share, torch.where(share > 0, level_sum / share.clamp(min=1e-6), 0)


def classify_samples(
    anatomy: Anatomy, rng: np.random.Generator, segment: SegmentSettings, classify: ClassifySettings, unet: VertebraUNet
) -> dict[str, NDArray[Any]]:
    """All seven vertebrae as the fracture network sees them, stacked in level order, in the masks the U-Net draws.

    `planes` int16 HU `(7, planes, Y, X)`, `masks` and `regions` uint8 0..255 `(7, slices, Y, X)`, `fractured` bool and
    `levels` uint8 1..7.
    """
    grid = spine_grid(anatomy, rng, classify)
    phantom = render(
        anatomy, grid, noise_hu=rng.uniform(5, 45), blur_mm=rng.uniform(0.3, 1.2), seed=int(rng.integers(1 << 31))
    )
    volume = phantom_volume(phantom, str(anatomy.seed))
    with torch.inference_mode():
        drawn, _ = find_vertebrae(volume, unet, segment, torch.device("cpu"))
    planes, masks, regions, fractured = [], [], [], []
    for label in range(1, len(LEVELS) + 1):
        mask, truth = drawn == label, phantom.vertebrae == label
        if 2 * (mask & truth).sum() < MIN_DICE * (mask.sum() + truth.sum()):
            mask = truth
        points = grid.to_lps_mm(np.argwhere(mask).astype(float))
        stack = stack_grid(middle_of_box(points), float(np.ptp(points[:, 2])), classify)
        slices = slice_grid(stack)
        planes.append(sample_planes(phantom.voxels_hu, grid, stack).round().to(torch.int16).numpy())
        masks.append((sample_mask(mask.astype(np.uint8), grid, slices, label=1) * 255).to(torch.uint8).numpy())
        regions.append((sample_mask(phantom.fractures, grid, slices, label=label) * 255).to(torch.uint8).numpy())
        fractured.append(bool((phantom.fractures == label).any()))
    return {
        "planes": np.stack(planes),
        "masks": np.stack(masks),
        "regions": np.stack(regions),
        "fractured": np.array(fractured),
        "levels": np.arange(1, len(LEVELS) + 1, dtype=np.uint8),
    }


def spine_grid(anatomy: Anatomy, rng: np.random.Generator, classify: ClassifySettings) -> Grid:
    """An axial grid of a scanner's spacing around C1..C7 and what their stacks of slices and the U-Net need beside."""
    boxes = np.array([(place.lower_lps_mm, place.upper_lps_mm) for place in anatomy.places.values()])
    # Wide enough that no stack of slices reaches beyond it: in a patient there is tissue, not air.
    half_mm = classify.num_pixels * classify.pixel_mm / 2 + 5
    reach_mm = np.array([half_mm, half_mm, 0.0])
    centres = boxes.mean(axis=1)
    beyond_mm = np.array([0.0, 0.0, 20.0])
    lower = np.minimum(boxes[:, 0], centres - reach_mm).min(axis=0) - beyond_mm
    upper = np.maximum(boxes[:, 1], centres + reach_mm).max(axis=0) + beyond_mm
    in_plane = rng.uniform(0.4, 0.8)
    spacing_mm = (float(rng.choice([0.625, 0.8, 1.0, 1.25, 1.5])), in_plane, in_plane)
    z, y, x = (int(n) for n in np.ceil((upper - lower)[::-1] / spacing_mm))
    return Grid.axial(shape=(z, y, x), spacing_mm=spacing_mm, centre_lps_mm=tuple((lower + upper) / 2))


def phantom_volume(phantom: Phantom, name: str) -> Volume:
    """A rendered phantom as the pipeline takes it."""
    slices = tuple(
        SliceSource(sop_instance_uid=f"{name}.{index}", path=Path(f"{index}.dcm"))
        for index in range(phantom.grid.shape[0])
    )
    return Volume(
        study_instance_uid=name,
        series_instance_uid=name,
        voxels_hu=phantom.voxels_hu,
        grid=phantom.grid,
        slices=slices,
    )


def write_neck(path: Path, seed: int, segment: SegmentSettings) -> None:
    """Draws, renders and stores one patient's neck; a file that is there already is kept."""
    if not path.exists():
        anatomy, rng = random_patient(seed)
        write_npz(path, **segment_sample(anatomy, rng, segment))


def write_stacks(
    path: Path, seed: int, segment: SegmentSettings, classify: ClassifySettings, unet: VertebraUNet
) -> None:
    """Draws, renders and stores one patient's vertebrae; a file that is there already is kept."""
    if not path.exists():
        anatomy, rng = random_patient(seed)
        write_npz(path, **classify_samples(anatomy, rng, segment, classify, unet))


def random_patient(seed: int) -> tuple[Anatomy, np.random.Generator]:
    """A patient with fractures drawn from a seed, and what is left of its randomness, for the scanner."""
    rng = np.random.default_rng([seed, 17])
    return Anatomy.random(seed, random_fractures(rng), variation=float(rng.uniform(0.6, 1.4))), rng


def write_all(
    write: Callable[..., None], folder: Path, seeds: range, num_workers: int, *settings: object
) -> Iterator[Path]:
    """The files of all seeds, as `write_neck` or `write_stacks` makes them; what an earlier call drew is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.npz" for seed in seeds]
    # Spawned, not forked: a fork of a process whose torch has threads can hang.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(write, path, seed, *settings) for path, seed in zip(paths, seeds, strict=True)]
        for job, path in zip(jobs, paths, strict=True):
            job.result()
            yield path
