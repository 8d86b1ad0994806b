"""What the fracture network learns from: necks drawn from the atlas, broken, scanned, and cut vertebra by vertebra."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from model.bundle import ClassifySettings
from model.geometry import Grid
from model.levels import LEVELS
from model.segment import Vertebra
from model.volume import Volume
from training.evaluation.masks import dice
from training.files import write_npz
from training.inserted import insert, inserted_stacks
from training.inserted.insertion import Inserted
from training.inserted.scanner import disturb
from training.necks.atlas import Atlas
from training.necks.synthetic import draw_spine

FindVertebrae = Callable[[Volume], tuple[NDArray[np.uint8], list[Vertebra]]]
"""Labels and vertebrae of a volume, as `find_vertebrae` gives them."""

DRAWN_MM = 0.65
"""Spacing at which half of the necks are drawn; scanning only makes it coarser."""

BOOST = 3.0
"""Times RSNA's prevalence, so that training sees enough fractures."""

MIN_VISIBLE = 1.2
"""A fracture that changes HU by less than this many standard deviations of the noise is neither shown as one nor as
none."""


SHARE_FOUND, FOUND_DICE = 0.6, 0.5
"""Share of the necks whose outlines are those that the networks draw, with their mistakes, and how much of a vertebra
these have to meet for it to be judged."""


def write_neck_stacks(
    path: Path, seed: int, atlas: Atlas, classify: ClassifySettings, find: FindVertebrae | None = None
) -> None:
    """Draws, breaks, scans, cuts and stores one neck; a file that is there already is kept, and none is written if no
    vertebra is whole.

    The layout is that of `training.samples.classify_samples`, without the vertebrae that cannot be told. Without
    `find` all outlines are the true ones, wavering.
    """
    if path.exists():
        return
    rng = np.random.default_rng([seed, 53])
    reach_mm = classify.num_pixels * classify.pixel_mm / 2 + 5
    finest_mm = DRAWN_MM if rng.random() < 0.5 else rng.uniform(0.6, 1.1)
    neck = draw_spine(atlas, rng, spacing_mm=finest_mm, reach_mm=reach_mm)
    look = _Look(
        thick=max(1, round(float(rng.choice([0.6, 0.8, 1.25, 2.0, 2.5, 3.0])) / finest_mm)),
        blur_mm=rng.uniform(0.0, 0.8),
        noise_hu=rng.uniform(4, 45),
    )
    scan = _break_and_scan if rng.random() < 0.4 else _scan_and_break
    inserted, labels, grid = scan(*neck, look, rng)
    disturb(inserted.voxels_hu, grid, rng)
    if find is not None and rng.random() < SHARE_FOUND:
        inserted, labels = in_found_outlines(inserted, labels, grid, find)
    else:
        labels = drawn_by_a_network(labels, grid, rng)
    if not inserted.eligible:
        return
    write_npz(path, **inserted_stacks(inserted, labels, grid, classify))


@dataclass(frozen=True, kw_only=True)
class _Look:
    """Of a scan. thick: drawn planes that are averaged to a slice."""

    thick: int
    blur_mm: float
    noise_hu: float


_Broken = tuple[Inserted, NDArray[np.uint8], Grid]


def _break_and_scan(
    hu: NDArray[np.int16], labels: NDArray[np.uint8], grid: Grid, look: _Look, rng: np.random.Generator
) -> _Broken:
    """Fractures as they are in bone, however little of them a scan shows; what drowns in noise is neither."""
    inserted = insert(hu, labels, grid, rng, boost=BOOST)
    before, after = (_scanned(voxels, grid, look) for voxels in (hu, inserted.voxels_hu))
    regions = _thick_labels(inserted.regions, look.thick, share=0.25)
    unclear = _unclear(before, after, regions, look.noise_hu)
    scanned = replace(
        inserted,
        voxels_hu=_noisy(after, look, rng),
        regions=regions,
        eligible=tuple(label for label in inserted.eligible if label not in unclear),
    )
    return scanned, _thick_labels(labels, look.thick, share=0.5), _thick_grid(grid, look.thick)


