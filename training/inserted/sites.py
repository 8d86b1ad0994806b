"""Which fractures a level can have, and where the clefts of each run in a given vertebra.

The kinds are the named injuries of trauma radiology (Jefferson, dens II and III, hangman, teardrop, clay-shoveller).
How often each is drawn, and how wide and displaced, was set by judgement: no count of them was at hand. Whatever the
mask has no bone for gives no cleft.
"""

import numpy as np

from model.geometry import FloatArray
from training.inserted.clefts import Cleft
from training.inserted.frame import VertebraFrame

_MIDDLE = {"body": 0.12, "transverse": 0.15, "facet": 0.19, "lamina": 0.16, "pedicle": 0.07, "teardrop": 0.12,
           "spinous": 0.09, "compression": 0.1}  # fmt: skip
KINDS: dict[str, dict[str, float]] = {
    "C1": {"ring": 0.5, "arch": 0.2, "lateral_mass": 0.18, "transverse": 0.12},
    "C2": {"dens": 0.45, "hangman": 0.2, "body": 0.12, "teardrop": 0.08, "lamina": 0.06, "facet": 0.05,
           "spinous": 0.04},
    "C3": {"body": 0.15, "transverse": 0.2, "facet": 0.2, "lamina": 0.15, "pedicle": 0.1, "teardrop": 0.1,
           "spinous": 0.05, "compression": 0.05},
    "C4": _MIDDLE,
    "C5": _MIDDLE,
    "C6": _MIDDLE,
    "C7": {"transverse": 0.24, "spinous": 0.24, "lamina": 0.12, "facet": 0.13, "compression": 0.12, "body": 0.08,
           "pedicle": 0.07},
}  # fmt: skip
"""How often each kind is drawn at a level."""

STEP_MM: dict[str, tuple[float, float]] = {
    # Share of fractures that are displaced at all, and how far at most.
    "dens": (0.55, 2.5), "hangman": (0.5, 2.5), "ring": (0.6, 2.0), "arch": (0.4, 1.5), "lateral_mass": (0.4, 2.0),
    "body": (0.4, 2.0), "teardrop": (0.8, 4.0), "lamina": (0.5, 2.5), "spinous": (0.8, 4.0), "facet": (0.5, 2.5),
    "transverse": (0.5, 2.5), "pedicle": (0.4, 2.0), "compression": (0.0, 0.0),
}  # fmt: skip
LOOSE = frozenset({"dens", "teardrop", "spinous", "transverse"})
"""Kinds whose far side is a fragment that moves as a whole."""

WAVE_LENGTHS_MM = (20.0, 13.0, 9.0, 6.0, 4.0, 3.0)
"""Of the waves that make a gap rough."""

MIN_BONE_MM3 = 60.0
"""Less bone than this at a site counts as none."""

Place = tuple[FloatArray, FloatArray, float]
"""Centre and normal in the frame, and reach in mm."""


def fracture_clefts(kind: str, frame: VertebraFrame, rng: np.random.Generator, severity: float = 1.0) -> list[Cleft]:
    """The clefts of one fracture of a kind, drawn for this vertebra; none where it has no bone for it.

    severity: makes everything wider and more displaced.

    Raises:
        ValueError: no such kind.
    """
    if kind not in STEP_MM:
        raise ValueError(f"Fracture kind is {kind!r}; expected one of {', '.join(STEP_MM)}.")
    side = float(rng.choice((-1, 1)))
    places = _places(kind, frame, side, rng)
    clefts = [
        random_cleft(kind, frame, centre, normal, reach_mm, rng, severity=severity)
        for centre, normal, reach_mm in places
    ]
    if clefts and kind in ("body", "facet", "lamina", "lateral_mass") and rng.random() < 0.3:
        clefts.append(_branch(clefts[0], rng))
    return clefts


def _places(kind: str, frame: VertebraFrame, side: float, rng: np.random.Generator) -> list[Place]:
    if kind == "ring":
        return _ring(frame, side, rng, int(rng.choice((2, 2, 2, 3, 4))))
    if kind == "arch":
        return _ring(frame, side, rng, 1)
    if kind == "dens":
        return _dens(frame, rng)
    if kind == "hangman":
        return _one("pedicle", frame, 1.0, rng) + _one("pedicle", frame, -1.0, rng)
    if kind == "teardrop":
        return _teardrop(frame, rng)
    if kind == "compression":
        return _buckle(frame, rng)
    return _one(kind, frame, side, rng)


NORMALS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Across the gap (left, back, up), for the left side. None of them is exact: `_one` tilts it.
    "body": ((1.0, 0.1, 0.0), (1.0, 0.2, 0.2), (0.15, 1.0, 0.1), (0.0, 0.7, 0.7), (0.1, 0.2, 1.0)),
    "facet": ((0.1, 0.4, 1.0), (0.2, 1.0, 0.3), (0.6, 0.8, 0.0)),
    "lateral_mass": ((1.0, 0.3, 0.0), (0.3, 1.0, 0.1), (0.5, 0.8, 0.0)),
    "lamina": ((1.0, -0.5, 0.0), (1.0, -0.3, 0.3), (0.4, -0.2, 1.0)),
    "pedicle": ((0.4, 1.0, 0.0), (0.8, 0.7, 0.1), (-0.2, 1.0, 0.2)),
    "spinous": ((0.0, 1.0, -0.3), (0.0, 1.0, 0.4), (0.2, 1.0, 0.0)),
    "transverse": ((1.0, 0.1, 0.0), (1.0, -0.4, 0.2), (0.7, 0.7, 0.0)),
}
REACH_MM = {"body": 16.0, "facet": 11.0, "lateral_mass": 12.0, "lamina": 10.0, "pedicle": 9.0, "spinous": 12.0,
            "transverse": 10.0}  # fmt: skip
TILT = 0.22


def _one(kind: str, frame: VertebraFrame, side: float, rng: np.random.Generator) -> list[Place]:
    """A single cleft through one part of the vertebra."""
    u, v, w = frame.points.T
    out, half = u * side, frame.half_width
    canal_middle = (frame.back + frame.canal_back) / 2
    if kind == "body":
        zone = (np.abs(u) < half) & (v > frame.front + 1) & (v < frame.back - 1)
        if frame.label == 2:
            zone &= w < np.median(w)  # not the dens
    elif kind == "pedicle":
        zone = (out > half - 2) & (out < half + 9) & (v > frame.back - 3) & (v < frame.back + 5)
    elif kind == "facet":
        zone = (out > half + 1) & (v > frame.back) & (v < frame.canal_back + 1)
    elif kind == "lateral_mass":
        zone = (out > 9) & (out < 25)
    elif kind == "lamina":
        zone = (out > 3) & (out < 14) & (v > canal_middle) & (v < frame.canal_back + 6)
    elif kind == "spinous":
        zone = (np.abs(u) < 5) & (v > frame.canal_back + 3)
    elif frame.label == 1:
        zone = out > 24
    else:
        zone = (out > half + 4) & (v < frame.back)
    centre = _pick(frame, zone, rng, radius_mm=6.0 if kind == "body" else 4.0)
    if centre is None:
        return []
    choices = NORMALS[kind]
    return [(centre, _tilted(np.array(choices[rng.integers(len(choices))]) * (side, 1, 1), rng), REACH_MM[kind])]


def _ring(frame: VertebraFrame, side: float, rng: np.random.Generator, num_breaks: int) -> list[Place]:
    """One to four breaks of the arches of C1, radial as seen from the canal: Jefferson's fracture and its variants."""
    u, v, _ = frame.points.T
    middle = (frame.back + frame.canal_back) / 2
    angle = np.degrees(np.arctan2(u * side, v - middle))
    # 0 degrees points to the back, 180 to the front; the lateral masses lie between.
    front = [float(rng.uniform(150, 172)), float(rng.uniform(-172, -150))]
    back = [float(rng.uniform(12, 60)), float(rng.uniform(-60, -12))]
    if num_breaks == 1:
        angles = front[:1] if rng.random() < 0.4 else back[:1]
    else:
        angles = {2: [front[0], back[int(rng.integers(2))]], 3: [front[0], *back], 4: [*front, *back]}[num_breaks]
    places: list[Place] = []
    for degrees in angles:
        apart = np.abs((angle - degrees + 180) % 360 - 180)
        zone = (apart < 9) & (np.abs(u) < 22)
        centre = _pick(frame, zone, rng, radius_mm=3.5)
        if centre is None:
            continue
        radial = np.array([centre[0], centre[1] - middle, 0.0])
        tangent = np.array([radial[1], -radial[0], 0.0]) / max(float(np.linalg.norm(radial)), 1e-6)
        places.append((centre, _tilted(tangent, rng), 9.0))
    return places


def _dens(frame: VertebraFrame, rng: np.random.Generator) -> list[Place]:
    """Type II through the base of the dens, type III through the body of C2 below it."""
    base = dens_base(frame)
    if base is None:
        return []
    is_type_2 = rng.random() < 0.62
    centre = base + np.array([rng.normal(0, 0.7), 0.0, rng.uniform(-0.5, 3.0) if is_type_2 else rng.uniform(-6, -2)])
    tilt = np.array([rng.normal(0, 0.1), rng.normal(0, 0.3), 1.0])
    return [(centre, tilt / np.linalg.norm(tilt), 11.0 if is_type_2 else 14.0)]


def dens_base(frame: VertebraFrame) -> FloatArray | None:
    """Middle of the base of the dens, in the frame of C2; None where the mask shows no dens."""
    u, v, _ = frame.points.T
    middle = frame.points[(np.abs(u) < 5) & (v > frame.front - 2) & (v < frame.back + 2)]
    if len(middle) * frame.mm3_a_point < MIN_BONE_MM3:
        return None
    low, high = np.percentile(middle[:, 2], (2, 98))
    if not 24 < high - low < 55:
        return None
    height = low + 0.52 * (high - low)
    near = middle[np.abs(middle[:, 2] - height) < 4]
    if len(near) * frame.mm3_a_point < MIN_BONE_MM3:
        return None
    return np.array([float(np.median(near[:, 0])), float(np.median(near[:, 1])), float(height)])


def _teardrop(frame: VertebraFrame, rng: np.random.Generator) -> list[Place]:
    """A piece of the anterior-inferior corner of the body, 3 to 9 mm large."""
    size = rng.uniform(3, 9)
    u = rng.normal(0, 2.5)
    v = frame.front + 0.5
    corner = np.array([u, v, frame.floor @ (1, u, v)])
    # The fragment is the side w > 0: forward and down.
    normal = _tilted(np.array([0.0, -1.0, -rng.uniform(0.5, 1.3)]), rng)
    return [(corner - normal * size * 0.6, normal, 6.0 + size)]


def _buckle(frame: VertebraFrame, rng: np.random.Generator) -> list[Place]:
    """Where the front wall of a compressed body gives way; at times with a split of the body from front to back."""
    height = float((frame.ceiling[0] - frame.floor[0]) * rng.uniform(0.45, 0.75))
    u, v = rng.normal(0, 3), frame.front + 1.0
    front = np.array([u, v, frame.floor @ (1, u, v) + height])
    places: list[Place] = [(front, _tilted(np.array([0.0, 0.3, 1.0]), rng), float(rng.uniform(6, 9)))]
    if rng.random() < 0.4:
        v = (frame.front + frame.back) / 2
        middle = np.array([u, v, frame.floor @ (1, u, v) + height * 0.8])
        places.append((middle, _tilted(np.array([1.0, 0.1, 0.0]), rng), float(rng.uniform(9, 14))))
    return places


def _pick(frame: VertebraFrame, zone: FloatArray, rng: np.random.Generator, radius_mm: float) -> FloatArray | None:
    """A place in the middle of the bone of a zone: the mean of what lies about one of its points."""
    candidates = frame.points[zone]
    if len(candidates) * frame.mm3_a_point < MIN_BONE_MM3:
        return None
    seed = candidates[rng.integers(len(candidates))]
    about = candidates[np.linalg.norm(candidates - seed, axis=1) < radius_mm]
    return np.asarray(about.mean(axis=0))


def _tilted(normal: FloatArray, rng: np.random.Generator) -> FloatArray:
    tilted = normal / np.linalg.norm(normal) + rng.normal(0, TILT, 3).clip(-2 * TILT, 2 * TILT)
    return np.asarray(tilted / np.linalg.norm(tilted))


def random_cleft(
    kind: str,
    frame: VertebraFrame,
    centre: FloatArray,
    normal: FloatArray,
    reach_mm: float,
    rng: np.random.Generator,
    *,
    severity: float = 1.0,
) -> Cleft:
    """A rough cleft at a place of the frame: 0.2 to 2 mm wide, its far side moved by 0.5 to 4 mm or not at all."""
    rows = local_rows(normal) @ frame.rows
    share_displaced, most_mm = STEP_MM[kind]
    shift = np.zeros(3)
    if rng.random() < share_displaced * min(1.0, severity):
        step_mm = float(np.clip(0.5 + rng.exponential(0.35 * most_mm) * severity, 0.5, most_mm))
        # Mostly along the gap, and a little apart; never into the other side.
        direction = np.array([*rng.normal(0, 1, 2), abs(rng.normal(0, 0.6 if kind not in LOOSE else 1.2))])
        shift = step_mm * direction / np.linalg.norm(direction) @ rows
    # Long waves are high and short ones low, none of them alone, or a cut along the gap would show stripes.
    length = rng.uniform(0.8, 1.25, len(WAVE_LENGTHS_MM)) * WAVE_LENGTHS_MM
    turn, phase = rng.uniform(0, 2 * np.pi, (2, len(length)))
    number = 2 * np.pi / length
    waves = [length * rng.uniform(0.012, 0.035, len(length)), number * np.cos(turn), number * np.sin(turn), phase]
    return Cleft(
        centre_lps_mm=frame.to_lps_mm(centre),
        rows=rows,
        reach_mm=reach_mm * float(rng.uniform(0.85, 1.15)),
        width_mm=float(np.clip(rng.lognormal(np.log(0.7), 0.5) * severity, 0.2, 2.0)),
        bend=(float(rng.normal(0, 0.013)), float(rng.normal(0, 0.013))),
        waves=np.stack(waves, axis=1),
        shift_lps_mm=shift,
        is_loose=kind in LOOSE,
        fill_hu=float(rng.uniform(40, 70)),
    )


def local_rows(normal: FloatArray) -> FloatArray:
    """Right-handed unit vectors, the last along `normal`."""
    along = np.cross(normal, (0.31, 0.62, 0.72))
    along /= np.linalg.norm(along)
    return np.stack([along, np.cross(normal, along), normal])


def _branch(cleft: Cleft, rng: np.random.Generator) -> Cleft:
    """A second gap that leaves the first at an angle and stays shorter."""
    turn = rng.uniform(0.6, 1.4) * rng.choice((-1, 1))
    u, v, w = cleft.rows
    normal = np.cos(turn) * w + np.sin(turn) * u
    reach_mm = 0.6 * cleft.reach_mm
    offset = reach_mm * 0.7 * np.cross(normal, v) * rng.choice((-1, 1))
    return Cleft(
        centre_lps_mm=cleft.centre_lps_mm + offset,
        rows=np.stack([np.cross(v, normal), v, normal]),
        reach_mm=reach_mm,
        width_mm=max(0.2, cleft.width_mm * float(rng.uniform(0.5, 0.9))),
        bend=(0.0, float(rng.normal(0, 0.02))),
        waves=cleft.waves,
        shift_lps_mm=np.zeros(3),
        fill_hu=cleft.fill_hu,
    )
