"""Which slices of a CT Series make a stack, in which order, and where they lie in the patient: the rules, pure.

Reads no files and needs no DICOM library: `model.series` makes the headers, and reads the voxels as decided here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model.geometry import FloatArray, Grid

CT_SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}

# Words in ImageType that mark what is not a slice: scouts, dose reports, screen saves.
_NOT_A_SLICE = ("LOCALIZER", "SCOUT", "TOPOGRAM", "DOSE_INFO", "DOSE INFO", "SCREEN SAVE", "SCREEN_SAVE", "SCREENSAVE")
# Positions are often written with one decimal: a slice can be 0.05 mm off its place, a step 0.1 mm.
_ROUNDING_MM = 0.11
_SAME_POSITION_MM = 0.05
_MAX_FIELD_MM = 1200.0  # of scanners 500, extended 800; of 1,533 one took 2.6 GB, and minutes
_MAX_VOXELS = 2**31  # 4 GiB in memory: 2,000 slices of 1024 x 1024; a damaged header can claim 100 times that


class SeriesError(Exception):
    """This Series cannot be analysed; the message is a sentence for the operator."""


class IncompleteSeries(SeriesError):  # noqa: N818 - a state of the Series first, an error second
    """As it is, this Series cannot be analysed, but more Instances could mend it."""


@dataclass(frozen=True, kw_only=True)
class SliceHeader:
    """What the rules need to know of one CT slice: one single-frame Instance, or one frame of an Enhanced CT.

    frame_number: 1-based. modality, UIDs and rescale_type are "" when missing; None means missing or unusable.
    pixel_spacing_mm: `(between rows, between columns)`. position_lps_mm: centre of the first pixel.
    has_detector_spacing: PixelSpacing is missing and ImagerPixelSpacing stands in for it.
    orientation: direction cosines, LPS, of a row (towards higher columns), then of a column (towards higher rows).
    stack: in words, of which stack or time an Enhanced CT says the frame is, "" when it does not.
    rescale_fault: what is wrong with a RescaleSlope or RescaleIntercept that is there, in words: "RescaleSlope is 0".
    concatenation: ConcatenationUID, number of this part and how many there are (0 unknown), of a split Enhanced CT.
    """

    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    sop_class_uid: str
    frame_number: int = 1
    frame_of_reference_uid: str = ""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    samples_per_pixel: int = 1
    rows: int = 0
    columns: int = 0
    pixel_spacing_mm: tuple[float, ...] | None = None
    has_detector_spacing: bool = False
    position_lps_mm: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    instance_number: int | None = None
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    rescale_type: str = ""
    rescale_fault: str = ""
    stack: str = ""
    concatenation: tuple[str, int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SliceHeader":
        """The header of a dict made by `to_dict`, also after a trip through JSON."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    @property
    def z_mm(self) -> float:
        """Height of the first pixel in the patient, LPS mm; nan without a position."""
        return self.position_lps_mm[2] if self.position_lps_mm else float("nan")


@dataclass(frozen=True, kw_only=True)
class SeriesRules:
    """What a Series must be to be analysed.

    min_slices: fewer are a scout, a bolus-tracking series or a part.
    min_extent_mm: shorter holds less than three vertebrae, too few to number them by.
    max_spacing_mm: above, a cervical vertebra (15 mm high) has less than three slices and fractures fall between them.
    max_oblique_deg: angle between slice normal and body axis, and of the shear; tilted gantries reach 30.
    max_bridged_gaps: single missing slices, apart from each other, that may be interpolated once nothing more will
        come: archives do lose slices, and a neck should not go unread for one. Longer gaps are never bridged.
    max_odd_slices: slices of another size or pixel spacing than most, which may be left out. 0 for a Series to be
        reported on: what is in them would not be seen.
    assume_ct: an Instance that names neither SOP Class nor Modality is taken for CT, as data sets that were stripped
        for publication may need.
    """

    min_slices: int = 30
    min_extent_mm: float = 50.0
    max_spacing_mm: float = 5.0
    max_oblique_deg: float = 45.0
    max_bridged_gaps: int = 2
    max_odd_slices: int = 0
    assume_ct: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """The slices of a Series that make a volume.

    order: indices into the headers, foot to head; what was dropped is absent.
    z_indices: Z index in `grid` of each entry of `order`; 0, 1, 2, … but for bridged gaps.
    duplicates: `(kept, left out)` header indices at one position; reading compares their pixels.
    grid: shape counts bridged slices too. warnings: sentences for the operator.
    """

    order: tuple[int, ...]
    z_indices: tuple[int, ...]
    duplicates: tuple[tuple[int, int], ...]
    grid: Grid
    warnings: tuple[str, ...] = ()


def check_series(headers: Sequence[SliceHeader], rules: SeriesRules | None = None, *, final: bool = False) -> Stack:
    """The stack these headers of one Series make: which slices, in which order, on which grid. Pure.

    final: nothing more is expected, so `rules.max_bridged_gaps` applies; without it any gap is an `IncompleteSeries`.
    Slices at one position count once here; whether their pixels agree is seen on reading.

    Raises:
        IncompleteSeries: gaps, too few slices; more Instances could mend it.
        SeriesError: not a CT that can be analysed, whatever else comes.
    """
    rules = rules or SeriesRules()
    series = _series_name(headers)
    kept, warnings = _slices_only(headers, rules, series)
    kept = _without_odd_slices(headers, kept, rules, warnings)
    _check_attributes([headers[i] for i in kept], series)
    _check_concatenations([headers[i] for i in kept], series)
    first = headers[kept[0]]
    if first.has_detector_spacing:
        warnings.append("PixelSpacing is missing; ImagerPixelSpacing was taken for it: sizes may be wrong.")
    row, column = np.reshape(first.orientation or (), (2, 3))
    row_spacing_mm, column_spacing_mm = first.pixel_spacing_mm or ()
    normal = _upward_normal(row, column, rules, series)

    kept, duplicates, heights_mm = _sort_slices(headers, kept, normal)
    for pair in duplicates:
        _check_one_stack([headers[i] for i in pair], series, "at the same place")
    if duplicates:
        warnings.append(f"Left out {len(duplicates)} x copy of a slice at the same position.")
    if len(kept) < rules.min_slices:
        raise IncompleteSeries(
            f"{series} has {len(kept)} slices; at least {rules.min_slices} are needed. Check for missing Instances."
        )
    try:
        z_indices, missing = _place_slices(headers, kept, heights_mm, rules if final else None, series)
    except IncompleteSeries:
        _check_one_stack([headers[i] for i in kept], series, "of different spacing or with a gap between them")
        raise
    warnings += missing

    positions = np.array([headers[i].position_lps_mm for i in kept])
    step = (positions[-1] - positions[0]) / z_indices[-1]
    _check_stack(positions, z_indices, step, normal, rules, series)
    num_voxels = (z_indices[-1] + 1) * first.rows * first.columns
    if num_voxels > _MAX_VOXELS:
        raise SeriesError(
            f"{series} has {z_indices[-1] + 1} slices of {first.rows} x {first.columns}: {num_voxels} voxels; up to "
            f"{_MAX_VOXELS} can be analysed."
        )
    field_mm = max(first.rows * row_spacing_mm, first.columns * column_spacing_mm)
    if field_mm > _MAX_FIELD_MM:
        raise SeriesError(
            f"{series} has slices of {field_mm:.0f} mm ({first.rows} x {first.columns} pixels, PixelSpacing "
            f"{row_spacing_mm:g}, {column_spacing_mm:g}); up to {_MAX_FIELD_MM:.0f} mm are possible. "
            "Correct PixelSpacing, or send the original CT."
        )
    affine = np.eye(4)
    affine[:3] = np.stack([step, column * row_spacing_mm, row * column_spacing_mm, positions[0]], axis=1)
    return Stack(
        order=tuple(kept),
        z_indices=tuple(z_indices),
        duplicates=tuple(duplicates),
        grid=Grid(shape=(z_indices[-1] + 1, first.rows, first.columns), affine=affine),
        warnings=tuple(warnings),
    )


def _series_name(headers: Sequence[SliceHeader]) -> str:
    """ "Series <UID>" for messages; refuses headers of none or of several Series, or of one in several Studies."""
    uids = sorted({header.series_instance_uid for header in headers})
    if not uids:
        raise IncompleteSeries("There are no DICOM Instances here; a CT Series is needed.")
    if len(uids) > 1:
        raise SeriesError(
            f"These Instances belong to {len(uids)} Series: {', '.join(uids)}. Give the Instances of one Series only."
        )
    studies = sorted({header.study_instance_uid for header in headers})
    if len(studies) > 1:
        raise SeriesError(
            f"Series {uids[0]} comes in {len(studies)} Studies: {', '.join(studies)}. A Series is of one Study: two "
            "patients may be mixed here. Send the Series again, with a SeriesInstanceUID of its own in each Study."
        )
    return f"Series {uids[0]}"


def _slices_only(headers: Sequence[SliceHeader], rules: SeriesRules, series: str) -> tuple[list[int], list[str]]:
    """Indices of the headers that are CT slices, and a warning for each kind of what else is there."""
    modalities = {header.modality for header in headers} - {"", "CT"}
    if modalities:
        raise SeriesError(f"{series} has Modality {', '.join(sorted(modalities))}; only CT can be analysed.")
    others = [_why_no_slice(header, rules.assume_ct) for header in headers]
    counts = Counter(reason for reason in others if reason)
    if len(headers) == sum(counts.values()):
        raise SeriesError(f"{series} holds no CT slices, only {_listed(counts)}; send the axial CT Series.")
    warnings = [f"Left out {_listed({reason: count})}, found among the slices." for reason, count in counts.items()]
    return [i for i, reason in enumerate(others) if not reason], warnings


def _without_odd_slices(
    headers: Sequence[SliceHeader], kept: list[int], rules: SeriesRules, warnings: list[str]
) -> list[int]:
    """`kept` without the few slices that the rules let go for their size or pixel spacing, and a warning of them."""
    sizes = {
        i: (headers[i].rows, headers[i].columns, *(round(step, 2) for step in headers[i].pixel_spacing_mm or ()))
        for i in kept
    }
    ((usual, _),) = Counter(sizes.values()).most_common(1)
    odd = [i for i in kept if sizes[i] != usual]
    if not 0 < len(odd) <= rules.max_odd_slices:
        return kept
    warnings.append(f"Left out {len(odd)} x slice of another size or pixel spacing than most.")
    return [i for i in kept if sizes[i] == usual]


def _why_no_slice(header: SliceHeader, assume_ct: bool) -> str:
    """What this header is if it is not a CT slice, "" if it is one."""
    image_type = "\\".join(header.image_type).upper()
    marked = next((word for word in _NOT_A_SLICE if word in image_type), None)
    if marked:
        return f"ImageType {marked}"
    # Datasets may lack SOPClassUID, or Modality, or both (RSNA 2022), but a slice says at least one of them somewhere.
    is_ct = header.modality == "CT" or (assume_ct and not header.modality)
    if header.sop_class_uid not in CT_SOP_CLASSES and (header.sop_class_uid or not is_ct):
        return f"SOP Class {header.sop_class_uid or '(missing)'}"
    if header.samples_per_pixel != 1:
        return "colour image"
    if "SECONDARY" in image_type and header.position_lps_mm is None:
        return "secondary image without position"
    return ""


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


def _check_attributes(slices: Sequence[SliceHeader], series: str) -> None:
    """Refuses slices that lack what a stack needs, or that do not agree on it."""
    for attribute, keyword in (
        ("position_lps_mm", "ImagePositionPatient"),
        ("orientation", "ImageOrientationPatient"),
        ("pixel_spacing_mm", "PixelSpacing"),
        ("rows", "Rows"),
        ("columns", "Columns"),
    ):
        lacking = [header.sop_instance_uid for header in slices if not getattr(header, attribute)]
        if lacking:
            raise SeriesError(
                f"{series} has {len(lacking)} of {len(slices)} slices without a usable {keyword}, the first is "
                f"Instance {lacking[0]}; without it their place in the patient is unknown."
            )
    units = {header.rescale_type for header in slices} - {"", "HU", "US", "HU_MOD"}
    if units:
        raise SeriesError(f"{series} holds values in {', '.join(sorted(units))} (RescaleType), not Hounsfield units.")
    _check_rescale(slices, series)
    for attribute, keyword, tolerance in (
        ("rows", "Rows", 0.0),
        ("columns", "Columns", 0.0),
        ("pixel_spacing_mm", "PixelSpacing", 1e-3),
        ("orientation", "ImageOrientationPatient", 1e-3),  # 0.25 mm at the corner of a 500 mm field of view
    ):
        values = Counter(getattr(header, attribute) for header in slices)
        usual = np.array(values.most_common(1)[0][0])
        if any(np.abs(np.array(value) - usual).max() > tolerance for value in values):
            raise SeriesError(f"{series} mixes slices of different {keyword}: {_most_common(values)}.")
    frames_of_reference = Counter(header.frame_of_reference_uid for header in slices)
    if len(frames_of_reference) > 1:
        raise SeriesError(f"{series} mixes frames of reference: {_most_common(frames_of_reference)}.")


def _check_rescale(slices: Sequence[SliceHeader], series: str) -> None:
    """Refuses slices whose values nobody can turn into Hounsfield units.

    Slope and intercept are required of CT (PS3.3 C.8.2.1). Both are missing from what converters made, whose values are
    often Hounsfield units, as reading checks; one without the other, or one that is no scale, means that a value was
    lost, and to take it for 1 or 0 would be a guess.
    """
    unknown = "what their values mean is unknown. Send the original CT."
    faults = [(header.rescale_fault, header.sop_instance_uid) for header in slices if header.rescale_fault]
    if faults:
        (fault, uid), *_ = faults
        raise SeriesError(
            f"{series} has {len(faults)} of {len(slices)} slices whose {fault}, the first is Instance {uid}; {unknown}"
        )
    without = {
        keyword: [header.sop_instance_uid for header in slices if getattr(header, attribute) is None]
        for attribute, keyword in (("rescale_slope", "RescaleSlope"), ("rescale_intercept", "RescaleIntercept"))
    }
    if all(len(uids) == len(slices) for uids in without.values()):
        return
    for keyword, uids in without.items():
        if uids:
            raise SeriesError(
                f"{series} has {len(uids)} of {len(slices)} slices without {keyword}, the first is Instance {uids[0]}; "
                f"{unknown}"
            )


def _check_concatenations(slices: Sequence[SliceHeader], series: str) -> None:
    """Refuses an Enhanced CT that was split into several Instances (PS3.3 C.7.6.16.2.2.4) and lacks one of them."""
    parts: dict[tuple[str, int], set[int]] = {}
    for header in slices:
        if header.concatenation:
            uid, number, total = header.concatenation
            parts.setdefault((uid, total), set()).add(number)
    for (uid, total), here in parts.items():
        expected = max(total, *here)  # the total may be left out
        if len(here) < expected:
            raise IncompleteSeries(
                f"{series} has {len(here)} of {expected} parts of concatenation {uid}. Check for missing Instances."
            )


def _check_one_stack(slices: Sequence[SliceHeader], series: str, how: str) -> None:
    """Refuses frames of several stacks or times that cannot be one volume; how: why they cannot."""
    stacks = Counter(header.stack for header in slices)
    if len(stacks) > 1:
        raise SeriesError(
            f"{series} holds {len(stacks)} stacks of frames {how}: {_most_common(stacks)}. Send them as Series of "
            "their own."
        )


def _most_common(values: Counter[Any]) -> str:
    """ "512 (80 slices), 768 (3 slices)", the three most common values."""
    return ", ".join(f"{value or '(missing)'} ({count} slices)" for value, count in values.most_common(3))


def _upward_normal(row: FloatArray, column: FloatArray, rules: SeriesRules, series: str) -> FloatArray:
    """Unit normal of the slices that points towards the head; refuses slices that are not roughly axial."""
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if np.abs(np.subtract(lengths, 1)).max() > 0.01 or abs(row @ column) > 0.01:
        values = [float(value) for value in (*row, *column)]
        raise SeriesError(f"{series} has ImageOrientationPatient {values}, not two perpendicular unit vectors.")
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    oblique_deg = float(np.degrees(np.arccos(min(abs(normal[2]), 1.0))))
    if oblique_deg > rules.max_oblique_deg:
        plane = ("sagittal", "coronal", "oblique")[int(np.abs(normal).argmax())]
        raise SeriesError(
            f"{series} is {plane}, {oblique_deg:.0f} degrees from axial; up to {rules.max_oblique_deg:.0f} degrees can "
            "be analysed. Send the axial Series."
        )
    return np.asarray(normal * np.sign(normal[2]))


def _sort_slices(
    headers: Sequence[SliceHeader], kept: Iterable[int], normal: FloatArray
) -> tuple[list[int], list[tuple[int, int]], FloatArray]:
    """Indices foot to head with one for each position, `(kept, left out)` pairs, and heights along the normal, mm."""
    height_mm = {i: float(np.dot(normal, headers[i].position_lps_mm or ())) for i in kept}
    order: list[int] = []
    duplicates: list[tuple[int, int]] = []
    # The UID decides between slices at one position, so that the choice does not hang on the order of arrival.
    for i in sorted(height_mm, key=lambda i: (round(height_mm[i], 2), headers[i].sop_instance_uid)):
        if order and height_mm[i] - height_mm[order[-1]] < _SAME_POSITION_MM:
            duplicates.append((order[-1], i))
        else:
            order.append(i)
    return order, duplicates, np.array([height_mm[i] for i in order])


