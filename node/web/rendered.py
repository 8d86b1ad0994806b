"""An Instance as a picture for people: windowed, scaled, PNG or JPEG.

Reference: PS3.18 10.4.1.1.3 (rendered), 8.3.5 (window, viewport, quality).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels.utils import pixel_array

from model import PARSE_ERRORS
from node.web.catalog import StoredInstance
from node.web.matching import QueryError
from node.web.wado import CannotGiveError, NotThereError

_MAX_PIXELS = 4096  # of a side of a picture
_BONE = (400.0, 1800.0)  # centre and width of a window for CT that names none
_MACROS = {  # of functional groups, by attribute
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "PixelSpacing": "PixelMeasuresSequence",
}
MEDIA_TYPES = {"image/jpeg": "JPEG", "image/png": "PNG"}


@dataclass(frozen=True, kw_only=True)
class View:
    """How to show it. window: centre and width; None takes the Instance's own. size: largest width and height."""

    window: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    quality: int = 90


def parse_view(parameters: Mapping[str, str]) -> View:
    """Understands the query string of a rendered resource.

    Raises:
        QueryError: a parameter is not what it should be.
    """
    window, size, quality = None, None, 90
    if "window" in parameters:
        fields = parameters["window"].split(",")
        try:
            centre, width = float(fields[0]), float(fields[1])
        except (ValueError, IndexError):
            centre, width = 0.0, 0.0
        if len(fields) > 3 or (len(fields) == 3 and fields[2].lower() != "linear") or not 0 < width < 1e6:
            raise QueryError("window is CENTRE,WIDTH or CENTRE,WIDTH,linear with a width above 0")
        window = centre, width
    if "viewport" in parameters:
        sides = [int(side) if side.isdecimal() else 0 for side in parameters["viewport"].split(",")]
        if len(sides) != 2 or not all(0 < side <= _MAX_PIXELS for side in sides):
            raise QueryError(f"viewport is WIDTH,HEIGHT in pixels, up to {_MAX_PIXELS}")
        size = sides[0], sides[1]
    if "quality" in parameters:
        text = parameters["quality"]
        quality = int(text) if text.isdecimal() else 0
        if not 1 <= quality <= 100:
            raise QueryError("quality is a whole number from 1 to 100")
    return View(window=window, size=size, quality=quality)


def render(instance: StoredInstance, media_type: str, view: View, frame_number: int = 1) -> bytes:
    """The picture of one frame.

    Raises:
        NotThereError: there is no such frame.
        CannotGiveError: the Instance holds no picture, or one that cannot be decoded.
    """
    if not 1 <= frame_number <= instance.num_frames:
        raise NotThereError(f"Instance {instance.sop_instance_uid} has frames 1 to {instance.num_frames}")
    try:
        ds = dcmread(instance.path)
        if "PixelData" not in ds:
            raise CannotGiveError(f"Instance {instance.sop_instance_uid} has no pixels to show")
        picture = Image.fromarray(_grey_or_rgb(ds, frame_number - 1, view))
    except (*PARSE_ERRORS, RuntimeError) as error:
        raise CannotGiveError(f"Instance {instance.sop_instance_uid} cannot be decoded") from error
    picture = _with_square_pixels(picture, ds, frame_number - 1)
    if view.size:
        picture.thumbnail(view.size, Image.Resampling.LANCZOS)
    encoded = BytesIO()
    picture.save(encoded, MEDIA_TYPES[media_type], quality=view.quality)
    return encoded.getvalue()


def _grey_or_rgb(ds: Dataset, index: int, view: View) -> NDArray[np.uint8]:
    """Uint8 `(rows, columns)` or `(rows, columns, 3)`."""
    pixels = pixel_array(ds, index=index)  # as RGB, where it is colour
    if pixels.ndim == 3:
        return np.asarray(pixels, np.uint8)
    if int(ds.BitsAllocated) == 1:
        return (pixels * 255).astype(np.uint8)
    slope, intercept = _of_frame(ds, index, "RescaleSlope"), _of_frame(ds, index, "RescaleIntercept")
    values = pixels * np.float32(slope or 1) + np.float32(intercept or 0)
    centre, width = view.window or _own_window(ds, index)
    # PS3.3 C.11.2.1.2.1, linear.
    shown = np.clip((values - (centre - 0.5)) / max(width - 1, 1) + 0.5, 0, 1) * 255
    if ds.get("PhotometricInterpretation") == "MONOCHROME1":
        shown = 255 - shown
    return np.asarray(np.rint(shown), np.uint8)


def _of_frame(ds: Dataset, index: int, keyword: str) -> Any:
    """An attribute of the Instance, or of this frame of an Enhanced one, which may stand in the shared groups.

    Reference: PS3.3 C.7.6.16.
    """
    if keyword in ds:
        return ds.get(keyword)
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*per_frame[index : index + 1], *(ds.get("SharedFunctionalGroupsSequence") or [])):
        for macro in groups.get(_MACROS[keyword]) or []:
            if keyword in macro:
                return macro.get(keyword)
    return None


def _own_window(ds: Dataset, index: int) -> tuple[float, float]:
    """The first window of the frame; one for bone where it has none."""
    found = []
    for keyword in ("WindowCenter", "WindowWidth"):
        try:
            value = _of_frame(ds, index, keyword)
            first = value[0] if isinstance(value, list) or hasattr(value, "append") else value
            found.append(float(first) if first not in (None, "") else 0.0)
        except PARSE_ERRORS:  # it is no number, which says nothing of the pixels
            found.append(0.0)
    return (found[0], found[1]) if found[1] > 0 else _BONE


def _with_square_pixels(picture: Image.Image, ds: Dataset, index: int) -> Image.Image:
    spacing = _of_frame(ds, index, "PixelSpacing")
    if not spacing or len(spacing) != 2 or min(float(value) for value in spacing) <= 0:
        return picture
    ratio = float(spacing[0]) / float(spacing[1])
    if not 0.2 < ratio < 5 or abs(ratio - 1) < 0.01:
        return picture
    return picture.resize((picture.width, max(1, round(picture.height * ratio))))