def _scan_and_break(
    hu: NDArray[np.int16], labels: NDArray[np.uint8], grid: Grid, look: _Look, rng: np.random.Generator
) -> _Broken:
    """Fractures that can be seen in this scan, as they are put into real CT to measure the pipeline."""
    scanned = _noisy(_scanned(hu, grid, look), look, rng)
    labels, grid = _thick_labels(labels, look.thick, share=0.5), _thick_grid(grid, look.thick)
    return insert(scanned, labels, grid, rng, boost=BOOST), labels, grid


def in_found_outlines(
    inserted: Inserted, labels: NDArray[np.uint8], grid: Grid, find: FindVertebrae
) -> tuple[Inserted, NDArray[np.uint8]]:
    """Outlines as the networks draw them, and which vertebrae they have met."""
    volume = Volume(
        study_instance_uid="drawn", series_instance_uid="drawn", voxels_hu=inserted.voxels_hu, grid=grid, slices=()
    )
    with torch.inference_mode():
        found, _ = find(volume)
    met = tuple(label for label in inserted.eligible if dice(found == label, labels == label) >= FOUND_DICE)
    return replace(inserted, eligible=met), found


def drawn_by_a_network(labels: NDArray[np.uint8], grid: Grid, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The label map with outlines that waver by a millimetre or two, as a network's do."""
    drawn = np.zeros_like(labels)
    sigma = np.divide(rng.uniform(0.6, 1.6), grid.spacing_mm)
    for label, box in enumerate(ndimage.find_objects(labels, max_label=len(LEVELS)), start=1):
        if box is None:
            continue
        near = tuple(slice(max(side.start - 4, 0), side.stop + 4) for side in box)
        share = ndimage.gaussian_filter((labels[near] == label).astype(np.float32), sigma)
        nodes = rng.normal(size=[n // 8 + 2 for n in share.shape])
        zoom = np.divide(share.shape, nodes.shape)
        wavering = ndimage.zoom(nodes, zoom, order=1)[: share.shape[0], : share.shape[1], : share.shape[2]]
        drawn[near][share > 0.45 + 0.15 * wavering] = label
    return drawn


def _scanned(voxels_hu: NDArray[np.int16], grid: Grid, look: _Look) -> NDArray[np.float32]:
    in_plane = look.blur_mm / grid.spacing_mm[1]
    blurred = ndimage.gaussian_filter(voxels_hu.astype(np.float32), [0.3, in_plane, in_plane])
    num = len(blurred) // look.thick
    return np.asarray(blurred[: num * look.thick].reshape(num, look.thick, *blurred.shape[1:]).mean(axis=1))


def _noisy(voxels_hu: NDArray[np.float32], look: _Look, rng: np.random.Generator) -> NDArray[np.int16]:
    noise = rng.normal(scale=look.noise_hu, size=voxels_hu.shape).astype(np.float32)
    return np.asarray(np.clip(np.rint(voxels_hu + noise), -1024, 3071), np.int16)


def _thick_grid(grid: Grid, thick: int) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, 0] * (thick - 1) / 2
    affine[:3, 0] *= thick
    return Grid(shape=(grid.shape[0] // thick, *grid.shape[1:]), affine=affine)


def _thick_labels(labels: NDArray[np.uint8], thick: int, share: float) -> NDArray[np.uint8]:
    num = len(labels) // thick
    slabs = labels[: num * thick].reshape(num, thick, *labels.shape[1:])
    most = slabs.max(axis=1)
    return np.where((slabs == most[:, None]).mean(axis=1) >= share, most, 0).astype(np.uint8)


def _unclear(
    before: NDArray[np.float32], after: NDArray[np.float32], regions: NDArray[np.uint8], noise_hu: float
) -> set[int]:
    """Broken vertebrae whose fractures drown in the noise."""
    change = np.abs(after - before)
    seen = {label: change[regions == label] for label in np.unique(regions[regions > 0]).tolist()}
    # Many voxels together show what one does not: a tenth of the region has to stand out.
    return {label for label, values in seen.items() if np.quantile(values, 0.9) < MIN_VISIBLE * noise_hu}