def _place_slices(
    headers: Sequence[SliceHeader],
    kept: Sequence[int],
    heights_mm: FloatArray,
    bridging: SeriesRules | None,
    series: str,
) -> tuple[list[int], list[str]]:
    """Z index of each slice, and a warning for each bridged gap; any other unevenness is refused.

    bridging: the rules, if gaps may be bridged.
    """
    steps_mm = np.diff(heights_mm)
    if not steps_mm.size:
        raise IncompleteSeries(f"{series} has a single slice; a stack of slices is needed.")
    expected_mm = _expected_step_mm(steps_mm)
    multiples = np.maximum(np.rint(steps_mm / expected_mm), 1)
    uneven = np.abs(steps_mm - multiples * expected_mm) > _tolerance_mm(expected_mm)
    num_missing = int((multiples - 1).sum())
    single = bool((multiples <= 2).all() and not ((multiples[1:] > 1) & (multiples[:-1] > 1)).any())
    wrong = np.flatnonzero(uneven | (multiples > 1))
    if bridging and single and not uneven.any() and num_missing <= bridging.max_bridged_gaps:
        warnings = [
            f"The slice between z = {_z(headers, kept, i)} and {_z(headers, kept, i + 1)} mm is missing and was "
            "interpolated; a fracture there would not be seen."
            for i in wrong.tolist()
        ]
    elif wrong.size:
        places = ", ".join(f"{steps_mm[i]:.2f} mm at z = {_z(headers, kept, i)}" for i in wrong[:3].tolist())
        more = f" and at {wrong.size - 3} more places" if wrong.size > 3 else ""
        missing = f" ({num_missing} Instances missing)" if not uneven.any() else ""
        raise IncompleteSeries(
            f"{series} has slice gaps: {places}{more}, expected {expected_mm:.2f} mm{missing}. "
            "Uniform spacing is needed; check for missing Instances."
        )
    else:
        warnings = []
    return [0, *np.cumsum(multiples).astype(int).tolist()], warnings


def _expected_step_mm(steps_mm: FloatArray) -> float:
    """The spacing the Series means to have: the usual one, or the smallest if all others are multiples of it.

    The latter is what a Series looks like while most of its slices are still under way.
    """
    smallest_mm = float(np.median(steps_mm[steps_mm <= steps_mm.min() + _tolerance_mm(steps_mm.min())]))
    multiples = np.rint(steps_mm / smallest_mm)
    if np.abs(steps_mm - multiples * smallest_mm).max() <= _tolerance_mm(smallest_mm):
        return smallest_mm
    return float(np.median(steps_mm))


def _tolerance_mm(step_mm: float) -> float:
    """By how much a step may differ from the others: rounding, or 5 % of thick slices."""
    return max(_ROUNDING_MM, 0.05 * float(step_mm))


def _z(headers: Sequence[SliceHeader], kept: Sequence[int], i: int) -> str:
    return f"{headers[kept[i]].z_mm:.1f}"


def _check_stack(
    positions: FloatArray,
    z_indices: Sequence[int],
    step: FloatArray,
    normal: FloatArray,
    rules: SeriesRules,
    series: str,
) -> None:
    """Refuses stacks that are too coarse, too short, or whose slices do not lie on one line."""
    spacing_mm = float(step @ normal)
    if spacing_mm > rules.max_spacing_mm + _tolerance_mm(spacing_mm):
        raise IncompleteSeries(
            f"{series} has slices {spacing_mm:.2f} mm apart; up to {rules.max_spacing_mm:.2f} mm can be analysed. "
            "Send a thinner reconstruction."
        )
    extent_mm = spacing_mm * z_indices[-1]
    if extent_mm < rules.min_extent_mm:
        raise IncompleteSeries(
            f"{series} covers {extent_mm:.0f} mm along the body; at least {rules.min_extent_mm:.0f} mm are needed."
        )
    shear_deg = float(np.degrees(np.arccos(min(spacing_mm / float(np.linalg.norm(step)), 1.0))))
    if shear_deg > rules.max_oblique_deg:
        raise SeriesError(
            f"{series} has slices that shift sideways by {shear_deg:.0f} degrees; "
            f"gantry tilts up to {rules.max_oblique_deg:.0f} degrees can be analysed."
        )
    off_mm = np.linalg.norm(positions - positions[0] - np.outer(z_indices, step), axis=1)
    # A quarter of a slice: closer than anyone can place a vertebra, wider than rounding (0.09 mm in three axes).
    if off_mm.max() > max(0.2, 0.25 * spacing_mm):
        worst = int(off_mm.argmax())
        raise SeriesError(
            f"{series} has slices that do not lie on one line: the one at z = {positions[worst, 2]:.1f} mm is "
            f"{off_mm[worst]:.1f} mm off. Table movement or mixed reconstructions; send one reconstruction."
        )
