"""What cannot be judged, and why: "undetermined" with its reason, where an answer would be an invention.

Is this a neck, seen finely enough, and which vertebrae are seen whole and undisturbed? No network is asked. A rule is
one short function with the measurement it rests on. Called by `model/pipeline.py` once the vertebrae are found.

"Measured" means: on OpenKBP necks (4 mm pixels), two public neck CTs (3 mm slices) and phantoms, 2026-11-25. What
these rules do not see: motion that blurs without a step, streaks, tumour, a whole chain that is off by one.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import Grid
from model.hounsfield import sampled, sampling_steps
from model.levels import LEVELS
from model.resample import AIR_HU, BODY_HU, crop_to_box, index_range
from model.segment import CUT_AREA_MM2, MIN_VERTEBRAE, Vertebra
from model.volume import Volume

MAX_SLICE_MM, TOLERANCE_MM = 4.0, 0.05
"""Slices further apart, at right angles to them, are outlined but not judged: a body of 12 to 15 mm then has three of
them at most."""

MAX_PIXEL_MM = 2.0
"""Pixels larger than this are outlined but not judged: the gap of a fracture is 0.5 to 3 mm wide."""

MIN_SOFT_SHARE = 0.5
"""Share of the body (what is above BODY_HU) with the values of soft tissue. Measured: 0.78 to 0.90."""

MIN_CORRELATION = 0.5
"""Of neighbouring voxels. Measured: above 0.93, at 4 mm pixels too; noise alone has 0."""

MAX_NOISE_HU, NOISE_MM, NOISE_PLANES = 100.0, 1.0, 30
"""Noise of soft tissue, as it were in pixels of 1 mm, of some slices, and of a vertebra's own. Measured: 7, 25 in the
two CTs, 8 to 10 and 16 to 30 at their vertebrae. Of 28 inserted fractures 0.82 were found; with noise of 40, 80, 120,
160, 200 HU added 0.75, 0.68, 0.57, 0.50, 0.43."""

AIR_HU_SEEN, AIR_SHARE = (-850, -450), 0.001
"""The darkest AIR_SHARE of the voxels must not lie between these: air, of the airway too, is near -1000 HU, and without
any the darkest is fat. Measured: -1024 to -1016; times 0.5 and 0.75: -512 and -768."""

DENSE_HU, MAX_DENSE_SHARE = 2000, 0.01
"""Share of the body that may be so dense. Measured, dental metal among it: below 0.0034; times 2: 0.004 to 0.059, and
0.029 of the two CTs."""

CLIPPED_HU, MAX_CLIPPED_SHARE = 1200, 0.005
"""Where nothing is above CLIPPED_HU, the share of the body that may have the greatest value. Measured: the greatest is
above 1600 in 90 necks; cut at 240 HU, as by a window for soft tissue, 0.011 and 0.020 of the body have it."""

IMAGED_CM2, IMAGED_SHARE = 15.0, 0.15
"""Slices with less body than this, and than this share of the median slice's, show nothing. Measured: 35 cm2 at the
end of an intact head; 3 to 5 in remnants outside a treated region. A neck has 100, a ninth of some chests."""

GAP_MM = 30.0
"""Empty slices further from what was found take nothing from it: the next vertebra lies between."""

SKULL_SHARE = 0.09
"""Share of bone in the body from which a third of the volume is taken for the head, if the other third has less than
half of that. Measured: head 0.11 to 0.24, shoulders 0.03 to 0.09."""

NECK_STEP_MM = (11.0, 24.0)
"""Median distance between the centroids of neighbours from C2 down. Measured: 14 to 21. Below 11 lies a child of less
than about seven years, above 24 the lower thoracic (25) and lumbar (35) spine; weights that skipped levels gave 30."""

C2_STEP = 1.25
"""The dens lifts the centroid of C2: the step from C2 to C3 is so much longer than the others."""

STEP_RATIO = (0.6, 1.55)
"""Step between two neighbours over the median of the others. Measured where the numbers are right: 0.7 to 1.4, and
where unfinished weights had skipped or merged levels: 1.6 to 2.6."""

MIN_VOLUME_MM3 = 2_000.0
RELATIVE_VOLUME = {3: 1.0, 4: 0.95, 5: 1.0, 6: 1.1, 7: 1.4}
VOLUME_RATIO = (0.5, 1.7)
"""Volume of one of C3..C7 over its RELATIVE_VOLUME, over the median of these. Measured where the numbers are right: 0.7
to 1.3; where C7 had swallowed T1: 2 and more; two vertebrae fused into one: 1.9."""

SQUEEZED = 0.85
"""Step of neighbours over that of C2 and C3, where the lowest vertebra is cut: before the end of the slices the network
may see a level too many. Measured on 18 necks cut at 16 heights: less in 12 of 15 vertebrae that were judged under
another's number, and in 41 of 879 others."""

BONE_HU, MIN_BONE_SHARE = 150, 0.6
"""Share of a vertebra's outline above BONE_HU. Measured: 0.98 and more."""

METAL_HU, MAX_METAL_MM3, METAL_MARGIN_MM = 2500, 50.0, 4.0
"""Metal in the box around a vertebra. A pedicle screw has some 200 mm3; bone stays below 2000 HU. Measured: 0."""

LUNG_HU, MAX_LUNG_CM2 = (-900, -500), 10.0
"""Area of lung to the left, and to the right, of a vertebra's centroid. Measured at C1..C7: at most 5; beside thoracic
vertebrae that unfinished weights called C6 and C7: 14 to 38."""

JUMP_RATIO, JUMP_WINDOW, MIN_DIFFERENCE_HU = 1.75, 11, 4.0
"""Difference between the bodies in two neighbouring slices over the median of those around. Measured: at most 1.6; a
sudden shift by 5 mm: 1.8 to 2.5 at 3 mm slices, and more at thinner ones."""

ALTERNATE_RATIO, ALTERNATE_WINDOW = 0.9, 7
"""Difference from the slice after next over that from the next: where it is less, every other slice is of another
moment or kernel. Measured: at least 1.3, with noise of 100 HU 1.1; every other slice shifted by 3 mm: 0.4 to 0.65."""

IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]

CUT = "Cut by the field of view"

END_MM = 1.5
"""A vertebra that reaches so near to the first or last slice may go on beyond it."""


def reasons_not_to_judge(volume: Volume, labels: NDArray[np.uint8], vertebrae: Sequence[Vertebra]) -> dict[int, str]:
    """Why vertebrae that were found are left undetermined, by label; each goes on a sentence: "Cut by ...: C1, C7."."""
    if not vertebrae:
        return {}
    for_all = (
        _too_coarse(volume.grid)
        or _no_body(volume)
        or _noisy(volume, slice(None, None, max(1, volume.grid.shape[0] // NOISE_PLANES)))
        or _other_scale(volume)
        or _empty_slices(volume, vertebrae)
        or _upside_down(volume)
        or _no_neck(vertebrae)
    )
    if for_all:
        return {vertebra.label: for_all for vertebra in vertebrae}
    reasons: dict[int, str] = {}
    ends, jumps = _ends(_imaged(volume)), _jumps(volume)
    for vertebra in vertebrae:
        first, last = index_range(volume.grid, vertebra.lower_lps_mm, vertebra.upper_lps_mm, margin=1)
        box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
        mask, hu = labels[box] == vertebra.label, volume.voxels_hu[box]
        reason = (
            _metal(volume, vertebra)
            or _cut(vertebra, mask, hu, int(first[0]), ends, volume.grid)
            or _moved(jumps - first[0], mask)
            or _noisy(volume, slice(first[0], last[0]))
            or _not_bone(hu[mask])
            or _in_chest(volume, vertebra)
        )
        if reason:
            reasons[vertebra.label] = reason
    # A cause of its own says more than what it may have done to the outline, so it takes the place of an odd size.
    whole = [vertebra for vertebra in vertebrae if reasons.get(vertebra.label) != CUT]
    return _odd_volumes(whole) | _squeezed(vertebrae) | _odd_steps(whole, vertebrae) | reasons


# Of the volume


def _too_coarse(grid: Grid) -> str | None:
    _, row_mm, column_mm = grid.spacing_mm
    slice_mm, pixel_mm = grid.voxel_volume_mm3 / (row_mm * column_mm), max(row_mm, column_mm)
    if slice_mm > MAX_SLICE_MM + TOLERANCE_MM:
        return f"Slices {slice_mm:.1f} mm apart can hide a fracture (up to {MAX_SLICE_MM:.1f} mm are judged)"
    if pixel_mm > MAX_PIXEL_MM:
        return f"Pixels of {pixel_mm:.1f} mm can hide a fracture (up to {MAX_PIXEL_MM:.1f} mm are judged)"
    return None


def _no_body(volume: Volume) -> str | None:
    """Values that no body has, and noise."""
    sample = sampled(volume)
    body = sample[sample > BODY_HU]
    soft = float(((body > -200) & (body < 150)).mean()) if body.size else 0.0
    if soft < MIN_SOFT_SHARE:
        return f"Only {soft:.0%} of the body has the values of soft tissue (a neck has 75 % to 90 %)"
    z, y, _ = sampling_steps(volume.grid)
    rows = volume.voxels_hu[:: 4 * z, :: 2 * y].astype(np.float32)
    correlation = float(np.corrcoef(rows[..., :-1].ravel(), rows[..., 1:].ravel())[0, 1])
    if correlation < MIN_CORRELATION:
        return f"Noise hides the anatomy (neighbouring voxels have a correlation of {correlation:.2f})"
    return None


def _noisy(volume: Volume, planes: slice) -> str | None:
    """From neighbouring pixels of soft tissue in these slices: half differ by less than 0.95 times the noise."""
    y, x = (max(1, round(NOISE_MM / spacing_mm)) for spacing_mm in volume.grid.spacing_mm[1:])
    voxels_hu = volume.voxels_hu[planes]
    num_y, num_x = voxels_hu.shape[1] // y, voxels_hu.shape[2] // x
    blocks = voxels_hu[:, : num_y * y, : num_x * x].reshape(-1, num_y, y, num_x, x)
    hu = blocks.mean(axis=(2, 4), dtype=np.float32)
    left, right = hu[..., :-1], hu[..., 1:]
    soft = (left + right > -200) & (left + right < 300)
    block_mm = np.sqrt(y * volume.grid.spacing_mm[1] * x * volume.grid.spacing_mm[2])  # white noise falls with it
    noise_hu = float(np.median(np.abs(left - right)[soft])) / 0.954 * block_mm / NOISE_MM if soft.any() else 0.0
    if noise_hu > MAX_NOISE_HU:
        return f"Noise of {noise_hu:.0f} HU hides fractures (up to {MAX_NOISE_HU:.0f} HU are judged)"
    return None


def _other_scale(volume: Volume) -> str | None:
    """Whether values are pressed together or stretched about 0: soft tissue does not tell, air and dense bone do."""
    sample = sampled(volume)
    darkest = float(np.quantile(sample, AIR_SHARE))
    if AIR_HU_SEEN[0] < darkest < AIR_HU_SEEN[1]:
        return f"Air has {darkest:.0f} HU in place of about -1000 (check RescaleSlope and RescaleIntercept)"
    body = sample[sample > BODY_HU]
    dense = float((body > DENSE_HU).mean()) if body.size else 0.0
    if dense > MAX_DENSE_SHARE:
        return (
            f"{dense:.1%} of the body is above {DENSE_HU} HU (up to {MAX_DENSE_SHARE:.0%} is plausible; check "
            "RescaleSlope)"
        )
    highest = float(sample.max())
    if highest < CLIPPED_HU and body.size and (body == highest).mean() > MAX_CLIPPED_SHARE:
        return f"Values end at {highest:.0f} HU, which cuts bone off (send the CT as it was, without a window)"
    return None


def _empty_slices(volume: Volume, vertebrae: Sequence[Vertebra]) -> str | None:
    """Slices without a body among the vertebrae or near: what lies beyond them was not looked at, or numbered anew."""
    lower, upper = (
        np.array([getattr(vertebra, side) for vertebra in vertebrae]) for side in ("lower_lps_mm", "upper_lps_mm")
    )
    margin = round(GAP_MM / volume.grid.spacing_mm[0])
    first, last = (int(at[0]) for at in index_range(volume.grid, lower.min(axis=0), upper.max(axis=0), margin))
    imaged = _imaged(volume)
    ends = _ends(imaged)
    num_empty = int((~imaged[max(first, ends[0]) : min(last, ends[1])]).sum())
    return f"{num_empty} of the slices between others show nothing (they may be damaged)" if num_empty else None


def _upside_down(volume: Volume) -> str | None:
    """Whether the lower third has the bone of a head, and the upper that of shoulders: tags may have swapped them."""
    sample = sampled(volume)
    body = sample > BODY_HU
    areas = body.sum(axis=(1, 2))
    planes = np.flatnonzero(areas > 0.2 * areas.max())  # some slices show the table alone
    if len(planes) < 3:
        return None
    if volume.grid.affine[2, 0] < 0:
        planes = planes[::-1]
    third = len(planes) // 3
    bottom, top = (
        float((sample[part] > 300).sum() / body[part].sum()) for part in (planes[:third], planes[len(planes) - third :])
    )
    if bottom > max(SKULL_SHARE, 2 * top):
        return (
            f"Head and feet look swapped (the body is {bottom:.0%} bone at the lower end and {top:.0%} at the upper; "
            "check ImagePositionPatient and ImageOrientationPatient)"
        )
    return None


def _imaged(volume: Volume) -> NDArray[np.bool_]:
    """Which slices `(Z,)` show a body; some archives pad with empty ones, or with what is left of a cut-out."""
    _, y, x = sampling_steps(volume.grid)
    num_pixels = (volume.voxels_hu[:, ::y, ::x] > BODY_HU).sum(axis=(1, 2))
    areas_cm2 = num_pixels * (y * x * volume.grid.spacing_mm[1] * volume.grid.spacing_mm[2] / 100)
    if not areas_cm2.any():
        return np.ones(len(areas_cm2), bool)
    imaged: NDArray[np.bool_] = areas_cm2 > min(IMAGED_CM2, IMAGED_SHARE * np.median(areas_cm2[areas_cm2 > 0]))
    return imaged


def _ends(imaged: NDArray[np.bool_]) -> tuple[int, int]:
    """First and last Z index of the slices that show a body."""
    planes = np.flatnonzero(imaged)
    return int(planes[0]), int(planes[-1])


def _jumps(volume: Volume) -> NDArray[np.int64]:
    """Z indices of slices that differ from the next one by more than those around them do, or than the one after."""
    _, y, x = sampling_steps(volume.grid)
    num_columns = volume.grid.shape[2] // x * x
    rows = volume.voxels_hu[:, ::y, :num_columns]
    pooled_hu = np.stack([plane.reshape(len(plane), -1, x).mean(axis=2).astype(np.int16) for plane in rows])
    beside, enough = _differences(pooled_hu, 1)
    usual = np.maximum(ndimage.median_filter(beside, JUMP_WINDOW, mode="nearest"), MIN_DIFFERENCE_HU)
    is_jump = enough & (beside > JUMP_RATIO * usual)
    beyond, enough = _differences(pooled_hu, 2)
    least = np.minimum(beside[:-1], beside[1:])
    ratio = np.where(enough & (least > MIN_DIFFERENCE_HU), beyond / np.maximum(least, MIN_DIFFERENCE_HU), 1.0)
    is_jump[:-1] |= ndimage.median_filter(ratio, ALTERNATE_WINDOW, mode="nearest") < ALTERNATE_RATIO
    return np.flatnonzero(is_jump)


def _differences(hu: NDArray[np.int16], apart: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mean difference of the bodies in slices `apart` from each other, `(Z - apart,)`, and where there is enough of it.

    Only where both show a body, so that a field of view that ends or narrows makes no difference.
    """
    differences, shares = [], []
    for lower, upper in zip(hu, hu[apart:], strict=False):
        body = (lower > BODY_HU) & (upper > BODY_HU)
        step = np.abs(upper[body].clip(max=400) - lower[body].clip(max=400))
        differences.append(step.mean() if step.size else 0.0)
        shares.append(body.mean())
    return np.array(differences, np.float32), np.array(shares) > 0.2 * max(shares, default=0.0)


# Of the chain


def _no_neck(vertebrae: Sequence[Vertebra]) -> str | None:
    """Why this chain is none of a neck, or may have been given wrong numbers.

    Measured on 16 necks that begin within C3: 19 of 164 vertebrae were judged under another's number.
    """
    if len(vertebrae) < MIN_VERTEBRAE:
        return f"Only {len(vertebrae)} cervical vertebrae were found, too few to number (at least {MIN_VERTEBRAE})"
    top = min(vertebrae, key=lambda vertebra: vertebra.label)
    if top.label > 2:
        return f"{LEVELS[top.label - 1]} is the highest level found: without C1 and C2 the others cannot be counted"
    step_mm = float(np.median(list(_steps_mm(vertebrae).values())))
    smallest, largest = NECK_STEP_MM
    if step_mm < smallest:
        return f"Vertebrae {step_mm:.0f} mm apart are as small as a child's (from {smallest:.0f} mm on they are judged)"
    if step_mm > largest:
        return f"Vertebrae {step_mm:.0f} mm apart are not those of a neck (up to {largest:.0f} mm)"
    return None


def _steps_mm(vertebrae: Sequence[Vertebra]) -> dict[tuple[int, int], float]:
    """Distances of neighbours from C2 down, that of C2 and C3 made like the others."""
    steps = {
        (upper.label, lower.label): float(np.linalg.norm(upper.centroid_lps_mm - lower.centroid_lps_mm))
        / (C2_STEP if upper.label == 2 else 1.0)
        for upper, lower in pairwise(sorted(vertebrae, key=lambda vertebra: vertebra.label))
    }
    return {(upper, lower): step for (upper, lower), step in steps.items() if upper > 1 and lower == upper + 1}


def _odd_steps(whole: Sequence[Vertebra], vertebrae: Sequence[Vertebra]) -> dict[int, str]:
    """whole: those that are not cut: what is left of one has its centroid elsewhere."""
    steps = _steps_mm(whole)
    odd: set[int] = set()
    for pair, step in steps.items():
        others = [other for other_pair, other in steps.items() if other_pair != pair]
        if others and not STEP_RATIO[0] <= step / np.median(others) <= STEP_RATIO[1]:
            odd.update(pair)
    if odd:  # any number from there on may be another
        odd.update(vertebra.label for vertebra in vertebrae if vertebra.label > 2)
    return dict.fromkeys(odd, "Out of step with the other vertebrae (one may be fused, missed or counted twice)")


def _squeezed(vertebrae: Sequence[Vertebra]) -> dict[int, str]:
    """Where the lowest is cut: those of the last two above it that stand too close, and what follows."""
    lowest = max(vertebrae, key=lambda vertebra: vertebra.label)
    steps = _steps_mm(vertebrae)
    if not lowest.is_cut or (2, 3) not in steps:
        return {}
    close = [
        upper
        for (upper, lower), step in steps.items()
        if lowest.label - 2 <= lower < lowest.label and step < SQUEEZED * steps[2, 3]
    ]
    doubted = [vertebra.label for vertebra in vertebrae if close and vertebra.label >= min(close)]
    return dict.fromkeys(doubted, "Squeezed against the end of the slices (there may be one level less)")


def _odd_volumes(vertebrae: Sequence[Vertebra]) -> dict[int, str]:
    """C1 and C2 have sizes of their own: only the absolute limits hold for them."""
    alike = {found.label: found.volume_mm3 / RELATIVE_VOLUME[found.label] for found in vertebrae if found.label > 2}
    median = float(np.median(list(alike.values()))) if alike else 1.0
    reasons = {}
    for vertebra in vertebrae:
        ratio = alike.get(vertebra.label, median) / median
        if vertebra.volume_mm3 < MIN_VOLUME_MM3 or ratio < VOLUME_RATIO[0]:
            reasons[vertebra.label] = "Too small for a vertebra of this neck (only a part of one)"
        elif ratio > VOLUME_RATIO[1]:
            reasons[vertebra.label] = "Too large for a vertebra of this neck (fused, or more than one)"
    return reasons


# Of one vertebra


def _metal(volume: Volume, vertebra: Vertebra) -> str | None:
    lower, upper = vertebra.lower_lps_mm - METAL_MARGIN_MM, vertebra.upper_lps_mm + METAL_MARGIN_MM
    around, _ = crop_to_box(volume.voxels_hu, volume.grid, lower, upper, margin=0)
    metal_mm3 = int((around > METAL_HU).sum()) * volume.grid.voxel_volume_mm3
    return "Metal in or at the vertebra" if metal_mm3 > MAX_METAL_MM3 else None


def _cut(
    vertebra: Vertebra,
    mask: NDArray[np.bool_],
    hu: NDArray[np.int16],
    first_plane: int,
    ends: tuple[int, int],
    grid: Grid,
) -> str | None:
    """mask, hu: the vertebra in its box, which begins at `first_plane`. ends: first and last slice that show a body.

    Padding within the image, as around a circular field of view, is an end too: bone never lies against it.
    """
    near = int(END_MM / grid.spacing_mm[0])
    planes = first_plane + np.arange(mask.shape[0])
    at_end = (planes <= ends[0] + near) | (planes >= ends[1] - near)
    pixel_mm2 = grid.spacing_mm[1] * grid.spacing_mm[2]
    touches = mask[at_end].sum(axis=(1, 2), initial=0) * pixel_mm2 > CUT_AREA_MM2
    beside = ndimage.binary_dilation(mask, IN_PLANE) & (hu <= AIR_HU)
    padded_mm2 = int(beside.sum()) * grid.spacing_mm[0] * max(grid.spacing_mm[1:])
    is_cut = vertebra.is_cut or touches.any() or padded_mm2 > CUT_AREA_MM2
    return CUT if is_cut else None


def _moved(jumps: NDArray[np.int64], mask: NDArray[np.bool_]) -> str | None:
    """jumps: as `_jumps` has them, counted from the first slice of the mask."""
    planes = np.flatnonzero(mask.any(axis=(1, 2)))
    inside = planes.size > 0 and ((jumps >= planes[0]) & (jumps < planes[-1])).any()
    return "Motion: neighbouring slices do not fit together" if inside else None


def _not_bone(hu: NDArray[np.int16]) -> str | None:
    share = float((hu > BONE_HU).mean())
    return (
        f"Not as dense as bone (less than {MIN_BONE_SHARE:.0%} above {BONE_HU} HU)" if share < MIN_BONE_SHARE else None
    )


def _in_chest(volume: Volume, vertebra: Vertebra) -> str | None:
    """Whether lung lies on both sides, 20 to 90 mm from the centroid, through all of its middle slices.

    All, since the upper side of a shoulder has the values of lung too, in one slice. Within the body: hair, foam and
    blankets have these values, too.
    """
    x, y, z = vertebra.centroid_lps_mm
    step = sampling_steps(volume.grid)[1:]
    lower, upper = np.array([x - 90, y - 90, z - 4]), np.array([x + 90, y + 50, z + 4])
    first, last = index_range(volume.grid, lower, upper, margin=0)
    planes = volume.voxels_hu[first[0] : last[0], :: step[0], :: step[1]]
    is_lung = (planes > LUNG_HU[0]) & (planes < LUNG_HU[1]) & np.array([_body(plane) for plane in planes])
    pixel_cm2 = volume.grid.spacing_mm[1] * volume.grid.spacing_mm[2] * step[0] * step[1] / 100
    areas_cm2 = []
    for left, right in ((x - 90, x - 20), (x + 20, x + 90)):
        lower[0], upper[0] = left, right
        first, last = index_range(volume.grid, lower, upper, margin=0)
        rows, columns = (slice(first[axis] // step[axis - 1], -(-last[axis] // step[axis - 1])) for axis in (1, 2))
        areas_cm2.append(float(is_lung[:, rows, columns].all(axis=0).sum()) * pixel_cm2)
    return "Lung on both sides: not a vertebra of the neck" if min(areas_cm2) > MAX_LUNG_CM2 else None


def _body(plane_hu: NDArray[np.int16]) -> NDArray[np.bool_]:
    """The largest piece of what is no air in a slice `(Y, X)`, with all that it encloses, such as lungs."""
    components, num = ndimage.label(plane_hu > BODY_HU)
    if num == 0:
        return np.zeros(plane_hu.shape, bool)
    largest = np.bincount(components.ravel())[1:].argmax() + 1
    body: NDArray[np.bool_] = ndimage.binary_fill_holes(components == largest)
    return body
