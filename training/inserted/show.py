"""A contact sheet of inserted fractures and hard negatives, before and after, for the eyes of whoever changes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates

from model.geometry import FloatArray, Grid
from model.resample import index_range
from training.inserted.frame import VertebraFrame, vertebra_frames
from training.inserted.insertion import break_once
from training.inserted.negatives import NEGATIVES, add_negative
from training.inserted.sites import KINDS

PIXEL_MM, TILE_MM = 0.3, 54.0
WINDOW_LEVEL_HU, WINDOW_WIDTH_HU = 400.0, 1800.0
NUM_COLUMNS = 2

Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One thing that was put in: a line of text, and slices through its middle before and after."""

    text: str
    picture: Picture


def contact_sheet(
    voxels_hu: NDArray[np.int16], labels: NDArray[np.uint8], grid: Grid, rng: np.random.Generator, out: Path
) -> int:
    """Writes every kind that each vertebra can have, one at a time, as a PNG; gives how many there were.

    Each row: axial, sagittal and coronal slice before, then after with the fracture's outline in the last three.
    """
    rows = []
    for frame in vertebra_frames(voxels_hu, labels, grid):
        # Each row changes a copy: of what is near the vertebra, not of the whole volume.
        points = frame.to_lps_mm(frame.points)
        first, last = index_range(grid, points.min(axis=0) - TILE_MM / 2, points.max(axis=0) + TILE_MM / 2, margin=1)
        near = np.s_[first[0] : last[0], first[1] : last[1], first[2] : last[2]]
        near_grid = grid.part(first, voxels_hu[near].shape)
        for kind in (*KINDS[frame.level], *NEGATIVES):
            row = _row(voxels_hu[near], labels[near], near_grid, frame, kind, rng)
            if row is not None:
                rows.append(row)
    if not rows:
        return 0
    height, width = rows[0].picture.shape[:2]
    num_lines = -(-len(rows) // NUM_COLUMNS)
    sheet = Image.new("RGB", (NUM_COLUMNS * (width + 8), num_lines * (height + 16)))
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        x, y = (number // num_lines) * (width + 8), (number % num_lines) * (height + 16)
        draw.text((x + 2, y + 2), row.text, fill=(255, 255, 120))
        sheet.paste(Image.fromarray(row.picture), (x, y + 14))
    sheet.save(out, "PNG")
    return len(rows)


def _row(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    frame: VertebraFrame,
    kind: str,
    rng: np.random.Generator,
) -> Row | None:
    changed, regions = voxels_hu.copy(), np.zeros(voxels_hu.shape, np.uint8)
    text = f"{frame.level} {kind}"
    if kind in NEGATIVES:
        if not add_negative(changed, labels, grid, frame, kind, rng):
            return None
        text += " (no fracture)"
    else:
        fracture = break_once(changed, labels, grid, frame, kind, rng, regions)
        if fracture is None:
            return None
        text += (
            f", {fracture.width_mm:.1f} mm wide, moved {fracture.displacement_mm:.1f} mm, "
            f"contrast {fracture.contrast_to_noise:.1f}"
        )
    where = np.argwhere(regions > 0) if regions.any() else np.argwhere(np.abs(changed - voxels_hu) > 60)
    if not len(where):
        return None
    # A voxel of it, not a mean that may lie between two of its parts.
    centre = where[np.abs(where - np.median(where, axis=0)).sum(axis=1).argmin()]
    centre_lps_mm = grid.to_lps_mm(centre.astype(float))
    before = [_slice(voxels_hu, grid, centre_lps_mm, axis) for axis in range(3)]
    after = [_slice(changed, grid, centre_lps_mm, axis) for axis in range(3)]
    outlines = [_slice((regions > 0).astype(np.uint8), grid, centre_lps_mm, axis) > 0.4 for axis in range(3)]
    marked = [_marked(tile, outline) for tile, outline in zip(after, outlines, strict=True)]
    pictures = [tile for trio in zip(map(_grey, before), map(_grey, after), marked, strict=True) for tile in trio]
    return Row(text=text, picture=np.concatenate(pictures, axis=1))


def _slice(voxels: NDArray[Any], grid: Grid, centre_lps_mm: FloatArray, axis: int) -> NDArray[np.float32]:
    """A square through a point: axial (0), sagittal (1) or coronal (2), the head at the top, the left on the right."""
    reach = np.arange(-TILE_MM / 2, TILE_MM / 2, PIXEL_MM)
    across, down = {0: ((1, 0, 0), (0, 1, 0)), 1: ((0, 1, 0), (0, 0, -1)), 2: ((1, 0, 0), (0, 0, -1))}[axis]
    points = centre_lps_mm + reach[None, :, None] * np.array(across) + reach[:, None, None] * np.array(down)
    half = TILE_MM / 2 + 1
    first, last = index_range(grid, centre_lps_mm - half, centre_lps_mm + half, margin=1)
    (z0, y0, x0), (z1, y1, x1) = first, last
    part = voxels[z0:z1, y0:y1, x0:x1].astype(np.float32)
    return np.asarray(map_coordinates(part, np.moveaxis(grid.to_index(points) - first, -1, 0), order=1, mode="nearest"))


def _grey(tile_hu: NDArray[np.float32]) -> Picture:
    share = np.clip((tile_hu - WINDOW_LEVEL_HU) / WINDOW_WIDTH_HU + 0.5, 0, 1)
    return np.repeat((share * 255).astype(np.uint8)[..., None], 3, axis=2)


def _marked(tile_hu: NDArray[np.float32], inside: NDArray[np.bool_]) -> Picture:
    picture = _grey(tile_hu)
    inner = inside.copy()
    for axis in (0, 1):
        inner &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    picture[inside & ~inner] = (255, 60, 60)
    return picture
