"""Head and shoulders around the neck: skull base, jaws with teeth, face, ribs, clavicles, lung tops.

Head: in its own frame, origin at the axis of the dens in the ring of C1, x left, y back, z up, mm. Shoulders: from the
middle of the body of T1.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from model.phantom.bones import Jitter
from model.phantom.solids import Float64Array, Placeable, Point, Station, capsule, chain, ellipsoid, loft, placed, plate
from model.phantom.tissues import Paint, Palette, Spine

Layers = tuple[tuple[float, float], ...]
Brush = Callable[..., Paint]


def _brush(frame: Float64Array) -> Brush:
    def paint(*solids: Placeable, layers: Layers, flesh: bool = False, smooth: bool = False) -> Paint:
        carried = tuple(placed(solid, frame) for solid in solids)
        return Paint(solids=carried, layers=layers, blend_mm=2.0, flesh=flesh, smooth=smooth)

    return paint


def cranium(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Skull with brain, petrous bones, mastoids, styloids (the left one is long), foramen magnum, sphenoid."""
    paint = _brush(spine.frames["head"])
    table = 1150 * jitter(0.1)
    scalp = ellipsoid((0, 8, 70), (75, 88, 62))
    paints = [
        paint(scalp, layers=((0.0, hu.muscle - 6),), flesh=True, smooth=True),
        paint(
            ellipsoid((0, 12, 70), (70, 80, 57)),
            layers=((0.0, table), (1.6, 480.0), (4.4, table), (6.0, 36.0)),
            smooth=True,
        ),
        paint(ellipsoid((0, 88, 30), (8, 6, 8)), layers=((0.0, table), (2.5, 600.0))),
        paint(
            plate((0, 34, 13.5), (0, 84, 30), up=(1, 0, 0), half_up_mm=2, half_thick_mm=0, radius_mm=3.0),
            layers=((0.0, table),),
        ),
    ]
    for side in (1, -1):
        paints += _temporal_bone(paint, side, jitter)
    paints.append(paint(capsule((0, 13, 4), (0, 13, 22), 13.0), layers=((0.0, hu.csf),)))
    paints.append(paint(ellipsoid((0, -32, 40), (19, 15, 13)), layers=((0.0, 800.0), (1.8, -950.0))))
    return paints


def _temporal_bone(paint: Brush, side: int, jitter: Jitter) -> list[Paint]:
    turn = np.deg2rad(side * 40.0)
    rows = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    mastoid = ellipsoid((side * 54, 12, 9), (10, 14, 19 * jitter(0.1)))
    paints = [
        paint(ellipsoid((side * 33, -2, 24), (25, 9, 10), rows), layers=((0.0, 1250.0), (2.5, 750.0))),
        paint(mastoid, layers=((0.0, 900.0), (1.6, 330.0))),
    ]
    cells = (
        (-6, 8, 3.2),
        (3, 4, 3.6),
        (-2, -3, 3.0),
        (6, 13, 3.4),
        (-3, 15, 3.0),
        (2, -9, 2.4),
        (-8, 2, 2.2),
        (8, 6, 2.2),
    )
    for dy, dz, radius in cells:
        centre = (side * (54 + dy * 0.35), 12 + dy, 9 + dz)
        paints.append(paint(ellipsoid(centre, (radius, radius, radius * 1.1)), layers=((0.0, -820.0),)))
    reach = 32.0 if side > 0 else 16.0
    tip = (side * (38 - reach * 0.12), -6 - reach * 0.5, 4 - reach * 0.85)
    paints.append(paint(capsule((side * 39, -5, 6), tip, 2.3, 1.6), layers=((0.0, 900.0),)))
    paints.append(paint(capsule((side * 82, 0, 20), (side * 52, -2, 21), 3.0), layers=((0.0, -980.0),)))
    return paints


