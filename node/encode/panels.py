"""A View on a page: the picture in the bone window, outlines, names, suspicious regions, orientation marks, scale."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model import LEVELS
from node.encode.canvas import INK, Canvas, Colour, outlines
from node.encode.colours import FRACTURE_RGB, LEVEL_RGB
from node.encode.views import View

LEVEL_HU, WIDTH_HU = 400, 1800
WINDOW = f"window level {LEVEL_HU}, width {WIDTH_HU} HU"

_MARK, _NAME = 19, 16
"""Pixels of an orientation mark and of a level's name."""
_SCALE_MM = 20
_MIN_NAMED_SHARE = 0.003
"""Of a picture: a vertebra with less in it is outlined, but named only where the picture is about it."""


def level_colour(name: str) -> Colour:
    """A level's colour as matplotlib takes it."""
    return _colour(LEVEL_RGB[name])


def _colour(rgb: tuple[int, int, int]) -> Colour:
    red, green, blue = rgb
    return red / 255, green / 255, blue / 255


def windowed(hu: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Gray 0..255 in the bone window."""
    low = LEVEL_HU - WIDTH_HU / 2
    gray: NDArray[np.uint8] = np.rint(((hu - low) / WIDTH_HU).clip(0, 1) * 255).astype(np.uint8)
    return gray


def draw_view(
    canvas: Canvas,
    x: int,
    y: int,
    view: View,
    *,
    pixel_mm: float,
    names: Literal["left", "right"],
    focus: str | None = None,
) -> None:
    """Draws a View with its top left corner at a point.

    names: the side of its outline on which a level's name stands. focus: the level the picture is about; the others'
    outlines are thin, and only its regions are boxed.
    """
    rows, columns = view.hu.shape
    canvas.picture(x, y, windowed(view.hu))
    if view.plane is not None:
        canvas.planes.add(view.plane)
    marks, edge = view.marks, 18
    taken = {
        (edge, rows // 2): marks.left,
        (columns - edge, rows // 2): marks.right,
        (columns // 2, edge): marks.top,
        (columns // 2, rows - edge): marks.bottom,
    }
    for (across, down), mark in taken.items():
        canvas.tag(x + across, y + down, mark, _MARK)
    length = _SCALE_MM / pixel_mm
    occupied = [*taken, (columns - 8 - round(length / 2), rows - 18)]
    for label, name in enumerate(LEVELS, start=1):
        mask = view.labels == label
        size = int(mask.sum())
        if size:
            canvas.outline(x, y, outlines(mask), level_colour(name), 2.0 if focus in (None, name) else 1.0)
        if size > _MIN_NAMED_SHARE * mask.size or (size and name == focus):
            for across, down in _free_places(mask, names, occupied)[:1]:
                occupied.append((across, down))
                canvas.tag(x + across, y + down, name, _NAME, level_colour(name))
    _draw_regions(canvas, x, y, view.fractures, focus)
    canvas.fill((x + columns - length - 8, y + rows - 10, length, 3), INK)
    canvas.tag(x + columns - 8 - length / 2, y + rows - 21, f"{_SCALE_MM / 10:g} cm", 13)


def _free_places(mask: NDArray[np.bool_], side: str, occupied: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where a level's name may stand, best first: beside its outline's outermost point, or a little above or below."""
    columns = np.flatnonzero(mask.any(axis=0))
    column = int(columns[0] if side == "left" else columns[-1])
    row = int(np.flatnonzero(mask[:, column]).mean())
    away = _NAME + 9
    across = max(column - away, away) if side == "left" else min(column + away, mask.shape[1] - away)
    places = [(across, min(max(row + shift, _NAME), len(mask) - _NAME)) for shift in (0, 26, -26)]
    return [place for place in places if all(abs(place[0] - a) > 44 or abs(place[1] - d) > 24 for a, d in occupied)]


def _draw_regions(canvas: Canvas, x: int, y: int, fractures: NDArray[np.uint8], focus: str | None) -> None:
    """A red line with a white rim around suspicious regions, and a dashed box around each of the level in focus."""
    mask = fractures > 0
    if not mask.any():
        return
    lines = outlines(mask)
    canvas.outline(x, y, lines, INK, 4.0)
    canvas.outline(x, y, lines, _colour(FRACTURE_RGB), 2.0)
    if focus is None:
        return
    components, _ = ndimage.label(fractures == LEVELS.index(focus) + 1)
    margin = 7
    for rows, columns in ndimage.find_objects(components):
        left, top = x + columns.start - margin, y + rows.start - margin
        size = columns.stop - columns.start + 2 * margin, rows.stop - rows.start + 2 * margin
        canvas.frame((left, top, *size), INK, 1.5, "--")
