"""The pages of a case: an overview, a page for each suspected level, and every level at a glance.

Drawn for whoever has no viewer for Segmentations and reports: as pictures and as a PDF (`summary.py`). Every page says
that nobody has reviewed it. No patient is named: what is burnt into pixels cannot be taken out again.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pydicom

from model import LEVELS, Analysis, Finding, LevelFinding, ModelInfo, Volume
from node.encode.canvas import FAINT, INK, PAGE_PIXELS, RULE, Canvas, Colour
from node.encode.keyslices import attention_by_plane, key_planes
from node.encode.panels import WINDOW, draw_view, level_colour
from node.encode.sr import conclude
from node.encode.views import Spine, View, coronal_sheet, sagittal_sheet, slice_view

BANNER = "AI result, research use, not reviewed"
_AMBER = "#ffb000"
_WARNING = "#ff6b5e"
"""The red of suspicion as text: brighter than that of the outlines, to be read on a dark ground."""
_MARGIN = 16
_TEXT = 15
"""Pixels of most text."""
_MAX_LINES = 11
_NECK = (590, 436)
"""Rows and columns of the overview's picture from the left."""

_ANSWERS = {
    Finding.PRESENT: "▲ fracture suspected",
    Finding.ABSENT: "not suspected",
    Finding.UNDETERMINED: "not judged",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """What the pages of one case are drawn from.

    spine: runs through the vertebrae's centroids. bodies: through their bodies. neck, pixel_mm: the neck from the left,
    around `spine.middle_lps_mm`. made_by: the software, for the overview's last line.
    """

    analysis: Analysis
    volume: Volume
    spine: Spine
    bodies: Spine
    neck: View
    pixel_mm: float
    made_by: str

    @classmethod
    def of(cls, analysis: Analysis, volume: Volume, made_by: str) -> "_Case":
        spine = Spine.of(analysis, volume.grid)
        middle = spine.middle_lps_mm
        pixel_mm = max((np.ptp(spine.z_mm) + 60) / _NECK[0], (np.ptp(spine.y_mm) + 75) / _NECK[1], 0.2)
        neck = sagittal_sheet(volume, analysis, spine, centre_lps_mm=middle, shape=_NECK, pixel_mm=pixel_mm)
        bodies = spine.through_bodies(neck.labels, pixel_mm, middle)
        return cls(
            analysis=analysis,
            volume=volume,
            spine=spine,
            bodies=bodies,
            neck=neck,
            pixel_mm=pixel_mm,
            made_by=made_by,
        )

    def slice_name(self, plane: int) -> str:
        """A slice as a person finds it: by its Instance Number (and frame) and its position."""
        source = self.volume.slices[plane]
        ds = pydicom.dcmread(source.path, specific_tags=["InstanceNumber", "NumberOfFrames"], stop_before_pixels=True)
        frame = f" frame {source.frame_number}" if "NumberOfFrames" in ds else ""
        return f"Instance {ds.get('InstanceNumber', '?')}{frame}, {_position_mm(self.volume, plane):+.1f} mm"


def draw_pages(analysis: Analysis, volume: Volume, made_by: str) -> Iterator[Canvas]:
    """The pages one after another, always on the same Canvas: use each before asking for the next."""
    case = _Case.of(analysis, volume, made_by)
    levels = analysis.findings.levels
    pages: list[Callable[[_Case, Canvas], None]] = [_draw_overview]
    for name, level in levels.items():
        if level.finding is Finding.PRESENT and key_planes(level, volume.slices):
            pages.append(partial(_draw_level, name=name))
    if any(level.in_field_of_view for level in levels.values()):
        pages.append(_draw_all_levels)
    canvas = Canvas()
    for number, draw in enumerate(pages, start=1):
        canvas.clear()
        canvas.fill((0, 0, PAGE_PIXELS, 44), _AMBER)
        canvas.text(_MARGIN, 31, BANNER, 24, "black", bold=True, va="baseline")
        canvas.text(PAGE_PIXELS - _MARGIN, 31, f"page {number} of {len(pages)}", 20, "black", va="baseline", ha="right")
        model = textwrap.shorten(_model(case), 142, placeholder=" …")
        canvas.text(_MARGIN, 1013, model, 13, _AMBER, va="baseline")
        draw(case, canvas)
        yield canvas


# --- The overview ------------------------------------------------------------------------------------------------


def _draw_overview(case: _Case, canvas: Canvas) -> None:
    """The answer in a sentence, the neck from the side and from the front, a row for each level, what to know."""
    findings = case.analysis.findings
    colour = _WARNING if findings.patient_overall.finding is Finding.PRESENT else INK
    said = conclude(findings)
    size, num_letters = (30, 50) if len(said) <= 50 else (21, 72)
    canvas.text(_MARGIN, 58, textwrap.fill(said, num_letters), size, colour, bold=True)

    top, (height, width) = 144, _NECK
    _caption(canvas, _MARGIN, top, width, "From the left", "sagittal, along the spine")
    draw_view(canvas, _MARGIN, top, case.neck, pixel_mm=case.pixel_mm, names="left")
    coronal = coronal_sheet(
        case.volume,
        case.analysis,
        case.bodies,
        centre_lps_mm=case.spine.middle_lps_mm,
        shape=(height, 268),
        pixel_mm=case.pixel_mm,
    )
    _caption(canvas, 460, top, 268, "From the front", "coronal")
    draw_view(canvas, 460, top, coronal, pixel_mm=case.pixel_mm, names="right")
    _draw_table(case, canvas, x=744, y=top, width=PAGE_PIXELS - _MARGIN - 744, row_height=height / 8)
    _draw_notes(case, canvas, y=top + height + 14)


def _draw_table(case: _Case, canvas: Canvas, *, x: float, y: float, width: float, row_height: float) -> None:
    findings = case.analysis.findings
    overall = findings.patient_overall
    is_partial = overall.finding is Finding.UNDETERMINED and overall.probability is not None
    answer = "not suspected where judged" if is_partial else _ANSWERS[overall.finding]
    rows: list[tuple[str, Colour, float | None, Finding, str]] = [
        ("Patient", INK, overall.probability, overall.finding, answer)
    ]
    for name, level in findings.levels.items():
        rows.append((name, level_colour(name), level.probability, level.finding, _answer(level)))
    for number, (name, colour, probability, finding, answer) in enumerate(rows):
        top = y + number * row_height
        suspected = finding is Finding.PRESENT
        said = "–" if probability is None else _percent(probability)
        canvas.fill((x, top + 2, 8, row_height - 14), colour)
        canvas.text(x + 18, top, name, 25, bold=True)
        canvas.text(x + width, top, said, 25, _WARNING if suspected else INK, ha="right", bold=suspected)
        bar = (x + 18, top + 32, width - 18, 9)
        canvas.fill(bar, RULE)
        if probability is not None:
            canvas.fill((bar[0], bar[1], bar[2] * probability, bar[3]), _WARNING if suspected else FAINT)
            tick = bar[0] + bar[2] * findings.model.level_operating_points.get(name, findings.model.operating_point)
            canvas.fill((tick - 1, bar[1] - 3, 2, bar[3] + 6), INK)
        canvas.text(x + 18, top + 45, answer, _TEXT, _WARNING if suspected else FAINT, bold=suspected)


def _draw_notes(case: _Case, canvas: Canvas, *, y: float) -> None:
    """Left: what was seen and what limits it. Right: what is drawn, and who says so."""
    findings, volume = case.analysis.findings, case.volume
    seen = [name for name, level in findings.levels.items() if level.in_field_of_view]
    first, last = _position_mm(volume, 0), _position_mm(volume, volume.grid.shape[0] - 1)
    left = [
        f"Field of view: {volume.grid.shape[0]} slices, {first:+.1f} to {last:+.1f} mm; "
        f"in it: {', '.join(seen) or 'no cervical vertebra'}.",
        *findings.warnings,
    ]
    right = [
        f"White tick: from a probability of {_operating_points(findings.model)} a fracture is suspected. "
        "Red line, dashed box: suspicious region.",
        f"Views follow the spine; {WINDOW}.",
        f"{case.made_by}. No patient is named but in the header.",
        _model(case),  # last: if something is cut off, then what stands in the report
    ]
    half = (PAGE_PIXELS - 3 * _MARGIN) / 2
    for x, title, notes, colour in (
        (_MARGIN, "What was seen", left, INK),
        (2 * _MARGIN + half, "How to read it", right, FAINT),
    ):
        canvas.fill((x, y, half, 1), RULE)
        canvas.text(x, y + 8, title, 17, bold=True)
        lines = [textwrap.wrap(note, 60, subsequent_indent="  ") for note in notes]
        shown = [line for wrapped in lines for line in wrapped]
        if len(shown) > _MAX_LINES:
            shown = [*shown[: _MAX_LINES - 1], "… the rest stands in the report"]
        canvas.text(x, y + 34, "\n".join(shown), _TEXT, colour)


# --- One suspected level -----------------------------------------------------------------------------------------


def _draw_level(case: _Case, canvas: Canvas, *, name: str) -> None:
    """Its key slices, the best one large; the same place from the side and the front; attention over the slices."""
    level = case.analysis.findings.levels[name]
    assert level.centroid_lps_mm is not None
    assert level.probability is not None
    canvas.fill((_MARGIN, 60, 10, 32), level_colour(name))
    heading = f"{name}: fracture suspected, {_percent(level.probability)}"
    canvas.text(_MARGIN + 22, 60, heading, 26, _WARNING, bold=True)

    planes = key_planes(level, case.volume.slices)
    places = [(_MARGIN, 128, (572, 600), 0.16), (632, 128, (272, 376), 0.2), (632, 428, (272, 376), 0.2)]
    for rank, (plane, (x, y, shape, pixel_mm)) in enumerate(zip(planes, places, strict=False), start=1):
        view = slice_view(
            case.volume, case.analysis, plane, centre_lps_mm=level.centroid_lps_mm, shape=shape, pixel_mm=pixel_mm
        )
        _caption(canvas, x, y, shape[1], f"Key slice {rank}", case.slice_name(plane))
        draw_view(canvas, x, y, view, pixel_mm=pixel_mm, names="right", focus=name)
    for x, y, shape, _ in places[len(planes) :]:
        canvas.frame((x, y, shape[1], shape[0]), RULE)
        canvas.text(x + shape[1] / 2, y + shape[0] / 2, "no further key slice", _TEXT, FAINT, ha="center", va="center")

    centre = _region_centre(case, name) or case.bodies.beside(level.centroid_lps_mm)
    through = case.spine.moved_to(centre)
    _caption(canvas, _MARGIN, 728, 296, "From the left", "sagittal")
    view = sagittal_sheet(case.volume, case.analysis, through, centre_lps_mm=centre, shape=(250, 296), pixel_mm=0.22)
    draw_view(canvas, _MARGIN, 728, view, pixel_mm=0.22, names="left", focus=name)
    _caption(canvas, 320, 728, 296, "From the front", "coronal")
    view = coronal_sheet(case.volume, case.analysis, through, centre_lps_mm=centre, shape=(250, 296), pixel_mm=0.22)
    draw_view(canvas, 320, 728, view, pixel_mm=0.22, names="right", focus=name)
    _draw_attention(case, canvas, level, planes)
    canvas.text(_MARGIN, 982, f"Slices as stored, {WINDOW}.", _TEXT, FAINT)


def _draw_attention(case: _Case, canvas: Canvas, level: LevelFinding, planes: list[int]) -> None:
    """A bar for each slice: its share of the model's attention; the key slices' bars carry their rank."""
    x, y, width, height = 632.0, 778.0, 376.0, 164.0
    canvas.text(x, 708, "Attention over slices", 17, bold=True)
    shares = attention_by_plane(level, case.volume.slices)
    for z in planes:
        shares.setdefault(z, 0.0)
    low, high, most = min(shares), max(shares), max(shares.values())
    step = width / (high - low + 1)
    canvas.fill((x, y + height, width, 1), FAINT)
    for z, share in shares.items():
        bar = height * share / most if most else 0.0
        left = x + (z - low) * step
        canvas.fill((left + 0.1 * step, y + height - bar, max(0.8 * step, 1.5), bar), _AMBER if z in planes else FAINT)
        if z in planes:
            rank = str(planes.index(z) + 1)
            canvas.text(left + step / 2, y + height - bar - 4, rank, _TEXT, _AMBER, bold=True, ha="center", va="bottom")
    canvas.text(x, 732, f"the largest share is {_percent(most)}; numbers: key slices", _TEXT, FAINT)
    foot, head = (f"{_position_mm(case.volume, z):+.1f} mm" for z in (low, high))
    canvas.text(x, y + height + 8, foot, _TEXT, FAINT)
    canvas.text(x + width, y + height + 8, head, _TEXT, FAINT, ha="right")
    canvas.text(x + width / 2, y + height + 8, "foot  to  head", _TEXT, FAINT, ha="center")


def _region_centre(case: _Case, name: str) -> tuple[float, float, float] | None:
    """The middle of a level's largest suspicious slice region, LPS mm."""
    level = case.analysis.findings.levels[name]
    planes = key_planes(level, case.volume.slices)
    mask = case.analysis.fractures[planes[0]] == LEVELS.index(name) + 1
    if not mask.any():
        return None
    y, x = np.argwhere(mask).mean(axis=0)
    point = case.volume.grid.to_lps_mm(np.array([planes[0], y, x]))
    return float(point[0]), float(point[1]), float(point[2])


# --- Every level -------------------------------------------------------------------------------------------------


def _draw_all_levels(case: _Case, canvas: Canvas) -> None:
    """Each level in its key slice: is every vertebra outlined, and called by its right name?"""
    canvas.text(_MARGIN, 60, "Every level in its key slice", 26, bold=True)
    height, width, pixel_mm = 266, 325, 0.26
    for number, (name, level) in enumerate(case.analysis.findings.levels.items()):
        x, y = _MARGIN + number % 3 * (width + 8), 130 + number // 3 * (height + 26)
        probability = "" if level.probability is None else f" {_percent(level.probability)}"
        planes = key_planes(level, case.volume.slices) or _middle_plane(case, level)
        if not planes or level.centroid_lps_mm is None:
            canvas.frame((x, y, width, height), RULE)
            canvas.text(x + width / 2, y + height / 2, f"{name}: {_answer(level)}", 17, FAINT, ha="center", va="center")
            continue
        view = slice_view(
            case.volume,
            case.analysis,
            planes[0],
            centre_lps_mm=level.centroid_lps_mm,
            shape=(height, width),
            pixel_mm=pixel_mm,
        )
        _caption(canvas, x, y, width, f"{name}{probability}", case.slice_name(planes[0]))
        draw_view(canvas, x, y, view, pixel_mm=pixel_mm, names="right", focus=name)
    said = (
        f"Slices as stored, {WINDOW}.\n\n"
        "A level's key slice has the largest suspicious region, or else the most of the model's attention."
    )
    canvas.text(_MARGIN + width + 8, 130 + 2 * (height + 26), _wrapped(said, 72), _TEXT, FAINT)


def _middle_plane(case: _Case, level: LevelFinding) -> list[int]:
    """The plane through the middle of a level that was found but not judged."""
    if level.centroid_lps_mm is None:
        return []
    z = round(float(case.volume.grid.to_index(np.array(level.centroid_lps_mm))[0]))
    return [min(max(z, 0), case.volume.grid.shape[0] - 1)]


def _caption(canvas: Canvas, x: float, y: float, width: float, title: str, place: str) -> None:
    """What a picture shows, in a line above it."""
    canvas.text(x, y - 6, title, 16, bold=True, va="baseline")
    canvas.text(x + width, y - 6, place, _TEXT, FAINT, ha="right", va="baseline")


# --- Words -------------------------------------------------------------------------------------------------------


def _answer(level: LevelFinding) -> str:
    if level.finding is not Finding.UNDETERMINED:
        return _ANSWERS[level.finding]
    return "not judged" if level.in_field_of_view else "not judged: not in view"


def _model(case: _Case) -> str:
    model = case.analysis.findings.model
    return f"Model {model.name} {model.version}: {model.trained_on}"


def _operating_points(model: ModelInfo) -> str:
    others = ", ".join(f"{name}: {100 * at:g} %" for name, at in model.own_operating_points.items())
    return f"{100 * model.operating_point:g} %{f' ({others})' if others else ''}"


def _percent(probability: float) -> str:
    return f"{round(100 * probability, 1):g} %"  # as in the sentence at the top


def _position_mm(volume: Volume, plane: int) -> float:
    """Where a slice lies along the slices' normal, the head's end counting up; z for axial slices."""
    normal = np.cross(volume.grid.affine[:3, 2], volume.grid.affine[:3, 1])
    normal *= np.sign(normal @ volume.grid.affine[:3, 0]) / np.linalg.norm(normal)
    return float(normal @ volume.grid.to_lps_mm(np.array([plane, 0.0, 0.0])))


def _wrapped(said: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in said.split("\n"))
