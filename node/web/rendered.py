"""Instances as pictures for people: windowed, scaled, PNG or JPEG; one, or all of a Study, a Series or an Instance.

Reference: PS3.18 10.4.1.1.3 (rendered), 8.3.5 (window, viewport, quality).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO, FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels.utils import pixel_array

from model import PARSE_ERRORS, decoding_plugin
from node.web.accept import Offer
from node.web.catalog import StoredInstance
from node.web.matching import QueryError
from node.web.multipart import end_of, part_head
from node.web.wado import CannotGiveError, NotThereError

_MAX_PIXELS = 4096  # of a side of a picture
_THUMBNAIL = (128, 128)
_BONE = (400.0, 1800.0)  # centre and width of a window for CT that names none
_MACROS = {  # of functional groups, by attribute
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "VOILUTFunction": "FrameVOILUTSequence",
    "PixelSpacing": "PixelMeasuresSequence",
}
FUNCTIONS = ("linear", "linear-exact", "sigmoid")
MEDIA_TYPES = {"image/jpeg": "JPEG", "image/png": "PNG"}

Wanted = Sequence[tuple[StoredInstance, Sequence[int]]]
"""Instances, each with the numbers of the frames that are wanted of it."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which values are shown, and how they become grey: a function of PS3.18 8.3.5.1.2."""

    centre: float
    width: float
    function: str = "linear"


@dataclass(frozen=True, kw_only=True)
class View:
    """How to show it. window: None takes the Instance's own. size: width and height to fill as far as they can be.

    region: of the pixels as they are stored: left, top, width and height; the edge where the last two are None, and
    mirrored where they are negative. warnings: what was asked for and is not done.
    """

    window: Window | None = None
    size: tuple[int, int] | None = None
    region: tuple[float, float, float | None, float | None] = (0, 0, None, None)
    quality: int = 90
    warnings: tuple[str, ...] = ()

    def as_thumbnail(self) -> "View":
        """The same, small unless a size is named.

        Raises:
            QueryError: it is of a region.
        """
        if self.region != View.region:
            raise QueryError("of a thumbnail viewport is WIDTH,HEIGHT: it is small, and of the whole picture")
        return self if self.size else replace(self, size=_THUMBNAIL)


def offers(*, one: bool, several: bool) -> list[Offer]:
    """Forms of one picture, and of several; the first is what a client gets that says nothing."""
    made = [Offer(media_type=media_type) for media_type in MEDIA_TYPES] if one else []
    return made + [Offer(media_type="multipart/related", part=part) for part in MEDIA_TYPES if several]


def all_of(instances: Sequence[StoredInstance]) -> Wanted:
    return [(instance, range(1, instance.num_frames + 1)) for instance in instances]