def face(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Mandible, maxilla, teeth, tongue, chewing muscles, glands, nose and sinuses."""
    paint = _brush(spine.frames["head"])
    flesh = ((0.0, hu.muscle + 4),)
    cheeks = loft(
        [
            Station(x=0, y=-56, z=-48, radius_x=32, radius_y=32),
            Station(x=0, y=-50, z=-30, radius_x=50, radius_y=49),
            Station(x=0, y=-44, z=-5, radius_x=59, radius_y=58),
            Station(x=0, y=-42, z=45, radius_x=60, radius_y=60),
        ]
    )
    paints = [
        paint(*cheeks, layers=((0.0, hu.muscle), (8.0, hu.fat + 30)), flesh=True, smooth=True),
        paint(ellipsoid((0, -60, -14), (27, 32, 21)), ellipsoid((0, -60, -36), (25, 28, 10)), layers=flesh),
        paint(ellipsoid((0, -24, -8), (26, 9, 34)), layers=((0.0, hu.muscle),)),
    ]
    for side in (1, -1):
        paints += [
            paint(ellipsoid((side * 56, -38, -12), (8 * jitter(0.1), 17, 27)), layers=flesh, flesh=True),
            paint(ellipsoid((side * 36, -28, -4), (9, 13, 19)), layers=flesh),
            paint(
                ellipsoid((side * 58, -10, -4), (12, 13 * jitter(0.1), 23)), layers=((0.0, hu.gland - 32),), flesh=True
            ),
            paint(
                ellipsoid((side * 29, -42, -44), (9, 14 * jitter(0.1), 11)), layers=((0.0, hu.gland + 12),), flesh=True
            ),
        ]
    paints += _jaws(paint, jitter)
    for side in (1, -1):
        sinus = ellipsoid((side * 28, -66, 28), (14, 17, 15))
        arch = [(side * 48, -72, 20), (side * 64, -52, 20), (side * 69, -25, 19), (side * 64, -5, 20)]
        paints += [
            paint(sinus, layers=((0.0, 480.0), (1.3, -960.0))),
            paint(ellipsoid((side * 6.5, -72, 24), (4.6, 32, 17)), layers=((0.0, 60.0), (0.8, -960.0))),
            paint(ellipsoid((side * 7.5, -72, 18), (2.6, 22, 5)), layers=((0.0, 50.0),)),
            paint(*chain(arch, [5, 3.5, 2.8, 3]), layers=((0.0, 950.0), (1.8, 350.0))),
        ]
    paints.append(paint(ellipsoid((0, -30, 13), (12, 11, 16)), layers=((0.0, -985.0),)))
    return paints


def _arch(half_width: float, back: float, depth: float, z: float, rise: float, count: int) -> list[Point]:
    """Points along a jaw from right to left; its ends lie `rise` above the chin."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, count)
    return [(half_width * np.sin(a), back - depth * np.cos(a), z + rise * np.sin(a) ** 2) for a in angles]


def _jaws(paint: Brush, jitter: Jitter) -> list[Paint]:
    lower_arch, upper_arch = _arch(46, -34, 58, -37, 9, 11), _arch(30, -48, 45, 0, 0, 9)
    lower: list[Placeable] = [
        plate(start, end, up=(0, 0, 1), half_up_mm=9.0, half_thick_mm=0.5, radius_mm=4.4)
        for start, end in pairwise(lower_arch)
    ]
    upper: list[Placeable] = [
        plate(start, end, up=(0, 0, 1), half_up_mm=4.0, half_thick_mm=0.5, radius_mm=4.0)
        for start, end in pairwise(upper_arch)
    ]
    for side in (1, -1):
        top, angle = (side * 51, -17, 6), (side * 46.5, -28, -28)
        lower.append(plate(top, angle, up=(0, 1, 0), half_up_mm=11, half_thick_mm=0, radius_mm=3.4))
        lower.append(ellipsoid((side * 51, -12, 12), (9, 4.5, 5)))
    upper.append(plate((0, -88, 7), (0, -44, 8), up=(1, 0, 0), half_up_mm=24, half_thick_mm=0, radius_mm=1.7))
    upper.append(plate((0, -80, 12), (0, -48, 30), up=(0, -0.3, 1), half_up_mm=8, half_thick_mm=0, radius_mm=0.9))
    paints = [
        paint(*lower, layers=((0.0, 1250 * jitter(0.08)), (2.2, 300.0))),
        paint(*upper, layers=((0.0, 1000.0), (1.6, 450.0))),
    ]
    for height, narrow in ((-20.0, 0.0), (-9.0, 2.0)):
        teeth = [
            ellipsoid(((32 - narrow) * np.sin(a), -52 - 39 * np.cos(a), height + jitter(0.04) - 1), (3.3, 3.5, 9.0))
            for a in np.deg2rad(np.linspace(-84, 84, 14))
        ]
        for tooth in teeth:
            paints.append(paint(tooth, layers=((0.0, 1500.0), (1.0, 1900.0 * jitter(0.1)))))
    return paints


def shoulders(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Chest wall, lung tops, first ribs, breastbone, clavicles, shoulder blades and humeral heads."""
    frame = np.eye(4)
    frame[:3, 3] = spine.frames["T1"][:3, 3]
    paint = _brush(frame)
    bone = ((0.0, 880 * jitter(0.1)), (1.8, 230.0))
    paints = [
        paint(ellipsoid((0, -18, -95), (92, 70, 90)), layers=((0.0, hu.muscle - 10),), flesh=True, smooth=True),
        paint(ellipsoid((0, -58, -48), (20, 6, 24)), layers=bone),
    ]
    for side in (1, -1):
        lung = ellipsoid((side * 41, -2, -80), (36, 46, 63 * jitter(0.06)))
        blade = plate(
            (side * 78, 58, -38), (side * 132, 28, -30), up=(0, 0, 1), half_up_mm=26, half_thick_mm=0, radius_mm=2
        )
        ridge = chain([(side * 80, 62, -22), (side * 120, 48, -6), (side * 156, 14, 0)], [4, 5, 7])
        paints += [
            paint(lung, layers=((0.0, 20.0), (1.5, -840.0 * jitter(0.03)))),
            paint(blade, *ridge, layers=bone),
            paint(ellipsoid((side * 170, 4, -30), (24, 25, 25)), layers=((0.0, 700.0), (1.8, 240.0))),
        ]
        first = [(30, 16, 2), (46, 8, -3), (56, -10, -10), (50, -34, -20), (26, -54, -30)]
        second = [(30, 18, -18), (52, 22, -20), (72, 2, -30), (68, -30, -44), (24, -58, -56)]
        collar = [(16, -58, -24), (50, -62, -12), (90, -44, -2), (148, -8, 2)]
        for points, radii in ((first, [3.6, 3.8, 4, 4, 3.6]), (second, [3.6] * 5), (collar, [8, 5.5, 5, 6])):
            paints.append(paint(*chain([(side * x, y, z) for x, y, z in points], radii), layers=bone))
    return paints
