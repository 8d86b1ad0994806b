"""One imaginary patient: every bone and tissue with its place, size and Hounsfield units, drawn from a seed.

Lengths are mm. The patient frame is upright LPS with the body of C4 near the origin; `pose` takes it to LPS. Nothing
is sampled here: `render` does that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.ndimage import gaussian_filter

from model.levels import LEVELS
from model.phantom import bones
from model.phantom.bones import Jitter, Shape
from model.phantom.fracture import Crack, Fracture, cracks
from model.phantom.regions import cranium, face, shoulders
from model.phantom.solids import Float32Array, Float64Array, Point
from model.phantom.tissues import Paint, Spine, muscles, outline, palette, table, throat_and_canal

SPINE = ("T3", "T2", "T1", "C7", "C6", "C5", "C4", "C3", "C2")
"""From foot to head, the vertebrae that stand on one another; C1 and the occiput follow the axis."""

_TILT_DEG = {"T3": 20, "T2": 24, "T1": 27, "C7": 24, "C6": 18.5, "C5": 12, "C4": 5, "C3": -2, "C2": -6, "C1": -9}
_CURVE = {"T3": -0.2, "T2": -0.2, "T1": 0.0, "C7": 0.35, "C6": 0.6, "C5": 0.5, "C4": 0.1, "C3": -0.4, "C2": -0.8}


@dataclass(frozen=True, kw_only=True, eq=False)
class Bone:
    """One bone in the patient.

    name: "C0" is the rim of the occiput. label: 1..8 for C1..C7 and T1, 0 when it is not labelled.
    to_patient: `(4, 4)`, bone frame to patient frame. Cortex thickness differs between body and arch.
    """

    name: str
    label: int
    to_patient: Float64Array
    shape: Shape
    cracks: tuple[Crack, ...]
    cortex_hu: float
    trabecular_hu: float
    cortex_body_mm: float
    cortex_arch_mm: float

    @property
    def corners_mm(self) -> Float64Array:
        """Float64 `(n, 3)`: corners of the boxes of all added solids, in the patient frame."""
        points = np.concatenate([part.solid.corners_mm for part in self.shape.parts if not part.cut])
        corners: Float64Array = points @ self.to_patient[:3, :3].T + self.to_patient[:3, 3]
        return corners


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one vertebra lies: middle and corners of the box around all of it, LPS mm."""

    level: str
    centre_lps_mm: tuple[float, float, float]
    lower_lps_mm: tuple[float, float, float]
    upper_lps_mm: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """One imaginary patient, ready to be rendered on any grid.

    pose: `(4, 4)`, patient frame to LPS mm. texture: float32 `(32, 32, 32)`, periodic, mean 0, deviation 1: the grain
    of trabecular bone. fractures: those that were asked for. seed, variation: what it was drawn from.
    """

    seed: int
    variation: float
    fractures: tuple[Fracture, ...]
    pose: Float64Array
    bones: tuple[Bone, ...]
    outline: Paint
    tissues: tuple[Paint, ...]
    texture: Float32Array
    shoulder_z_mm: float

    @classmethod
    def random(cls, seed: int, fractures: Sequence[Fracture] = (), variation: float = 1.0) -> "Anatomy":
        """A patient drawn from a seed; the same seed with other fractures is the same patient.

        variation: how far from the mean; 0 is the mean patient (still asymmetric), 1 the usual spread.

        Raises:
            ValueError: variation is negative.
        """
        if variation < 0:
            raise ValueError(f"Variation is {variation}; expected 0 (the mean patient) or more.")
        rng = np.random.default_rng([seed, 1])
        jitter = _jitter(rng, variation)
        frames = _frames(rng, variation, jitter)
        shapes = _shapes(rng, variation, jitter)
        placed = _bones(frames, shapes, fractures, seed, jitter, variation, rng)
        spine = Spine(frames=frames)
        hu = palette(jitter, rng, variation)
        tissues = (
            table(spine),
            *shoulders(spine, hu, jitter),
            *muscles(spine, hu, jitter),
            *face(spine, hu, jitter),
            *cranium(spine, hu, jitter),
            *throat_and_canal(spine, hu, jitter, rng, variation),
        )
        return cls(
            seed=seed,
            variation=variation,
            fractures=tuple(fractures),
            pose=_pose(rng, variation),
            bones=placed,
            outline=outline(spine, hu, jitter),
            tissues=tissues,
            texture=_texture(rng),
            shoulder_z_mm=float(frames["T1"][2, 3]),
        )

    def place(self, level: str) -> Place:
        """Where a vertebra (C1..C7, T1..T3) lies.

        Raises:
            ValueError: no such vertebra.
        """
        found = next((bone for bone in self.bones if bone.name == level), None)
        if found is None:
            raise ValueError(f"Level is {level!r}; expected one of {', '.join(bone.name for bone in self.bones)}.")
        points = found.corners_mm @ self.pose[:3, :3].T + self.pose[:3, 3]
        lower, upper = points.min(axis=0), points.max(axis=0)
        return Place(
            level=level,
            centre_lps_mm=_triple((lower + upper) / 2),
            lower_lps_mm=_triple(lower),
            upper_lps_mm=_triple(upper),
        )

    @property
    def places(self) -> dict[str, Place]:
        """Where C1..C7 lie, by level."""
        return {level: self.place(level) for level in LEVELS}