def middle_of(instances: Sequence[StoredInstance]) -> Wanted:
    """The one to stand for all: the middle of the longest CT; what was made of it only if there is nothing else."""
    received = [instance for instance in instances if instance.case_series == instance.series_instance_uid]
    num_frames: Counter[str] = Counter()
    for instance in received or instances:
        num_frames[instance.series_instance_uid] += instance.num_frames
    ((longest, _),) = num_frames.most_common(1)
    some = [instance for instance in received or instances if instance.series_instance_uid == longest]
    one = some[len(some) // 2]
    return [(one, [(one.num_frames + 1) // 2])]


def parse_view(parameters: Mapping[str, str]) -> View:
    """Understands the query string of a rendered resource.

    Raises:
        QueryError: a parameter is not what it should be.
    """
    view = View()
    if "window" in parameters:
        view = replace(view, window=_parse_window(parameters["window"]))
    if "viewport" in parameters:
        size, region = _parse_viewport(parameters["viewport"])
        view = replace(view, size=size, region=region)
    if "quality" in parameters:
        quality = _number(parameters["quality"])
        if not (1 <= quality <= 100 and quality.is_integer()):
            raise QueryError("quality is a whole number from 1 to 100")
        view = replace(view, quality=int(quality))
    return replace(view, warnings=tuple(_not_done(parameters)))


def _not_done(parameters: Mapping[str, str]) -> Iterator[str]:
    """What is not drawn: pictures bear no text and no profile, whatever is asked for (PS3.18 8.3.5.1.1, 8.3.5.1.5)."""
    if (annotation := parameters.get("annotation")) is not None:
        if not set(annotation.split(",")) <= {"patient", "technique"}:
            raise QueryError("annotation is patient, technique, or both with a comma")
        yield f"The following annotation values are not supported: {annotation}"
    if parameters.get("iccprofile", "no") != "no":
        yield "The iccprofile parameter is not supported: the picture has none"


def _parse_window(text: str) -> Window:
    centre, width, function, *more = (*text.split(","), "", "")
    found = Window(centre=_number(centre), width=_number(width), function=function.lower() or "linear")
    is_wide = 0 < found.width < 1e6 and (found.width >= 1 or found.function != "linear")
    if any(more) or found.function not in FUNCTIONS or not (math.isfinite(found.centre) and is_wide):
        raise QueryError(
            f"window is CENTRE,WIDTH or CENTRE,WIDTH,FUNCTION, which is {', '.join(FUNCTIONS)}; WIDTH is above 0, of "
            "linear from 1"
        )
    return found


def _parse_viewport(text: str) -> tuple[tuple[int, int], tuple[float, float, float | None, float | None]]:
    width, height, *fields = (*text.split(","), *[""] * 5)
    size = _number(width), _number(height)
    if not all(0 < side <= _MAX_PIXELS and side.is_integer() for side in size):
        raise QueryError(f"viewport is WIDTH,HEIGHT in pixels, up to {_MAX_PIXELS}, and may have a region")
    region = [_number(field) if field else None for field in fields[:4]]
    if any(fields[4:]) or not all(value is None or math.isfinite(value) for value in region):
        raise QueryError(
            "viewport is WIDTH,HEIGHT,LEFT,TOP,WIDTH,HEIGHT; what is left out of the last four is the edge"
        )
    left, top, region_width, region_height = region
    return (int(size[0]), int(size[1])), (abs(left or 0), abs(top or 0), region_width, region_height)


def _number(text: str) -> float:
    """A number, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def pictures(wanted: Wanted, media_type: str, view: View) -> Iterator[bytes]:
    """The pictures of these frames. Instances without pixels are left out.

    Raises:
        NotThereError: there is no such frame.
        CannotGiveError: there are no pixels at all, or some that cannot be decoded.
        QueryError: the region that is asked for is not in the picture.
    """
    is_any = False
    for instance, numbers in wanted:
        if not 1 <= min(numbers) <= max(numbers) <= instance.num_frames:
            raise NotThereError(f"Instance {instance.sop_instance_uid} has frames 1 to {instance.num_frames}")
        try:
            ds = dcmread(instance.path)
        except PARSE_ERRORS as error:
            raise CannotGiveError(f"Instance {instance.sop_instance_uid} cannot be parsed") from error
        if "PixelData" not in ds:
            continue
        for number in numbers:
            try:
                picture = Image.fromarray(_grey_or_rgb(ds, number - 1, view))
                row_by_column = _row_by_column(ds, number - 1)
            except (*PARSE_ERRORS, RuntimeError) as error:
                raise CannotGiveError(f"Instance {instance.sop_instance_uid} cannot be decoded") from error
            encoded = BytesIO()
            picture = _scaled(picture, view, row_by_column)
            picture.save(encoded, MEDIA_TYPES[media_type], quality=view.quality)
            is_any = True
            yield encoded.getvalue()
    if not is_any:
        raise CannotGiveError(f"Instance {wanted[0][0].sop_instance_uid} has no pixels to show")


def multipart_of_pictures(wanted: Wanted, media_type: str, view: View, boundary: str) -> Iterator[list[bytes | FileIO]]:
    """multipart/related of `pictures`, one at a time."""
    for picture in pictures(wanted, media_type, view):
        yield [part_head(boundary, media_type), picture]
    yield [end_of(boundary)]


def _grey_or_rgb(ds: Dataset, index: int, view: View) -> NDArray[np.uint8]:
    """Uint8 `(rows, columns)` or `(rows, columns, 3)`."""
    pixels = pixel_array(
        ds, index=index, decoding_plugin=decoding_plugin(ds.file_meta.TransferSyntaxUID)
    )  # as RGB, where it is colour
    if pixels.ndim == 3:
        return np.asarray(pixels, np.uint8)
    if int(ds.BitsAllocated) == 1:
        return (pixels * 255).astype(np.uint8)
    slope, intercept = _of_frame(ds, index, "RescaleSlope"), _of_frame(ds, index, "RescaleIntercept")
    values = pixels * np.float32(slope or 1) + np.float32(intercept or 0)
    shown = _windowed(values, view.window or _own_window(ds, index)) * 255
    if ds.get("PhotometricInterpretation") == "MONOCHROME1":
        shown = 255 - shown
    return np.asarray(np.rint(shown), np.uint8)


def _windowed(values: NDArray[np.float32], window: Window) -> NDArray[np.float32]:
    """From 0 to 1. Reference: PS3.3 C.11.2.1.2.1 (linear), C.11.2.1.3."""
    shown: NDArray[np.float32]
    if window.function == "sigmoid":
        shown = 1 / (1 + np.exp(np.clip(-4 * (values - window.centre) / window.width, -80, 80)))
    elif window.function == "linear-exact":
        shown = np.clip((values - window.centre) / window.width + 0.5, 0, 1)
    else:
        shown = np.clip((values - (window.centre - 0.5)) / max(window.width - 1, 1) + 0.5, 0, 1)
    return shown


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


def _own_window(ds: Dataset, index: int) -> Window:
    """The first window of the frame; one for bone where it has none."""
    found = []
    for keyword in ("WindowCenter", "WindowWidth"):
        try:
            value = _of_frame(ds, index, keyword)
            first = value[0] if isinstance(value, list) or hasattr(value, "append") else value
            found.append(float(first) if first not in (None, "") else 0.0)
        except PARSE_ERRORS:  # it is no number, which says nothing of the pixels
            found.append(0.0)
    function = str(_of_frame(ds, index, "VOILUTFunction") or "").lower().replace("_", "-")
    centre, width = found if found[1] > 0 else _BONE
    return Window(centre=centre, width=width, function=function if function in FUNCTIONS else "linear")


def _row_by_column(ds: Dataset, index: int) -> float:
    """How much higher than wide a pixel is; 1 where nothing sensible says so."""
    spacing = _of_frame(ds, index, "PixelSpacing")
    if not spacing or len(spacing) != 2 or min(float(value) for value in spacing) <= 0:
        return 1
    ratio = float(spacing[0]) / float(spacing[1])
    return ratio if 0.2 < ratio < 5 and abs(ratio - 1) >= 0.01 else 1


def _scaled(picture: Image.Image, view: View, row_by_column: float) -> Image.Image:
    """The region with square pixels, as large as the viewport lets it be (PS3.18 8.3.5.1.3)."""
    left, top, asked_width, asked_height = view.region
    width = abs(asked_width) if asked_width is not None else picture.width - left
    height = abs(asked_height) if asked_height is not None else picture.height - top
    box = (left, top, left + width, top + height)
    if width <= 0 or height <= 0 or box[2] > picture.width or box[3] > picture.height:
        raise QueryError(f"the region of viewport is not within the {picture.width} x {picture.height} pixels")
    shown_height = height * row_by_column
    scale = min(view.size[0] / width, view.size[1] / shown_height) if view.size else 1
    size = max(1, round(width * scale)), max(1, round(shown_height * scale))
    if (size, box) != (picture.size, (0, 0, *picture.size)):
        picture = picture.resize(size, Image.Resampling.LANCZOS, box)
    if (asked_width or 0) < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if (asked_height or 0) < 0:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture
