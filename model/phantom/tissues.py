"""Everything around the spine, as layers of paint: outline, muscles, vessels, airway, canal, discs, table.

Painted in order, later over earlier. Positions are mm from the middle of a level's body (x left, y back),
so that soft tissue follows the curve of the spine. Head and shoulders are in `regions`.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from model.phantom.bones import SIZES, Jitter
from model.phantom.solids import (
    Float64Array,
    Placeable,
    RoundedBox,
    Solid,
    Station,
    chain,
    ellipsoid,
    local_frame,
    loft,
    placed,
    plate,
)

Frames = dict[str, Float64Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class Paint:
    """A tissue in the patient frame: the union of solids, with Hounsfield units by depth.

    layers: `(depth_mm, hu)`, from the surface inwards. flesh: it ends under the skin, wherever its solids reach.
    smooth: large and free of detail, so that its distance may be sampled coarsely.
    """

    solids: tuple[Solid, ...]
    layers: tuple[tuple[float, float], ...]
    blend_mm: float = 1.0
    flesh: bool = False
    smooth: bool = False

    @cached_property
    def corners_mm(self) -> Float64Array:
        """Float64 `(n, 3)` in the patient frame."""
        return np.concatenate([solid.corners_mm for solid in self.solids])


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Hounsfield units of the soft tissues of one patient."""

    muscle: float
    fat: float
    skin: float
    blood: float
    cord: float
    csf: float
    disc: float
    gland: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Spine:
    """Where soft tissue hangs: heights and middles of the vertebral bodies, C1 to T3, in the patient frame."""

    frames: Frames

    def station(
        self, level: str, dx: float, dy: float, radius_x: float, radius_y: float, turn_deg: float = 0.0, dz: float = 0.0
    ) -> Station:
        """An ellipse at (dx, dy) from the middle of a body, dz above it."""
        x, y, z = self.frames[level][:3, 3]
        return Station(x=x + dx, y=y + dy, z=z + dz, radius_x=radius_x, radius_y=radius_y, turn_deg=turn_deg)


def palette(jitter: Jitter, rng: np.random.Generator, variation: float) -> Palette:
    """Units of one patient; about a third of patients have contrast medium in their vessels."""
    contrast = variation > 0 and rng.random() < 0.35
    enhanced = float(rng.uniform(140, 320))
    return Palette(
        muscle=54 * jitter(0.10),
        fat=-98 * jitter(0.07),
        skin=25.0,
        blood=enhanced if contrast else 46 * jitter(0.08),
        cord=40 * jitter(0.08),
        csf=14 * jitter(0.2),
        disc=88 * jitter(0.15),
        gland=38 * jitter(0.15),
    )


def outline(spine: Spine, hu: Palette, jitter: Jitter) -> Paint:
    """Skin, fat under it, and loose fat inside, of neck, shoulders, cranium and face in one."""
    at, stout = spine.station, jitter(0.05)
    rows = [
        ("C1", 12, 62, 66, 14), ("C2", 11, 60, 65, 0), ("C3", 10, 59, 64, 0), ("C4", 9, 58, 64, 0),
        ("C5", 9, 59, 64, 0), ("C6", 11, 66, 68, 0), ("C7", 12, 86, 74, 0), ("T1", 10, 122, 80, 0),
        ("T2", 3, 164, 89, 0), ("T3", -4, 192, 98, 0), ("T3", -9, 208, 105, -30), ("T3", -12, 214, 110, -120),
    ]  # fmt: skip
    neck = loft([at(level, 0, dy, rx * stout, ry * stout, dz=dz) for level, dy, rx, ry, dz in rows])
    chin = [
        (-60, -50, 16, 20),
        (-50, -55, 40, 40),
        (-35, -52, 55, 54),
        (-10, -44, 65, 64),
        (30, -40, 67, 66),
        (75, -36, 66, 68),
    ]
    head: list[Placeable] = [
        ellipsoid((0, 4, 68), (77, 96, 80)),
        *loft([Station(x=0, y=y, z=z, radius_x=rx, radius_y=ry) for z, y, rx, ry in chin]),
        ellipsoid((0, -110, 20), (13, 14, 20)),
        *(ellipsoid((side * 69, 6, 18), (8, 11, 26)) for side in (1, -1)),
    ]
    frame = spine.frames["head"]
    return Paint(
        solids=(*neck, *(placed(solid, frame) for solid in head)),
        layers=((0.0, hu.skin), (2.0, hu.fat), (10.0, hu.fat + 25), (17.0, hu.fat + 70)),
        blend_mm=9.0,
        smooth=True,
    )


def table(spine: Spine) -> Paint:
    """The table under the patient: a shell with foam in it."""
    x, y, z = spine.frames["T1"][:3, 3]
    board = RoundedBox(to_local=local_frame((x, y + 118, z)), half_mm=(205, 5, 400), radius_mm=4)
    return Paint(solids=(board,), layers=((0.0, -180.0), (2.0, -930.0)))


Row = tuple[str, float, float, float, float, float]
"""level, dx, dy, radius_x, radius_y, turn in degrees, for the left side."""

_MUSCLES: dict[str, tuple[Row, ...]] = {
    "longus colli": (
        ("C1", 4, -15, 5, 3, 0), ("C3", 8, -11, 6, 3.4, 15), ("C6", 9, -11, 6, 3.6, 15), ("T3", 7, -13, 4, 3, 0),
    ),
    "sternocleidomastoid": (
        ("C1", 57, 8, 7, 15, 0), ("C3", 52, -8, 6.5, 19, -18), ("C5", 44, -23, 6.5, 18, -38),
        ("C7", 29, -37, 6, 14, -55), ("T1", 20, -45, 5, 11, -70), ("T2", 16, -54, 4, 8, -80),
    ),
    "levator scapulae": (
        ("C1", 30, 8, 5, 7, 0), ("C3", 37, 14, 7, 11, -20), ("C5", 41, 19, 8, 13, -20), ("C7", 52, 26, 9, 12, -30),
        ("T2", 72, 34, 9, 11, -30),
    ),
    "scalenes": (
        ("C3", 24, 0, 4, 5, 0), ("C5", 28, -2, 7, 8, 0), ("C6", 31, -3, 9, 10, -10), ("C7", 37, -4, 11, 12, -10),
        ("T1", 46, -8, 12, 12, -20), ("T2", 52, -12, 8, 8, 0),
    ),
    "semispinalis": (
        ("C1", 16, 46, 13, 9, -10), ("C3", 13, 42, 10.5, 9, 0), ("C5", 12.5, 42, 9.5, 10, 0),
        ("C7", 14, 46, 9, 9, 0), ("T3", 14, 40, 9, 10, 0),
    ),
    "multifidus": (
        ("C2", 12, 33, 10, 7, 0), ("C4", 12, 29, 10.5, 7, 0), ("C6", 13, 31, 11, 8, 0), ("T1", 15, 30, 12, 10, 0),
        ("T3", 16, 26, 13, 10, 0),
    ),
    "splenius": (
        ("C1", 38, 40, 17, 6, -38), ("C3", 29, 45, 17, 5.5, -32), ("C5", 24, 50, 15, 4.5, -25),
        ("C7", 18, 58, 12, 4, -20), ("T2", 10, 57, 6, 3, 0),
    ),
    "trapezius": (
        ("C1", 18, 60, 13, 2.6, -20), ("C3", 24, 59, 20, 3.2, -28), ("C5", 30, 58, 26, 4, -28),
        ("C7", 44, 55, 40, 6, -20), ("T1", 60, 49, 52, 8, -12), ("T3", 66, 52, 56, 6, -6),
    ),
    "shoulder": (
        ("C7", 76, 20, 5, 6, 0), ("T1", 92, 16, 24, 15, 0), ("T2", 112, 8, 42, 24, 0), ("T3", 126, 0, 52, 36, 0),
    ),
    "chest": (
        ("T1", 40, -38, 14, 5, 20), ("T2", 70, -50, 45, 10, 10), ("T3", 90, -62, 70, 16, 10),
    ),
    "strap muscles": (
        ("C4", 9, -38, 8, 3, 20), ("C6", 11, -40, 10, 2.6, 25), ("T1", 9, -46, 10, 2.6, 15),
        ("T2", 8, -54, 8, 2.4, 0),
    ),
}  # fmt: skip


def muscles(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """The muscles of the neck with fat planes between them, each side drawn anew."""
    bulk = [
        spine.station(level, 0, dy, rx, ry)
        for level, dy, rx, ry in (
            ("C1", 10, 24, 22),
            ("C2", 11, 25, 22),
            ("C4", 11, 25, 20),
            ("C6", 11, 27, 20),
            ("T1", 11, 30, 20),
            ("T3", 11, 28, 22),
        )
    ]
    paints = [Paint(solids=tuple(loft(bulk)), layers=((0.0, hu.muscle - 4),), flesh=True)]
    for rows in _MUSCLES.values():
        for side in (1, -1):
            girth, out = 1.25 * jitter(0.10), jitter(0.03)
            stations = [
                spine.station(level, side * dx * out, dy, rx * girth, ry * girth, side * turn)
                for level, dx, dy, rx, ry, turn in rows
            ]
            top = stations[0]
            cap = replace(top, z=top.z + 12, radius_x=top.radius_x * 0.3, radius_y=top.radius_y * 0.3)
            belly = tuple(loft([cap, *stations]))
            paints.append(Paint(solids=belly, layers=((0.0, hu.muscle * jitter(0.04)),), flesh=True))
    return paints


def vessels(spine: Spine, hu: Palette, jitter: Jitter, rng: np.random.Generator, variation: float) -> list[Paint]:
    """Carotid, jugular and vertebral vessels; the right jugular vein is the wider one. Plaques on some carotids."""
    paints = []
    for side, vein_radius in ((1, 4.4), (-1, 7.2)):
        artery = [
            ("C1", 26, -12, 2.8),
            ("C3", 25, -17, 3.0),
            ("C4", 25, -20, 4.2),
            ("C6", 21, -22, 3.5),
            ("T3", 13, -32, 3.8),
        ]
        vein = [
            ("C1", 29, -6, 0.7),
            ("C3", 32, -13, 0.85),
            ("C5", 30, -19, 1.0),
            ("C7", 27, -23, 1.1),
            ("T2", 20, -36, 1.2),
        ]
        wobble = jitter(0.06)
        tube = loft([spine.station(level, side * dx * wobble, dy, r, r) for level, dx, dy, r in artery])
        paints.append(Paint(solids=tuple(tube), layers=((0.0, hu.blood),)))
        wide = vein_radius * jitter(0.15)
        tube = loft(
            [spine.station(level, side * dx * wobble, dy, wide * r, wide * r * 0.8) for level, dx, dy, r in vein]
        )
        paints.append(Paint(solids=tuple(tube), layers=((0.0, hu.blood * 0.95),)))
        if rng.random() < 0.4 * variation:
            place = spine.station("C4", side * 27.5 * wobble, -21, 1, 1, dz=float(rng.uniform(-5, 6)))
            plaque = ellipsoid((place.x, place.y, place.z), (1.3, 2.6, 4.0))
            paints.append(Paint(solids=(plaque,), layers=((0.0, float(rng.uniform(350, 900))),)))
    return paints


def throat(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Pharynx, larynx, trachea, gullet, thyroid, hyoid and cartilages; a calcified node on the patient's left."""
    at = spine.station
    wall = [
        ("C2", 0, -18, 17, 11),
        ("C4", 0, -22, 19, 13),
        ("C5", 0, -28, 17, 15),
        ("C6", 0, -28, 13, 13),
        ("T3", -2, -30, 10, 10),
    ]
    air = [
        ("C1", 0, -24, 12, 8), ("C2", 0, -19.5, 11, 5.5), ("C3", 0, -20.5, 13, 6), ("C4", 0, -23, 11, 7),
        ("C5", 0, -28, 3.6, 8.5), ("C6", 0, -28, 8, 9), ("C7", -1, -28, 8.5, 8.5), ("T1", -1.5, -29, 8.8, 8),
        ("T3", -2, -30, 8.8, 8),
    ]  # fmt: skip
    paints = [
        Paint(solids=tuple(loft([at(level, dx, dy, rx, ry) for level, dx, dy, rx, ry in wall])), layers=((0.0, 52.0),))
    ]
    for side, lobe in ((1, 0.8), (-1, 1.0)):
        rows = [("C6", 15, -27, 3, 5), ("C7", 17, -26, 8, 10), ("T1", 15, -28, 5, 7)]
        stations = [at(level, side * dx, dy, rx * lobe, ry * lobe) for level, dx, dy, rx, ry in rows]
        paints.append(Paint(solids=tuple(loft(stations)), layers=((0.0, 105 * jitter(0.12)),)))
        x, y, z = spine.frames["C5"][:3, 3] + np.array([0, -28, 2.0])
        shield = plate(
            (x, y - 22, z), (x + side * 19, y + 8, z), up=(0, 0, 1), half_up_mm=11, half_thick_mm=0, radius_mm=1.6
        )
        paints.append(Paint(solids=(shield,), layers=((0.0, 190 * jitter(0.3)),)))
    x, y, z = spine.frames["C3"][:3, 3] + np.array([0, -30.0, -9.0])
    for side in (1, -1):
        horn = chain([(x, y - 14, z), (x + side * 13, y - 9, z + 1), (x + side * 20, y + 10, z + 4)], [3.4, 2.8, 2.0])
        paints.append(Paint(solids=tuple(horn), layers=((0.0, 750.0), (1.4, 250.0))))
    ring = [at("C6", 0, -28, 11, 12, dz=5), at("C6", 0, -28, 11, 12, dz=-3)]
    paints.append(Paint(solids=tuple(loft(ring)), layers=((0.0, 210.0 * jitter(0.3)), (2.4, 60.0))))
    paints.append(
        Paint(solids=tuple(loft([at(level, dx, dy, rx, ry) for level, dx, dy, rx, ry in air])), layers=((0.0, -990.0),))
    )
    gullet = [at("C6", 2, -15, 8, 3), at("C7", 4, -16, 7, 3.6), at("T3", 6, -17, 7, 4.4)]
    paints.append(Paint(solids=tuple(loft(gullet)), layers=((0.0, 40.0),)))
    node = at("C3", 37, -1, 1, 1, dz=-2)
    paints.append(
        Paint(
            solids=(ellipsoid((node.x, node.y, node.z), (5.0, 4.2, 6.0)),),
            layers=((0.0, 60.0), (1.4, 430.0 * jitter(0.15))),
        )
    )
    return paints


def canal(spine: Spine, hu: Palette) -> list[Paint]:
    """Epidural fat, thecal sac and cord through the canal, and the discs between the bodies."""
    stations = []
    for level in ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "T1", "T2", "T3"):
        size = SIZES.get(level)
        dy = 15.0 if size is None else size.depth + size.canal_depth / 2
        point = spine.frames[level] @ np.array([0, dy, 0, 1.0])
        wide, deep = (13.0, 9.5) if size is None else (size.canal_width * 0.93, size.canal_depth * 0.46)
        stations.append((point, wide, deep))
    top = spine.frames["head"] @ np.array([0, 13.0, 26.0, 1.0])
    stations.insert(0, (top, 13.0, 13.0))

    def tube(scale_x: float, scale_y: float, cap_x: float, cap_y: float) -> tuple[Solid, ...]:
        stack = [
            Station(x=p[0], y=p[1], z=p[2], radius_x=min(wide * scale_x, cap_x), radius_y=min(deep * scale_y, cap_y))
            for p, wide, deep in stations
        ]
        return tuple(loft(stack))

    paints = [
        Paint(solids=tube(1.0, 1.0, 14, 14), layers=((0.0, -35.0),)),
        Paint(solids=tube(0.86, 0.86, 12, 11), layers=((0.0, hu.csf),)),
        Paint(solids=tube(1.0, 1.0, 6.6, 4.3), layers=((0.0, hu.cord),)),
    ]
    for level in ("C2", "C3", "C4", "C5", "C6", "C7", "T1", "T2"):
        size, frame = SIZES[level], spine.frames[level]
        box = RoundedBox(
            to_local=local_frame((0, -0.4, -size.height - size.disc / 2 + 0.4)),
            half_mm=(size.width - 3.2, size.depth - 3.4, 0.2),
            radius_mm=3.6,
        )
        paints.append(Paint(solids=(placed(box, frame),), layers=((0.0, hu.disc),)))
    return paints


def throat_and_canal(
    spine: Spine, hu: Palette, jitter: Jitter, rng: np.random.Generator, variation: float
) -> tuple[Paint, ...]:
    """What lies in front of the spine and inside it, in the order of painting."""
    return (*throat(spine, hu, jitter), *vessels(spine, hu, jitter, rng, variation), *canal(spine, hu))