def _triple(values: Float64Array) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _jitter(rng: np.random.Generator, variation: float) -> Jitter:
    def jitter(spread: float) -> float:
        return float(1 + spread * np.clip(variation * rng.normal(), -2.5, 2.5))

    return jitter


def rotation(*, tilt_deg: float, roll_deg: float, yaw_deg: float) -> Float64Array:
    """`(3, 3)`: tilt bows forward (about x), roll bends to the right (about y), yaw turns the face to the left."""
    tilt, roll, yaw = np.deg2rad([tilt_deg, roll_deg, yaw_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_y = np.array([[np.cos(roll), 0, np.sin(roll)], [0, 1, 0], [-np.sin(roll), 0, np.cos(roll)]])
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    turned: Float64Array = about_z @ about_y @ about_x
    return turned


def _frames(rng: np.random.Generator, variation: float, jitter: Jitter) -> dict[str, Float64Array]:
    """`(4, 4)` per bone ("C0", C1..T3) and for the head, to the patient frame; C4 at the origin."""
    curve = 7.0 * rng.normal() * variation
    flexion = np.clip(6.0 * rng.normal() * variation, -14, 14)
    bend = 1.2 * rng.normal() * variation
    head_yaw = float(np.clip(6.0 + 7.0 * rng.normal() * variation, -12, 22))
    size = jitter(0.02)
    names = [*SPINE, "C1"]
    angles = {}
    for rank, name in enumerate(names):
        angles[name] = rotation(
            tilt_deg=_TILT_DEG[name]
            + curve * _CURVE.get(name, -0.9)
            + flexion * (rank / 9 - 0.6)
            + 1.0 * variation * rng.normal(),
            roll_deg=bend * (rank - 5) + 0.8 * variation * rng.normal(),
            yaw_deg=head_yaw * {"C1": 0.85, "C2": 0.3, "C3": 0.22, "C4": 0.15, "C5": 0.1}.get(name, 0.0)
            + 0.8 * variation * rng.normal(),
        )
    positions = {"T3": np.zeros(3)}
    for below, above in pairwise(SPINE):
        small, large = bones.SIZES[below], bones.SIZES[above]
        disc = large.disc * size * jitter(0.12)
        low = angles[below][:, 2] * (small.height + disc / 2)
        positions[above] = positions[below] + low + angles[above][:, 2] * (large.height + disc / 2)
    positions["C1"] = positions["C2"] + angles["C2"] @ np.array([0, 1.6, 17.4])
    frames = {name: _frame(angles[name], positions[name] - positions["C4"]) for name in names}
    frames["C0"] = frames["C1"] @ _frame(rotation(tilt_deg=2.0, roll_deg=0.0, yaw_deg=0.0), np.zeros(3))
    tilt = float(0.3 * flexion)
    head = rotation(tilt_deg=tilt, roll_deg=bend * 3, yaw_deg=head_yaw)
    frames["head"] = _frame(head, positions["C1"] - positions["C4"])
    return frames


def _frame(turn: Float64Array, origin: Float64Array) -> Float64Array:
    frame = np.eye(4)
    frame[:3, :3], frame[:3, 3] = turn, origin
    return frame


def _shapes(rng: np.random.Generator, variation: float, jitter: Jitter) -> dict[str, Shape]:
    shapes = {
        "C0": bones.occiput(jitter),
        "C1": bones.atlas(jitter),
        "C2": bones.axis(jitter, 4.0 + 4.0 * (jitter(1) - 1)),
    }
    worn = max(0.0, rng.normal(0.3, 0.8)) * variation
    for name in SPINE[:-1]:
        spurs: list[Point] = []
        for _ in range(int(rng.poisson(0.7 * worn))):
            angle = rng.uniform(0, 2 * np.pi)
            spurs.append((float(np.sin(angle)), float(-np.cos(angle)), float(rng.choice([-1, 1]))))
        shapes[name] = bones.typical_vertebra(name, bones.SIZES[name], jitter, spurs)
    return shapes


def _bones(
    frames: dict[str, Float64Array],
    shapes: dict[str, Shape],
    fractures: Sequence[Fracture],
    seed: int,
    jitter: Jitter,
    variation: float,
    rng: np.random.Generator,
) -> tuple[Bone, ...]:
    cortex_hu = float(np.clip(850 * jitter(0.2), 420, 1350))
    trabecular_hu = float(np.clip(285 * jitter(0.28), 110, 400))
    cortex_mm = 1.0 * jitter(0.2)
    labels = {level: number for number, level in enumerate((*LEVELS, "T1"), start=1)}
    placed = []
    for name in ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "T1", "T2", "T3"):
        scale = np.diag([jitter(0.03), jitter(0.03), jitter(0.02), 1.0])
        # Fractures have streams of their own, so that asking for one changes nothing else of the patient.
        gaps = [
            crack
            for number, fracture in enumerate(fractures)
            if fracture.level == name
            for crack in cracks(fracture, shapes[name], np.random.default_rng([seed, 2, labels[name], number]))
        ]
        placed.append(
            Bone(
                name=name,
                label=labels.get(name, 0),
                to_patient=frames[name] @ scale,
                shape=shapes[name],
                cracks=tuple(gaps),
                cortex_hu=cortex_hu * jitter(0.05),
                trabecular_hu=trabecular_hu * jitter(0.06),
                cortex_body_mm=0.75 * cortex_mm,
                cortex_arch_mm=1.6 * cortex_mm,
            )
        )
    return tuple(placed)


def _pose(rng: np.random.Generator, variation: float) -> Float64Array:
    turn = rotation(
        tilt_deg=float(np.clip(4 * rng.normal() * variation, -10, 10)),
        roll_deg=float(np.clip(3 * rng.normal() * variation, -8, 8)),
        yaw_deg=float(np.clip(4 * rng.normal() * variation, -12, 12)),
    )
    stretch = np.clip(1 + 0.06 * rng.normal() * variation, 0.87, 1.14) * (
        1 + 0.025 * variation * rng.normal(size=3).clip(-2, 2)
    )
    return _frame(turn @ np.diag(stretch), 5.0 * variation * rng.normal(size=3).clip(-2, 2))


def _texture(rng: np.random.Generator) -> Float32Array:
    smooth = gaussian_filter(rng.standard_normal((32, 32, 32), dtype=np.float32), 0.9, mode="wrap")
    return np.asarray(smooth / smooth.std(), np.float32)
