"""Draws fractures and puts them into a volume: which levels, which kinds, and what of them can be seen.

Works on any CT volume with a label map of its vertebrae, on the volume's own grid. `insert` is the door; the stacks the
fracture network trains on are cut in `stacks.py`.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from model.geometry import Grid
from training.evaluation.loss import LEVEL_PREVALENCE
from training.inserted.clefts import Cleft, cut
from training.inserted.compression import compress
from training.inserted.frame import VertebraFrame, vertebra_frames
from training.inserted.negatives import Negative, add_negatives
from training.inserted.region import Neighbourhood, neighbourhood
from training.inserted.sites import KINDS, fracture_clefts

CORRELATION = (0.3, 0.1, 0.3, 0.4, 0.67, 0.25)
"""Between the latent severities of neighbours, C1-C2 to C6-C7. Chosen to give what is known of the RSNA labels: a
correlation of 0.36 between C5 and C6, and 48 % of patients with a fracture."""

MIN_CONTRAST = 1.3
"""What changes Hounsfield units by less than this many deviations of the bone around it is not visible: by eye, of
planning CTs, 1.1 could not be told from texture and 1.4 could."""

MIN_VISIBLE_MM3 = 6.0
_NUM_TRIES = 4
_MORE_KINDS = (0.62, 0.27, 0.11)
"""How often a fractured vertebra has one, two or three fractures."""


@dataclass(frozen=True, kw_only=True)
class InsertedFracture:
    """One fracture that was put in. displacement_mm: of its most displaced fragment, or how far an end plate sank.

    contrast_to_noise: mean change of Hounsfield units in its region over the deviation of the bone's texture and noise.
    centre_lps_mm: `(x, y, z)` of its region.
    """

    level: str
    kind: str
    width_mm: float
    displacement_mm: float
    contrast_to_noise: float
    volume_mm3: float
    centre_lps_mm: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inserted:
    """A volume with fractures in it. voxels_hu: int16 `(Z, Y, X)`. regions: uint8, the level's number in its fractures.

    eligible: labels of the vertebrae that could have been broken: there, whole, large enough.
    """

    voxels_hu: NDArray[np.int16]
    regions: NDArray[np.uint8]
    fractures: tuple[InsertedFracture, ...]
    negatives: tuple[Negative, ...]
    eligible: tuple[int, ...]


def draw_levels(rng: np.random.Generator, boost: float = 1.0) -> list[int]:
    """Labels of the broken levels of one patient: RSNA's share of each, clustered in neighbours.

    boost: multiplies every share, at most to a half.
    """
    shares = np.minimum(LEVEL_PREVALENCE * boost, 0.5)
    severity = float(rng.standard_normal())
    broken = []
    for label, threshold in enumerate(-ndtri(shares), start=1):
        if label > 1:
            shared = CORRELATION[label - 2]
            severity = shared * severity + np.sqrt(1 - shared**2) * float(rng.standard_normal())
        if severity > threshold:
            broken.append(label)
    return broken


def insert(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    rng: np.random.Generator,
    *,
    levels: Collection[int] | None = None,
    boost: float = 1.0,
    negatives: float = 0.5,
    min_contrast: float = MIN_CONTRAST,
) -> Inserted:
    """A copy of the volume with fractures in some of its vertebrae, and what looks like one in any of them.

    labels: uint8 `(Z, Y, X)` on the volume's grid, 0 and 1..7 = C1..C7, as drawn or as a network draws them. levels:
    the labels to break, as far as they are there and whole; None draws them at `boost` times RSNA's prevalence.
    negatives: mean number of things that are no fracture at each vertebra; 0 for none. min_contrast: what would be
    fainter is drawn anew, and in the end left out, so that whatever counts as fractured can be seen.
    """
    changed = voxels_hu.copy()
    regions = np.zeros(voxels_hu.shape, np.uint8)
    frames = vertebra_frames(voxels_hu, labels, grid)
    broken = set(draw_levels(rng, boost) if levels is None else levels)
    added: list[Negative] = []
    fractures: list[InsertedFracture] = []
    for frame in frames:
        if negatives:
            added += add_negatives(changed, labels, grid, frame, rng, negatives)
        if frame.label in broken:
            fractures += _break(changed, labels, grid, frame, rng, regions, min_contrast)
    return Inserted(
        voxels_hu=changed,
        regions=regions,
        fractures=tuple(fractures),
        negatives=tuple(added),
        eligible=tuple(frame.label for frame in frames),
    )


def _break(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    frame: VertebraFrame,
    rng: np.random.Generator,
    regions: NDArray[np.uint8],
    min_contrast: float,
) -> list[InsertedFracture]:
    """One to three visible fractures of one vertebra, fewer where it has no bone for them."""
    kinds = list(KINDS[frame.level])
    shares = np.array(list(KINDS[frame.level].values()))
    wanted = 1 + int(rng.choice(3, p=_MORE_KINDS))
    fractures: list[InsertedFracture] = []
    for attempt in range(wanted + _NUM_TRIES):
        kind = str(rng.choice(kinds, p=shares / shares.sum()))
        # What was too faint comes back wider.
        severity = 1.0 + 0.3 * max(0, attempt - len(fractures))
        fracture = break_once(voxels_hu, labels, grid, frame, kind, rng, regions, severity, min_contrast)
        if fracture is not None:
            fractures.append(fracture)
        if len(fractures) == wanted:
            break
    return fractures


def break_once(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    frame: VertebraFrame,
    kind: str,
    rng: np.random.Generator,
    regions: NDArray[np.uint8],
    severity: float = 1.0,
    min_contrast: float = MIN_CONTRAST,
) -> InsertedFracture | None:
    """Puts one fracture of a kind into the volume and its region, in place; None, and no change, if it is faint."""
    clefts = fracture_clefts(kind, frame, rng, severity)
    if not clefts:
        return None
    near = _around(voxels_hu, labels, grid, frame, clefts, whole_body=kind == "compression")
    region = np.zeros(near.before.shape, bool)
    depth_mm = 0.0
    if kind == "compression":
        depth_mm = float(rng.uniform(0.12, 0.4) * (frame.ceiling[0] - frame.floor[0]) * severity)
        depth_mm = float(np.clip(depth_mm, 1.0, 4.0))
        region |= compress(near, frame, depth_mm, rng)
    for cleft in clefts:
        region |= cut(near, cleft, rng)
    volume_mm3 = float(region.sum()) * grid.voxel_volume_mm3
    if volume_mm3 < MIN_VISIBLE_MM3:
        return None
    change = float(np.abs(near.voxels_hu - near.before)[region].mean())
    if change / near.texture_hu < min_contrast:
        return None
    near.write(voxels_hu)
    regions[near.box][region] = frame.label
    x, y, z = near.grid.to_lps_mm(np.argwhere(region).mean(axis=0))
    return InsertedFracture(
        level=frame.level,
        kind=kind,
        width_mm=max(cleft.width_mm for cleft in clefts),
        displacement_mm=max(depth_mm, *(float(np.linalg.norm(cleft.shift_lps_mm)) for cleft in clefts)),
        contrast_to_noise=change / near.texture_hu,
        volume_mm3=volume_mm3,
        centre_lps_mm=(float(x), float(y), float(z)),
    )


def _around(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    frame: VertebraFrame,
    clefts: list[Cleft],
    whole_body: bool,
) -> Neighbourhood:
    """A ball around the middle of all clefts that holds them, and the body of the vertebra if that is compressed."""
    balls = [(cleft.centre_lps_mm, cleft.radius_mm) for cleft in clefts]
    if whole_body:
        v = (frame.front + frame.back) / 2
        middle = np.array([0, v, (frame.floor + frame.ceiling) @ (1, 0, v) / 2])
        balls.append((frame.to_lps_mm(middle), 19.0))
    centre = np.mean([place for place, _ in balls], axis=0)
    radius_mm = max(float(np.linalg.norm(place - centre)) + radius for place, radius in balls)
    return neighbourhood(voxels_hu, labels, grid, frame.label, centre, radius_mm)
