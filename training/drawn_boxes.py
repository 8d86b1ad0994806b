"""A box around a fracture, as a reader drew it or a network proposes it, and as a line of a CSV has it.

Read in the RSNA data (`rsna/source.py`) and in an evaluation (`evaluation/froc.py`), which name file and line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

BOX_COLUMNS = ("x", "y", "width", "height", "slice_number")


@dataclass(frozen=True, kw_only=True)
class DrawnBox:
    """A rectangle in one slice, in its pixels: `x`, `y` is the upper left corner; slice_number is the n of n.dcm."""

    x: float
    y: float
    width: float
    height: float
    slice_number: int


def parse_box(row: Mapping[str, str]) -> DrawnBox:
    """The box of a line.

    Raises:
        ValueError: a cell is no number, or it is no box; says which, and what to do.
    """
    x, y, width, height, place = (parse_number(row, name) for name in BOX_COLUMNS)
    if width <= 0 or height <= 0:
        raise ValueError(f"a box of {row['width']} x {row['height']} pixels has no area. Remove the line.")
    if not place.is_integer():
        raise ValueError(f"slice_number is {row['slice_number']}; it is the n of n.dcm, a whole number.")
    return DrawnBox(x=x, y=y, width=width, height=height, slice_number=int(place))


def parse_number(row: Mapping[str, str], name: str) -> float:
    """A cell.

    Raises:
        ValueError: it is no finite number.
    """
    try:
        number = float(row[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {row[name]!r}, which is no number. Correct the line.")
    return number
