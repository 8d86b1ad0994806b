"""Head and shoulders around the neck: skull base, jaws with teeth, face, ribs, clavicles, lung tops.

In the head's frame: origin at the axis of the dens in the ring of C1, x left, y back, z up, mm.
"""

import numpy as np

from model.phantom.bones import Jitter
from model.phantom.solids import Point, Solid, capsule, chain, ellipsoid, plate
from model.phantom.tissues import Paint, Palette, Spine


def cranium(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Skull with brain, petrous bones, mastoids, styloids (the left one is long), foramen magnum, sphenoid."""
    head = spine.frames["head"]

    def paint(*solids: Solid, layers: tuple[tuple[float, float], ...], smooth: bool = False) -> Paint:
        return Paint(solids=solids, layers=layers, frame=head, smooth=smooth)

    table = 1150 * jitter(0.1)
    paints = [
        paint(
            ellipsoid((0, 12, 70), (70, 80, 57)),
            layers=((0.0, table), (1.6, 480.0), (4.4, table), (6.0, 36.0)),
            smooth=True,
        ),
        paint(ellipsoid((0, 76, 33), (7, 8, 9)), layers=((0.0, table), (2.5, 600.0))),
    ]
    for side in (1, -1):
        turn = np.deg2rad(side * 40.0)
        rows = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        paints.append(paint(ellipsoid((side * 33, -2, 24), (25, 9, 10), rows), layers=((0.0, 1250.0), (2.5, 750.0))))
        paints.append(
            paint(ellipsoid((side * 53, 12, 8), (10, 14, 18 * jitter(0.1))), layers=((0.0, 900.0), (1.6, 380.0)))
        )
        for dy, dz, radius in ((-5, 8, 3.2), (3, 4, 3.6), (-2, -3, 3.0), (5, 12, 3.4), (-3, 14, 3.0), (2, -9, 2.4)):
            cell = ellipsoid((side * (53 + dy * 0.3), 12 + dy, 8 + dz), (radius, radius, radius * 1.1))
            paints.append(paint(cell, layers=((0.0, -750.0),)))
        reach = 30.0 if side > 0 else 17.0
        tip = (side * (38 - reach * 0.12), -6 - reach * 0.55, 4 - reach * 0.85)
        paints.append(paint(capsule((side * 39, -5, 5), tip, 2.3, 1.6), layers=((0.0, 900.0),)))
        paints.append(paint(capsule((side * 82, 0, 20), (side * 52, -2, 21), 3.0), layers=((0.0, -980.0),)))
    hole = capsule((0, 13, 4), (0, 13, 22), 13.0)
    paints.append(paint(hole, layers=((0.0, hu.csf),)))
    paints.append(paint(ellipsoid((0, -32, 40), (19, 15, 13)), layers=((0.0, 800.0), (1.8, -950.0))))
    return paints


def face(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Mandible, maxilla, teeth, tongue, chewing muscles, glands, nose and sinuses."""
    head = spine.frames["head"]

    def paint(*solids: Solid, layers: tuple[tuple[float, float], ...]) -> Paint:
        return Paint(solids=solids, layers=layers, frame=head, blend_mm=2.0)

    flesh = ((0.0, hu.muscle + 4),)
    paints = [
        paint(ellipsoid((0, -58, -16), (25, 31, 22)), layers=flesh),
        paint(ellipsoid((0, -58, -40), (24, 28, 7)), layers=flesh),
    ]
    for side in (1, -1):
        paints += [
            paint(ellipsoid((side * 57, -38, -12), (8 * jitter(0.1), 17, 27)), layers=flesh),
            paint(ellipsoid((side * 37, -26, -6), (8, 12, 18)), layers=flesh),
            paint(ellipsoid((side * 57, -12, -4), (12, 13 * jitter(0.1), 23)), layers=((0.0, hu.gland - 30),)),
            paint(ellipsoid((side * 29, -44, -42), (9, 14 * jitter(0.1), 11)), layers=((0.0, hu.gland + 12),)),
        ]
    paints += _jaws(spine, jitter)
    for side in (1, -1):
        sinus = ellipsoid((side * 28, -66, 28), (14, 17, 15))
        paints.append(paint(sinus, layers=((0.0, 480.0), (1.3, -960.0))))
        paints.append(paint(ellipsoid((side * 6.5, -72, 24), (4.6, 32, 17)), layers=((0.0, 60.0), (0.8, -960.0))))
        paints.append(paint(ellipsoid((side * 7.5, -72, 18), (2.6, 22, 5)), layers=((0.0, 50.0),)))
        arch = chain(
            [(side * 48, -72, 20), (side * 64, -52, 20), (side * 69, -25, 19), (side * 64, -5, 20)], [5, 3.5, 2.8, 3]
        )
        paints.append(paint(*arch, layers=((0.0, 950.0), (1.8, 350.0))))
    paints.append(paint(ellipsoid((0, -32, 14), (13, 12, 17)), layers=((0.0, -985.0),)))
    return paints


def _jaws(spine: Spine, jitter: Jitter) -> list[Paint]:
    head = spine.frames["head"]
    bone = ((0.0, 1250 * jitter(0.08)), (2.2, 300.0))
    lower: list[Solid] = []
    upper: list[Solid] = []
    for side in (1, -1):
        arch: list[Point] = [(side * 47, -34, -26), (side * 39, -60, -33), (side * 25, -82, -36), (0, -93, -37)]
        for start, end in zip(arch, arch[1:], strict=False):
            lower.append(plate(start, end, up=(0, 0, 1), half_up_mm=9.0, half_thick_mm=0.5, radius_mm=4.6))
        lower.append(
            plate(
                (side * 51, -17, 6), (side * 47, -28, -30), up=(0, 1, 0), half_up_mm=11, half_thick_mm=0, radius_mm=3.4
            )
        )
        lower.append(ellipsoid((side * 51, -12, 12), (9, 4.5, 5)))
        crest: list[Point] = [(side * 30, -48, 0), (side * 27, -70, 0), (side * 17, -86, 0), (0, -93, 0)]
        for start, end in zip(crest, crest[1:], strict=False):
            upper.append(plate(start, end, up=(0, 0, 1), half_up_mm=4.0, half_thick_mm=0.5, radius_mm=4.0))
    upper.append(plate((0, -88, 7), (0, -44, 8), up=(1, 0, 0), half_up_mm=24, half_thick_mm=0, radius_mm=1.7))
    upper.append(plate((0, -80, 12), (0, -48, 30), up=(0, -0.3, 1), half_up_mm=8, half_thick_mm=0, radius_mm=0.9))
    paints = [
        Paint(solids=tuple(lower), layers=bone, frame=head, blend_mm=3.0),
        Paint(solids=tuple(upper), layers=((0.0, 1000.0), (1.6, 450.0)), frame=head, blend_mm=2.0),
    ]
    for height, narrow, length in ((-20.0, 0.0, 9.0), (-9.0, 2.0, 9.5)):
        for number in range(14):
            angle = np.deg2rad(-84 + 168 * number / 13)
            centre = ((31 - narrow) * np.sin(angle), -54 - 38 * np.cos(angle), height)
            tooth = ellipsoid(centre, (3.2, 3.4, length))
            paints.append(Paint(solids=(tooth,), layers=((0.0, 1500.0), (1.0, 1900.0 * jitter(0.1))), frame=head))
    return paints


def shoulders(spine: Spine, hu: Palette, jitter: Jitter) -> list[Paint]:
    """Lung tops, first ribs, clavicles, shoulder blades and humeral heads, hung on T1."""
    frame = np.eye(4)
    frame[:3, 3] = spine.frames["T1"][:3, 3]
    bone = ((0.0, 880 * jitter(0.1)), (1.8, 230.0))
    paints = [Paint(solids=(ellipsoid((0, -18, -95), (92, 70, 90)),), layers=((0.0, hu.muscle - 10),), frame=frame)]
    paints.append(Paint(solids=(ellipsoid((0, -58, -48), (20, 6, 24)),), layers=bone, frame=frame))
    for side in (1, -1):
        lung = ellipsoid((side * 41, -2, -80), (36, 46, 63 * jitter(0.06)))
        paints.append(Paint(solids=(lung,), layers=((0.0, 20.0), (1.5, -840.0 * jitter(0.03))), frame=frame))
        scapula = plate(
            (side * 78, 58, -38), (side * 132, 28, -30), up=(0, 0.1, 1), half_up_mm=26, half_thick_mm=0, radius_mm=2.0
        )
        ridge = chain([(side * 80, 64, -22), (side * 120, 50, -4), (side * 156, 14, 4)], [4, 5, 7])
        first = [(30, 16, 2), (46, 8, -3), (56, -10, -10), (50, -34, -20), (26, -54, -30)]
        second = [(30, 18, -18), (52, 22, -20), (72, 2, -30), (68, -30, -44), (24, -58, -56)]
        collar = [(16, -58, -24), (50, -62, -10), (90, -44, 2), (148, -8, 8)]
        for points, radii in ((first, [3.6, 3.8, 4, 4, 3.6]), (second, [3.6] * 5), (collar, [8, 5.5, 5, 6])):
            rods = chain([(side * x, y, z) for x, y, z in points], radii)
            paints.append(Paint(solids=tuple(rods), layers=bone, frame=frame))
        paints.append(Paint(solids=(scapula, *ridge), layers=bone, frame=frame))
        paints.append(
            Paint(
                solids=(ellipsoid((side * 170, 4, -28), (24, 25, 25)),),
                layers=((0.0, 700.0), (1.8, 240.0)),
                frame=frame,
            )
        )
    return paints
