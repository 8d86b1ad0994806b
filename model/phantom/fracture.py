"""Fractures: which exist at which level, and the curved gap each one makes in its bone.

This module says where a gap runs in a bone's frame; `render` cuts it.
"""

from dataclasses import dataclass

import numpy as np

from model.levels import LEVELS
from model.phantom.bones import Shape
from model.phantom.solids import Box, Float32Array, Float64Array, coordinates, local_frame

FRACTURE_KINDS: tuple[str, ...] = ("body", "dens", "ring", "lamina", "spinous", "facet", "transverse", "pedicle")
"""Every kind of fracture the phantom knows; `kinds_at` says which of them a level can have."""

MAX_WIDTH_MM = 6.0


def kinds_at(level: str) -> tuple[str, ...]:
    """Kinds of fracture that exist at a level: the ring only at C1, the dens only at C2.

    Raises:
        ValueError: no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"Fracture level is {level!r}; expected one of {', '.join(LEVELS)}.")
    if level == "C1":
        return ("ring", "facet", "transverse")
    return tuple(kind for kind in FRACTURE_KINDS if kind != "ring" and (kind != "dens" or level == "C2"))


@dataclass(frozen=True, kw_only=True)
class Fracture:
    """One fracture to draw. width_mm: widest opening of the gap, 0 < width_mm <= 6.

    At C1 the facet is the lateral mass. A ring fracture breaks the anterior and the posterior arch.

    Raises:
        ValueError: unknown level or kind, a kind the level cannot have, or an impossible width.
    """

    level: str
    kind: str
    width_mm: float = 1.5

    def __post_init__(self) -> None:
        allowed = kinds_at(self.level)
        if self.kind not in allowed:
            raise ValueError(f"Fracture kind at {self.level} is {self.kind!r}; expected one of {', '.join(allowed)}.")
        if not 0 < self.width_mm <= MAX_WIDTH_MM:
            raise ValueError(
                f"Fracture width is {self.width_mm} mm; expected more than 0 and at most {MAX_WIDTH_MM} mm."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Crack:
    """A gap along a curved plane, inside a ball.

    to_local: bone frame to `(u, v, w)`: w across the gap, u and v along it. bend: curvature along u and v, 1/mm.
    ripple_mm: height of the waves of the surface. shift_mm: step-off of the far side (w > 0) along u, v, w.
    """

    to_local: Float64Array
    reach_mm: float
    width_mm: float
    bend: tuple[float, float]
    ripple_mm: float
    phase: float
    shift_mm: tuple[float, float, float]

    def across_mm(self, to_bone: Float64Array, box: Box) -> tuple[Float32Array, Float32Array]:
        """Signed distance to the gap's middle surface, and distance beyond its reach, at the voxels of the box."""
        u, v, w = coordinates(self.to_local @ to_bone, box)
        across = w + np.float32(self.bend[0]) * u * u + np.float32(self.bend[1]) * v * v
        across += np.float32(self.ripple_mm) * np.sin(
            np.float32(0.55) * u + np.float32(0.8) * v + np.float32(self.phase)
        )
        beyond = np.sqrt(u * u + v * v + np.float32(1.3) * w * w) - np.float32(self.reach_mm)
        return across.astype(np.float32), beyond.astype(np.float32)

    def moved(self) -> Float64Array:
        """`(4, 4)`, bone frame to bone frame: where to look up the intact bone for a point of the far side."""
        linear = np.linalg.inv(self.to_local[:, :3])
        matrix = np.eye(4)
        matrix[:3, 3] = -linear @ np.asarray(self.shift_mm)
        return matrix


_NORMALS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Across the gap, in the bone's frame, for the left half.
    "body": ((0.15, 0.25, 1.0), (0.0, 0.75, 0.66), (1.0, 0.15, 0.1), (0.1, 1.0, -0.15)),
    "dens": ((0.05, 0.2, 1.0), (0.1, -0.3, 1.0)),
    "ring_front": ((1.0, 0.25, 0.2), (1.0, -0.3, 0.0)),
    "ring_back": ((-0.5, 1.0, 0.1), (-0.2, 1.0, 0.3)),
    "lamina": ((1.0, -0.35, 0.2), (0.8, -0.7, 0.0), (0.9, -0.4, 0.6)),
    "spinous": ((0.1, 1.0, -0.3), (0.0, 0.8, 0.6)),
    "facet": ((0.1, 0.5, 1.0), (0.3, 1.0, 0.1), (0.1, -0.5, 1.0)),
    "transverse": ((1.0, 0.2, 0.1), (0.9, -0.3, 0.3)),
    "pedicle": ((0.5, 1.0, 0.1), (0.8, 0.8, -0.2)),
}
_REACH_MM = {
    "body": 17.0, "dens": 9.5, "ring_front": 7.0, "ring_back": 7.0, "lamina": 9.5, "spinous": 10.0, "facet": 11.0,
    "transverse": 9.0, "pedicle": 8.0,
}  # fmt: skip
_SHIFT_MM = {"body": 0.5, "dens": 1.6, "spinous": 1.4, "lamina": 0.6, "ring_front": 0.7, "ring_back": 0.7}


def cracks(fracture: Fracture, shape: Shape, rng: np.random.Generator) -> list[Crack]:
    """The gaps of one fracture in one bone, on a side and along a plane drawn from rng."""
    side = 1.0 if rng.random() < 0.5 else -1.0
    if fracture.kind == "ring":
        other = side if rng.random() < 0.4 else -side
        return [
            _crack(fracture, "ring_front", shape, side, rng),
            _crack(fracture, "ring_back", shape, other, rng),
        ]
    return [_crack(fracture, fracture.kind, shape, side, rng)]


def _crack(fracture: Fracture, site: str, shape: Shape, side: float, rng: np.random.Generator) -> Crack:
    mirror = np.array([side, 1.0, 1.0])
    normals = _NORMALS[site]
    normal = np.array(normals[rng.integers(len(normals))]) + rng.normal(0, 0.12, 3)
    normal = normal * mirror / np.linalg.norm(normal)
    along = np.cross(normal, (0.31, 0.62, 0.72))
    along /= np.linalg.norm(along)
    rows = np.stack([along, np.cross(normal, along), normal])
    spread = {"body": 2.2, "facet": 1.5}.get(site, 0.8)
    origin = shape.landmarks[site] * mirror + rng.normal(0, spread, 3).clip(-2 * spread, 2 * spread)
    step = _SHIFT_MM.get(site, 0.4) * rng.uniform(0.1, 1.0)
    angle = rng.uniform(0, 2 * np.pi)
    return Crack(
        to_local=local_frame(origin, rows),
        reach_mm=_REACH_MM[site],
        width_mm=fracture.width_mm,
        bend=(float(rng.normal(0, 0.012)), float(rng.normal(0, 0.012))),
        ripple_mm=float(rng.uniform(0.1, 0.45)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        shift_mm=(float(step * np.cos(angle)), float(step * np.sin(angle)), 0.0),
    )
