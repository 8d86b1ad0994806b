"""The bones of the neck, one by one, as unions and cuts of solids in their own frames.

A bone's frame: origin at the centre of the vertebral body (C1: of the dens), x to the left, y to the back, z up, mm.
Mean sizes follow published morphometry of adults (Panjabi et al., Spine 1991;16:861; Lang 1993). This module does not
place bones in the patient (`anatomy`) nor sample them (`render`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from model.phantom.solids import (
    Float64Array,
    Point,
    RoundedBox,
    Solid,
    VertebralBody,
    capsule,
    chain,
    ellipsoid,
    local_frame,
    plate,
)

Jitter = Callable[[float], float]
"""`jitter(s)`: a factor around 1 with relative spread s."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One solid of a bone, added with a fillet of blend_mm, or cut out of what came before it."""

    solid: Solid
    blend_mm: float = 1.5
    cut: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """The form of one bone in its own frame.

    canals: vessels in the bone, dark lines that are not fractures. arch_y_mm: from here back the cortex is thick.
    landmarks: points where fractures run, for the left half; mirror x for the right.
    """

    parts: tuple[Part, ...]
    canals: tuple[Solid, ...] = ()
    arch_y_mm: float = 0.0
    landmarks: dict[str, Float64Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Mean measures of one vertebra, mm; widths and depths are half of the whole.

    canal_width, canal_depth: half width and whole depth of the spinal canal. transverse: x of the tip of the
    transverse process. spinous: length behind the canal. droop: how far its tip lies below its root.
    """

    width: float
    depth: float
    height: float
    canal_width: float
    canal_depth: float
    transverse: float
    spinous: float
    droop: float
    disc: float  # height of the disc below


SIZES = {
    "C2": Size(
        width=9.4, depth=7.8, height=8.5, canal_width=11.8, canal_depth=17, transverse=27, spinous=17, droop=5, disc=4.5
    ),
    "C3": Size(
        width=9.6, depth=7.8, height=6.3, canal_width=11.6, canal_depth=15, transverse=26, spinous=14, droop=5, disc=4.5
    ),
    "C4": Size(
        width=9.9, depth=7.9, height=6.2, canal_width=12.0, canal_depth=15, transverse=27, spinous=14, droop=5, disc=4.7
    ),
    "C5": Size(
        width=10.4,
        depth=8.0,
        height=6.2,
        canal_width=12.3,
        canal_depth=15,
        transverse=28,
        spinous=17,
        droop=6,
        disc=5.0,
    ),
    "C6": Size(
        width=11.2,
        depth=8.3,
        height=6.3,
        canal_width=12.5,
        canal_depth=15,
        transverse=29.5,
        spinous=25,
        droop=8,
        disc=5.2,
    ),
    "C7": Size(
        width=12.2,
        depth=8.5,
        height=7.1,
        canal_width=12.0,
        canal_depth=15,
        transverse=34,
        spinous=33,
        droop=12,
        disc=4.8,
    ),
    "T1": Size(
        width=13.2,
        depth=8.8,
        height=8.0,
        canal_width=10.5,
        canal_depth=15,
        transverse=37,
        spinous=34,
        droop=16,
        disc=4.4,
    ),
    "T2": Size(
        width=13.2,
        depth=9.4,
        height=8.6,
        canal_width=9.0,
        canal_depth=15,
        transverse=35,
        spinous=33,
        droop=20,
        disc=4.2,
    ),
    "T3": Size(
        width=13.0,
        depth=10.0,
        height=9.0,
        canal_width=8.7,
        canal_depth=15,
        transverse=33,
        spinous=33,
        droop=24,
        disc=4.2,
    ),
}

FACET_TILT_DEG = {"C2": 38.0, "C3": 42.0, "C4": 43.0, "C5": 42.0, "C6": 40.0, "C7": 34.0, "T1": 26.0, "T2": 20.0}


def typical_vertebra(name: str, size: Size, jitter: Jitter, osteophytes: list[Point]) -> Shape:
    """C3..C7 and T1..T3: body, pedicles, articular pillars, laminae, spinous and transverse processes.

    osteophytes: points `(u, v, sign)` at the rims of the endplates, -1..1 across the body; sign +1 is the upper one.
    """
    cervical = name.startswith("C")
    body = VertebralBody(
        to_local=local_frame((0, 0, 0)),
        half_mm=(size.width, size.depth, size.height),
        uncinate_mm=4.4 * jitter(0.2) if cervical else 0.0,
        lip_mm=(1.8 if cervical else 0.4) * jitter(0.3),
    )
    parts = [Part(solid=body)]
    for u, v, sign in osteophytes:
        rim = np.array([u * size.width * 0.96, v * size.depth * 0.96, sign * (size.height - 0.6)])
        parts.append(Part(solid=ellipsoid(rim, (2.4, 2.2, 1.3)), blend_mm=2.0))
    for side in (1, -1):
        parts += _half_arch(name, size, side, jitter)
    parts += _spinous(name, size, jitter)
    canal_y = size.depth + size.canal_depth / 2
    hole = capsule((0, canal_y, -14), (0, canal_y, 14), size.canal_depth * 0.40)
    parts.append(Part(solid=hole, blend_mm=2.0, cut=True))
    if cervical:
        parts += _transverse_foramina(name, size, jitter)
    back = size.depth + size.canal_depth
    pillar = _pillar_centre(size)
    landmarks = {
        "body": np.zeros(3),
        "pedicle": np.array([(size.width * 0.7 + pillar[0]) / 2, size.depth + 1.5, 0.5]),
        "facet": pillar,
        "lamina": np.array([pillar[0] * 0.55, back - 1.5, -2.0]),
        "spinous": np.array([0, back + size.spinous * 0.45, -2 - size.droop * 0.5]),
        "transverse": np.array([size.transverse - 6.5, 5.0 if name != "C7" else 9.0, -2.0]),
    }
    return Shape(parts=tuple(parts), canals=_basivertebral(size), arch_y_mm=size.depth, landmarks=landmarks)


def _pillar_centre(size: Size) -> Float64Array:
    return np.array([size.canal_width + 5.6, size.depth + 6.2, -0.5])


def _half_arch(name: str, size: Size, side: int, jitter: Jitter) -> list[Part]:
    x, y, z = _pillar_centre(size)
    cervical = name.startswith("C")
    tilt = np.deg2rad(FACET_TILT_DEG.get(name, 20.0))
    pillar = facet_column(
        (side * x, y, z),
        half_mm=(6.0 * jitter(0.08), 5.6 * jitter(0.08), size.height + size.disc / 2 + 1.6),
        tilt=float(tilt),
    )
    back = size.depth + size.canal_depth
    pedicle = plate(
        (side * size.width * 0.72, size.depth * 0.62, 0.8),
        (side * (x - 1.5), y - 1.5, 0.3),
        up=(0, 0, 1),
        half_up_mm=1.6 if cervical else 2.8,
        half_thick_mm=0.2,
        radius_mm=2.3 * jitter(0.08),
    )
    lamina = plate(
        (side * (x - 3.0), y + 4.6, -1.5),
        (side * 1.2, back + 2.4, -3.0),
        up=(0, 0.22, -1),
        half_up_mm=4.6 * jitter(0.08),
        half_thick_mm=0.4,
        radius_mm=1.5 * jitter(0.1),
    )
    parts = [Part(solid=pillar), Part(solid=pedicle, blend_mm=2.5), Part(solid=lamina, blend_mm=2.5)]
    if not cervical:
        tip = (side * size.transverse, y + 12, 3.0)
        parts.append(Part(solid=capsule((side * (x - 1), y + 1, 1), tip, 3.6, 4.2)))
    return parts


def facet_column(centre: Point, *, half_mm: tuple[float, float, float], tilt: float) -> Solid:
    """An articular pillar: walls upright, upper and lower face sloping down to the back by `tilt` radians."""
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, np.sin(tilt), np.cos(tilt)]])
    rounding = 2.6
    return RoundedBox(
        to_local=local_frame(centre, rows),
        half_mm=(half_mm[0] - rounding, half_mm[1] - rounding, half_mm[2] * float(np.cos(tilt)) - rounding),
        radius_mm=rounding,
    )


def _spinous(name: str, size: Size, jitter: Jitter) -> list[Part]:
    back = size.depth + size.canal_depth
    length = size.spinous * jitter(0.08)
    root, tip = (0, back + 1.0, -2.5), (0, back + length, -2.5 - size.droop * jitter(0.15))
    thick = 1.4 if name != "C7" else 1.8
    parts = [
        Part(
            solid=plate(
                root, tip, up=(0, 0, 1), half_up_mm=2.8 * jitter(0.1), half_thick_mm=0.2, radius_mm=thick, taper=-0.012
            )
        )
    ]
    if name in ("C3", "C4", "C5", "C6"):
        for side in (1, -1):
            horn = (side * 4.2 * jitter(0.2), tip[1] + 4.0 * jitter(0.25), tip[2] - 1.5)
            parts.append(Part(solid=capsule((0, tip[1] - 1, tip[2]), horn, 2.6, 2.1)))
        parts.append(Part(solid=ellipsoid(tip, (2.6, 3.6, 4.6)), blend_mm=2.5))
    else:
        parts.append(Part(solid=ellipsoid(tip, (3.4, 4.6, 6.0)), blend_mm=3.0))
    return parts


def _transverse_foramina(name: str, size: Size, jitter: Jitter) -> list[Part]:
    parts = []
    x, y, _ = _pillar_centre(size)
    for side in (1, -1):
        tip_x = size.transverse * jitter(0.05)
        front = (side * (tip_x - (4.5 if name != "C7" else 9.5)), -1.5 * jitter(0.3), -2.5)
        rear = (side * tip_x, (5.5 if name != "C7" else 11.0), -3.5)
        strength = 1.8 if name != "C6" else 2.2
        thin = strength if name != "C7" else 1.3
        parts += [
            Part(solid=capsule((side * size.width * 0.8, -1.0, -1.0), front, thin, thin + 0.3)),
            Part(solid=capsule((side * (x - 1), y - 3.0, -0.5), rear, strength if name != "C7" else 3.4, 2.1)),
            Part(solid=capsule(front, (rear[0] - side * 2, rear[1] - 1.0, -3.0), 1.5)),
        ]
        if name == "C6":  # Chassaignac's tubercle
            parts.append(Part(solid=ellipsoid(front, (2.8, 2.8, 3.2))))
        radius = (2.9 if name != "C7" else 1.8) * jitter(0.12)
        centre_x = side * (size.width + (4.6 if name != "C7" else 7.2))
        foramen = capsule((centre_x, 2.6, -12), (centre_x, 2.6, 12), radius)
        parts.append(Part(solid=foramen, blend_mm=0.6, cut=True))
    return parts


def _basivertebral(size: Size) -> tuple[Solid, ...]:
    root = (0.0, size.depth + 0.5, 0.0)
    return (
        capsule(root, (0.0, size.depth * 0.25, 0.2), 1.0, 0.6),
        capsule((0.0, size.depth * 0.3, 0.2), (3.0, -size.depth * 0.1, 0.4), 0.6, 0.4),
        capsule((0.0, size.depth * 0.3, 0.2), (-3.0, -size.depth * 0.1, 0.0), 0.6, 0.4),
    )


def axis(jitter: Jitter, dens_tilt_deg: float) -> Shape:
    """C2: body, dens, superior facets, pars, pillars, laminae, heavy bifid spinous process. Origin: its body."""
    size = SIZES["C2"]
    body = VertebralBody(
        to_local=local_frame((0, 0, -0.5)),
        half_mm=(size.width, size.depth, size.height),
        uncinate_mm=0.0,
        lip_mm=2.2 * jitter(0.25),
    )
    lean = np.tan(np.deg2rad(dens_tilt_deg))
    dens_base, waist = np.array([0, 0.2, 4.0]), np.array([0, 0.4 + 8 * lean, 13.0])
    dens_tip = np.array([0, 0.8 + 17 * lean, 21.5 * jitter(0.04)])
    parts = [Part(solid=body)]
    parts.append(Part(solid=capsule(dens_base, waist, 5.9, 4.8), blend_mm=4.0))
    parts.append(Part(solid=capsule(waist, dens_tip, 4.8, 4.4), blend_mm=2.0))
    for side in (1, -1):
        tilt = np.deg2rad(22.0)
        rows = np.array(
            [
                [np.cos(tilt), 0, -side * np.sin(tilt)],
                [0, 1, 0],
                [side * np.sin(tilt), 0, np.cos(tilt)],
            ]
        )
        parts.append(Part(solid=ellipsoid((side * 14.2, 1.5, 3.8), (8.2 * jitter(0.05), 8.4, 5.4), rows), blend_mm=4.0))
        pillar = facet_column((side * 17.5, 14.5, -6.5), half_mm=(5.8, 5.4, 7.6), tilt=float(np.deg2rad(38)))
        parts.append(Part(solid=pillar))
        parts.append(
            Part(
                solid=plate(
                    (side * 14, 4, 2),
                    (side * 17, 13, -4),
                    up=(0, 0.5, 1),
                    half_up_mm=2.6,
                    half_thick_mm=1.2,
                    radius_mm=2.6,
                )
            )
        )
        parts.append(
            Part(
                solid=plate(
                    (side * 16, 17.5, -4.5),
                    (side * 1.5, 28.5, -5.5),
                    up=(0, 0.2, -1),
                    half_up_mm=4.4,
                    half_thick_mm=0.9,
                    radius_mm=2.0 * jitter(0.08),
                )
            )
        )
        tip = (side * size.transverse * jitter(0.05), 6.5, -6.0)
        parts.append(Part(solid=capsule((side * 18, 10, -3), tip, 2.4, 2.2)))
        parts.append(Part(solid=capsule((side * 9, 0, -6), tip, 2.0, 2.0)))
        foramen = capsule((side * 17.2, 4.6, -16), (side * 18.5, 4.2, 1.5), 2.8 * jitter(0.1))
        parts.append(Part(solid=foramen, blend_mm=0.6, cut=True))
        horn = (side * 5.0 * jitter(0.15), 45.0 * jitter(0.04), -11.5)
        parts.append(Part(solid=capsule((0, 37, -8.5), horn, 3.4, 2.8)))
    parts.append(
        Part(solid=plate((0, 27, -5.5), (0, 40, -9.5), up=(0, 0, 1), half_up_mm=3.4, half_thick_mm=0.6, radius_mm=2.4))
    )
    parts.append(Part(solid=capsule((0, 16.4, -16), (0, 16.4, 12), 7.8), blend_mm=2.0, cut=True))
    landmarks = {
        "body": np.array([0, 0, -1.0]),
        "dens": np.array([0, 0.3, 9.0]),
        "pedicle": np.array([16.0, 9.5, -1.5]),
        "facet": np.array([17.5, 14.5, -6.5]),
        "lamina": np.array([9.5, 23.0, -5.0]),
        "spinous": np.array([0, 35.0, -8.0]),
        "transverse": np.array([22.5, 7.5, -5.0]),
    }
    return Shape(parts=tuple(parts), canals=_basivertebral(size), arch_y_mm=size.depth, landmarks=landmarks)


def atlas(jitter: Jitter) -> Shape:
    """C1: anterior arch with tubercle, lateral masses, posterior arch, transverse processes. Origin: the dens."""
    parts = []
    back = 30.5 * jitter(0.04)
    for side in (1, -1):
        yaw = np.deg2rad(side * 18.0)
        lean = np.deg2rad(side * 14.0)  # the lower face looks down and inwards
        flat = np.array(
            [[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [np.sin(lean), 0, np.cos(lean)]]
        )
        mass = RoundedBox(
            to_local=local_frame((side * 17.0, 0.5, 0.0), flat),
            half_mm=(2.8 * jitter(0.06), 5.0 * jitter(0.05), 3.7),
            radius_mm=3.6,
        )
        parts.append(Part(solid=mass))
        front = [(side * 15.0, -6.0, 0.0), (side * 8.5, -9.4, 0.3), (0.0, -10.6, 0.5)]
        parts += [Part(solid=rod, blend_mm=0.7) for rod in chain(front, [3.6, 2.8, 3.0])]
        rear = [
            (side * 18.0, 7.0, -0.5),
            (side * 20.0, 14.5, 0.0),
            (side * 15.0, 24.0, -0.5),
            (side * 7.0, back - 1.0, -1.0),
            (0.0, back, -1.0),
        ]
        parts += [Part(solid=rod, blend_mm=0.7) for rod in chain(rear, [3.2, 2.5, 2.8, 3.2, 3.2])]
        tip = (side * 37.0 * jitter(0.06), 4.5, -2.0)
        parts.append(Part(solid=capsule((side * 22, -1.5, -1), tip, 2.3, 2.6)))
        parts.append(Part(solid=capsule((side * 20, 8.5, -1), tip, 2.3, 3.0)))
        foramen = capsule((side * 27.6, 3.4, -9), (side * 27.6, 3.4, 9), 3.1 * jitter(0.1))
        parts.append(Part(solid=foramen, blend_mm=0.6, cut=True))
        socket = ellipsoid((side * 17.0, 0.5, 12.5), (6.5, 10.5, 7.5))
        parts.append(Part(solid=socket, blend_mm=0.8, cut=True))
    parts.append(Part(solid=ellipsoid((0, -11.2, 0.0), (6.5, 3.2, 5.6)), blend_mm=2.0))
    parts.append(Part(solid=ellipsoid((0, back + 1.0, -1.0), (6.0, 3.6, 4.8)), blend_mm=2.0))
    landmarks = {
        "ring_front": np.array([7.0, -9.8, 0.2]),
        "ring_back": np.array([17.5, 19.5, -0.2]),
        "facet": np.array([17.2, 0.5, 0.0]),
        "transverse": np.array([31.0, 4.0, -1.5]),
    }
    return Shape(parts=tuple(parts), arch_y_mm=-30.0, landmarks=landmarks)


def occiput(jitter: Jitter) -> Shape:
    """The rim of the foramen magnum with both condyles, in the frame of C1. The skull around it is painted tissue."""
    parts = []
    for side in (1, -1):
        yaw = np.deg2rad(side * 25.0)
        rows = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        parts.append(Part(solid=ellipsoid((side * 16.5, 1.0, 11.0), (5.4, 10.5 * jitter(0.06), 6.0), rows)))
        rim = [
            (0.0, -5.5, 13.5),
            (side * 12.0, 0.5, 14.5),
            (side * 17.5, 12.0, 14.5),
            (side * 13.0, 26.0, 13.5),
            (0.0, 32.0, 13.0),
        ]
        parts += [Part(solid=rod, blend_mm=2.5) for rod in chain(rim, [3.5, 3.8, 3.2, 2.8, 2.8])]
    clivus = plate((0, -6.0, 14.0), (0, -22.0, 38.0), up=(1, 0, 0), half_up_mm=8.0, half_thick_mm=1.0, radius_mm=2.8)
    parts.append(Part(solid=clivus, blend_mm=3.0))
    return Shape(parts=tuple(parts), arch_y_mm=-30.0)
