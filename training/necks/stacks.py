"""What the fracture network learns from: necks drawn from the atlas, broken, scanned, and cut vertebra by vertebra."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.bundle import ClassifySettings
from model.geometry import Grid
from model.levels import LEVELS
from training.inserted import insert, inserted_stacks
from training.inserted.scanner import disturb
from training.necks.atlas import Atlas
from training.necks.synthetic import draw_spine

DRAWN_MM = 0.65
"""Spacing at which bones are drawn and broken; scanning only makes it coarser."""

BOOST = 3.0
"""Times RSNA's prevalence, so that training sees enough fractures."""

MIN_VISIBLE = 1.2
"""A fracture that changes HU by less than this many standard deviations of the noise is neither shown as one nor as
none."""


def write_neck_stacks(path: Path, seed: int, atlas: Atlas, classify: ClassifySettings) -> None:
    """Draws, breaks, scans, cuts and stores one neck; a file that is there already is kept.

    The layout is that of `training.samples.classify_samples`, without the vertebrae that cannot be told.
    """
    if path.exists():
        return
    rng = np.random.default_rng([seed, 53])
    reach_mm = classify.num_pixels * classify.pixel_mm / 2 + 5
    intact, labels, grid = draw_spine(atlas, rng, spacing_mm=DRAWN_MM, reach_mm=reach_mm)
    inserted = insert(intact, labels, grid, rng, boost=BOOST)
    thick = int(rng.choice([1, 1, 2, 3, 4]))
    blur_mm = rng.uniform(0.0, 0.8)
    noise_hu = rng.uniform(4, 45)
    before, after = (_scanned(voxels, thick, blur_mm) for voxels in (intact, inserted.voxels_hu))
    coarse = _thick_grid(grid, thick)
    regions = _thick_labels(inserted.regions, thick, share=0.25)
    labels = _thick_labels(labels, thick, share=0.5)
    unclear = _unclear(before, after, regions, noise_hu)
    after += rng.normal(scale=noise_hu, size=after.shape).astype(np.float32)
    voxels_hu = np.clip(np.rint(after), -1024, 3071).astype(np.int16)
    disturb(voxels_hu, coarse, rng)
    scanned = replace(
        inserted,
        voxels_hu=voxels_hu,
        regions=regions,
        eligible=tuple(label for label in inserted.eligible if label not in unclear),
    )
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **inserted_stacks(scanned, drawn_by_a_network(labels, coarse, rng), coarse, classify))
    unfinished.replace(path)


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


def _scanned(voxels_hu: NDArray[np.int16], thick: int, blur_mm: float) -> NDArray[np.float32]:
    blurred = ndimage.gaussian_filter(voxels_hu.astype(np.float32), [0.3, blur_mm / DRAWN_MM, blur_mm / DRAWN_MM])
    num = len(blurred) // thick
    return np.asarray(blurred[: num * thick].reshape(num, thick, *blurred.shape[1:]).mean(axis=1))


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
