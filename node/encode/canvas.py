"""A page of PAGE_PIXELS x PAGE_PIXELS to draw on, in pixels from its top left corner; the same for a picture and a PDF.

One matplotlib Figure is used for all pages of a case. Importing this module loads matplotlib.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import contourpy
import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from scipy import ndimage

PAGE_PIXELS = 1024
_DPI = 100
_POINT = 72 / _DPI
"""Points, in which matplotlib measures text and lines, of a pixel."""

Colour = str | tuple[float, float, float]
Box = tuple[float, float, float, float]
"""x, y of the top left corner, width, height."""

BACKGROUND, INK, FAINT, RULE = "#0d1116", "#f2f4f7", "#a9b4c0", "#39434f"

# matplotlib brings these files, so that a page looks the same on every machine.
_FONT_FOLDER = f"{matplotlib.get_data_path()}/fonts/ttf"
_REGULAR, _BOLD = f"{_FONT_FOLDER}/DejaVuSans.ttf", f"{_FONT_FOLDER}/DejaVuSans-Bold.ttf"
_SHAPE_PIXELS = 100

OUTLINE_BLUR_PIXELS = 1.0
"""Takes the steps of single voxels off an outline; moves it by less than a pixel of the page."""


@contextmanager
def plain_settings() -> Iterator[None]:
    """matplotlib's own defaults, whatever a user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"pdf.compression": 3, "path.simplify": False, "text.hinting": "no_hinting"})
        yield


class _Picture(Artist):
    """Gray pixels as they are; matplotlib's own images are resampled even at their own size, at ten times the cost."""

    zorder = 1

    def __init__(self, x: int, y: int, gray: NDArray[np.uint8]) -> None:
        super().__init__()
        self._corner = (x, y + len(gray))  # the bottom left one
        self._rgba = np.dstack([gray, gray, gray, np.full_like(gray, 255)])[::-1]

    def draw(self, renderer: Any) -> None:
        left, bottom = self.get_transform().transform(self._corner)
        renderer.draw_image(renderer.new_gc(), left, bottom, self._rgba)


class Canvas:
    """What can be drawn on a page; `clear` begins the next one. planes: Z indices of the slices shown on it.

    The artists belong to the Figure itself: an Axes would cost more time than all that is drawn in it.
    """

    def __init__(self) -> None:
        inches = PAGE_PIXELS / _DPI
        self.figure = Figure(figsize=(inches, inches), dpi=_DPI, facecolor=BACKGROUND)
        self._agg = FigureCanvasAgg(self.figure)
        self._on_page = Affine2D().scale(1 / PAGE_PIXELS, -1 / PAGE_PIXELS).translate(0, 1) + self.figure.transFigure

    def clear(self) -> None:
        """An empty page."""
        self.figure.clear()
        self.planes: set[int] = set()

    def pixels(self) -> NDArray[np.uint8]:
        """The page as drawn so far, RGB, uint8 `(PAGE_PIXELS, PAGE_PIXELS, 3)`."""
        self._agg.draw()
        return np.ascontiguousarray(np.asarray(self._agg.buffer_rgba())[..., :3])

    def text(
        self,
        x: float,
        y: float,
        said: str,
        pixels: float,
        colour: Colour = INK,
        *,
        bold: bool = False,
        ha: Literal["left", "center", "right"] = "left",
        va: Literal["top", "center", "baseline", "bottom"] = "top",
    ) -> None:
        """Text, `pixels` high, aligned to a point as matplotlib has it."""
        shown = Text(
            x, y, said, fontproperties=_font(bold, pixels), color=colour, ha=ha, va=va, linespacing=1.3, zorder=5
        )
        shown.set_parse_math(False)
        self._add(shown)

    def tag(self, x: float, y: float, said: str, pixels: float, edge: Colour | None = None) -> None:
        """A few bold letters around a point, on a dark ground over a picture.

        They are drawn as shapes: much faster than text, but a search in the PDF does not find them.
        """
        width, height = (0.85 * len(said) + 0.3) * pixels, 1.3 * pixels
        ground = Rectangle((x - width / 2, y - height / 2), width, height, facecolor=(0, 0, 0, 0.65), zorder=4)
        ground.set_edgecolor(edge or "none")
        self._add(ground)
        scale = pixels / _SHAPE_PIXELS
        place = Affine2D().scale(scale, -scale).translate(x, y + 0.36 * pixels)
        self._add(PathPatch(place.transform_path(_shape(said)), facecolor=INK, edgecolor="none", zorder=5))

    def fill(self, box: Box, colour: Colour) -> None:
        """A filled rectangle."""
        x, y, width, height = box
        self._add(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", zorder=2))

    def frame(self, box: Box, colour: Colour, width: float = 1.0, style: str = "-") -> None:
        """A rectangle's edge, `width` pixels wide."""
        x, y, across, down = box
        edge = Rectangle((x, y), across, down, fill=False, edgecolor=colour, linestyle=style, zorder=4)
        edge.set_linewidth(width * _POINT)
        self._add(edge)

    def picture(self, x: int, y: int, gray: NDArray[np.uint8]) -> None:
        """A gray picture, pixel by pixel, its top left corner at a point."""
        self._add(_Picture(x, y, gray))

    def outline(self, x: int, y: int, lines: Iterable[NDArray[np.float64]], colour: Colour, width: float) -> None:
        """Lines `(n, 2)`, (x, y), `width` pixels wide, in a picture whose top left corner is at (x, y) of the page."""
        shifted = [line + np.array((x, y)) for line in lines]
        self._add(LineCollection(shifted, colors=[colour], linewidths=width * _POINT, zorder=3))

    def _add(self, artist: Artist) -> None:
        artist.set_transform(self._on_page)
        self.figure.add_artist(artist)


@cache
def _shape(said: str) -> Path:
    """Letters of _SHAPE_PIXELS, centred over the origin, upwards; the few marks and names of levels that there are."""
    path = TextPath((0, 0), said, prop=FontProperties(fname=_BOLD, size=_SHAPE_PIXELS))
    width = path.get_extents().width
    return Affine2D().translate(-width / 2, 0).transform_path(path)


@cache
def _font(bold: bool, pixels: float) -> FontProperties:
    return FontProperties(fname=_BOLD if bold else _REGULAR, size=pixels * _POINT)


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Lines `(n, 2)`, (x, y), around the parts of a mask `(rows, columns)`; pixel (0, 0) covers 0..1 by 0..1."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return []
    margin = 4
    rows, columns = found[0]
    top, left = max(rows.start - margin, 0), max(columns.start - margin, 0)
    part = mask[top : rows.stop + margin, left : columns.stop + margin].astype(np.float32)
    # One pixel of nothing around it closes the lines at the picture's edge.
    soft = np.pad(ndimage.gaussian_filter(part, OUTLINE_BLUR_PIXELS), 1)
    lines = contourpy.contour_generator(z=soft).lines(0.5)
    return [np.asarray(line) + np.array((left - 0.5, top - 0.5)) for line in lines]
