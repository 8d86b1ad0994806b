"""What looks like a fracture and is none: vessels in bone, spurs, healed gaps, calcified arteries, joints with gas.

Each changes the volume in place and no region. `scanner.py` holds what the scanner itself does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import FloatArray, Grid
from training.inserted.clefts import Cleft, cut
from training.inserted.frame import VertebraFrame
from training.inserted.region import (
    OTHER_BONE_HU,
    Float32Array,
    Neighbourhood,
    coordinates,
    distance_mm,
    edge_mm,
    half_space_share,
    neighbourhood,
    shifted,
    slab_share,
)
from training.inserted.sites import dens_base, fracture_clefts, local_rows


@dataclass(frozen=True, kw_only=True)
class Negative:
    """Something that is no fracture, put in at a level."""

    level: str
    kind: str


def add_negatives(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    frame: VertebraFrame,
    rng: np.random.Generator,
    mean_number: float,
) -> list[Negative]:
    """Draws hard negatives for one vertebra, `mean_number` on average, and puts them into the volume."""
    added = []
    for _ in range(int(rng.poisson(mean_number))):
        kind = str(rng.choice(list(NEGATIVES), p=SHARES / SHARES.sum()))
        if add_negative(voxels_hu, labels, grid, frame, kind, rng):
            added.append(Negative(level=frame.level, kind=kind))
    return added


def add_negative(
    voxels_hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    grid: Grid,
    frame: VertebraFrame,
    kind: str,
    rng: np.random.Generator,
) -> bool:
    """Puts one hard negative of a kind into the volume; False where this vertebra has no place for it.

    Raises:
        ValueError: no such kind.
    """
    if kind not in NEGATIVES:
        raise ValueError(f"Hard negative is {kind!r}; expected one of {', '.join(NEGATIVES)}.")
    return NEGATIVES[kind](Site(voxels_hu=voxels_hu, labels=labels, grid=grid, frame=frame, rng=rng))


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A vertebra in a volume, and the randomness of what is put there."""

    voxels_hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    grid: Grid
    frame: VertebraFrame
    rng: np.random.Generator

    def near(self, centre: FloatArray, radius_mm: float) -> Neighbourhood:
        """The box about a place of the frame."""
        return neighbourhood(
            self.voxels_hu, self.labels, self.grid, self.frame.label, self.frame.to_lps_mm(centre), radius_mm
        )

    def middle_of_body(self, u: float, v_share: float, w_share: float) -> FloatArray:
        """A place in the body: v_share from front (0) to back (1), w_share from floor (0) to ceiling (1)."""
        frame = self.frame
        v = frame.front + v_share * (frame.back - frame.front)
        low, high = (float(plane @ (1, u, v)) for plane in (frame.floor, frame.ceiling))
        return np.array([u, v, low + w_share * (high - low)])


def _tube(near: Neighbourhood, line: FloatArray, radius_mm: FloatArray, sigma_mm: float) -> Float32Array:
    """Share of each voxel in a tube along a line of points `(n, 3)` LPS with a radius at each, both mm."""
    share = np.zeros(near.before.shape, np.float32)
    points = np.stack(coordinates(near.grid.affine[:3], near.before.shape), axis=-1)
    for start, end, radius in zip(line[:-1], line[1:], radius_mm, strict=False):
        along = end - start
        relative = points - start.astype(np.float32)
        place = np.clip(relative @ along.astype(np.float32) / np.float32(along @ along), 0, 1)
        apart = np.linalg.norm(relative - place[..., None] * along.astype(np.float32), axis=-1)
        # A disc blurred by the scanner: as wide as both together, and its area kept.
        variance = sigma_mm**2 + radius**2 / 4
        peak = radius**2 / (2 * variance)
        share = np.maximum(share, np.clip(np.float32(peak) * np.exp(-(apart**2) / np.float32(2 * variance)), 0, 1))
    return share


def _canal(near: Neighbourhood, line: FloatArray, radius_mm: FloatArray, fill_hu: float, rim_hu: float) -> None:
    """A smooth canal through bone; a rim if it has one is thin and bright."""
    sigma_mm = edge_mm(near.grid, np.array([0.7, 0.7, 0.14]))
    share = _tube(near, line, radius_mm, sigma_mm) * near.share
    if rim_hu:
        wall = (_tube(near, line, radius_mm + 0.8, sigma_mm) * near.share - share).clip(0, 1) * near.bone
        near.voxels_hu[:] += wall * np.maximum(np.float32(rim_hu) - near.voxels_hu, 0)
    near.voxels_hu[:] += share * np.minimum(np.float32(fill_hu) - near.voxels_hu, 0)


def _basivertebral_vein(site: Site) -> bool:
    """A canal from the middle of the back wall into the body, forked at times: smooth, in the midline, horizontal."""
    if site.frame.label < 2:
        return False
    rng = site.rng
    w_share = rng.uniform(0.4, 0.6) if site.frame.label > 2 else rng.uniform(0.15, 0.3)
    mouth = site.middle_of_body(rng.normal(0, 0.7), 1.06, w_share)
    depth = rng.uniform(0.3, 0.75)
    end = site.middle_of_body(rng.normal(0, 1.2), 1 - depth, w_share + rng.normal(0, 0.03))
    near = site.near((mouth + end) / 2, float(np.linalg.norm(mouth - end)) / 2 + 7)
    wide, narrow = rng.uniform(0.9, 2.2), rng.uniform(0.4, 0.9)
    bend = (mouth + end) / 2 + rng.normal(0, 0.5, 3)
    lines = [(mouth, bend, end)]
    if rng.random() < 0.5:
        side = rng.choice((-1, 1)) * rng.uniform(2, 4)
        lines.append((bend, (bend + end) / 2 + (side / 2, 0, 0), end + np.array([side, rng.uniform(0, 2), 0])))
    for line in lines:
        points = site.frame.to_lps_mm(np.array(line))
        _canal(near, points, np.array([wide, narrow, narrow]), rng.uniform(40, 100), rng.choice((0.0, 450.0)))
    near.write(site.voxels_hu)
    return True


def _nutrient_canal(site: Site) -> bool:
    """A thin straight canal through the cortex, anywhere, with an even width and often a fine bright wall."""
    frame, rng = site.frame, site.rng
    centre = frame.points[rng.integers(len(frame.points))]
    direction = rng.normal(0, 1, 3) * (1, 1, 0.4)
    half = direction / np.linalg.norm(direction) * rng.uniform(2, 5)
    near = site.near(centre, 11)
    line = frame.to_lps_mm(np.array([centre - half, centre + rng.normal(0, 0.5, 3), centre + half]))
    _canal(near, line, np.full(3, rng.uniform(0.4, 0.9)), rng.uniform(40, 120), rng.choice((0.0, 500.0)))
    near.write(site.voxels_hu)
    return True


def _ellipsoid_share(near: Neighbourhood, frame: VertebraFrame, centre: FloatArray, radii: FloatArray) -> Float32Array:
    """Share of each voxel in an ellipsoid along the axes of the frame."""
    axes = coordinates(frame.index_to_frame(near.grid), near.before.shape)
    scaled = [(axis - np.float32(c)) / np.float32(r) for axis, c, r in zip(axes, centre, radii, strict=True)]
    outside = (np.sqrt(sum(axis * axis for axis in scaled)) - 1) * np.float32(radii.min())
    return half_space_share(-outside, edge_mm(near.grid, np.array([0.6, 0.6, 0.5])))


def _add_bone(near: Neighbourhood, share: Float32Array, hu: float) -> None:
    """Bone where there was soft tissue of this vertebra's own surroundings; other vertebrae stay as they are."""
    share = share * ~near.other
    near.voxels_hu[:] += share * np.maximum(np.float32(hu) - near.voxels_hu, 0)


def _osteophyte(site: Site) -> bool:
    """A spur that grows out of the rim of an end plate, outward and past the disc; cortex without, marrow within."""
    frame, rng = site.frame, site.rng
    if frame.label < 2:
        return False
    is_upper = frame.label > 2 and rng.random() < 0.5
    angle = rng.choice((0.0, 0.0, 1.2, -1.2, np.pi)) + rng.normal(0, 0.35)
    depth = (frame.back - frame.front) / 2
    direction = np.array([np.sin(angle), -np.cos(angle), 0.0])
    rim = np.array([0, frame.front + depth, 0]) + direction * (frame.half_width, depth, 0)
    rim[2] = (frame.ceiling if is_upper else frame.floor) @ (1, rim[0], rim[1])
    rim = frame.points[np.linalg.norm(frame.points - rim, axis=1).argmin()]
    away = 1.0 if is_upper else -1.0
    length = rng.uniform(1.5, 4.5)
    near = site.near(rim, length + 9)
    hu = rng.uniform(450, 900)
    for step in np.linspace(0, 1, 4):
        centre = rim + direction * length * step + np.array([0, 0, away * length * 0.5 * step**2])
        # A lip along the rim: wide, and thinner towards its end.
        lip = np.abs(direction[[1, 0, 2]]) * 1.6 + (0.8, 0.8, 0.7)
        radii = lip * (2.2 - 1.3 * step) * rng.uniform(0.8, 1.2)
        _add_bone(near, _ellipsoid_share(near, frame, centre, radii), hu)
        if step < 0.5:
            core = _ellipsoid_share(near, frame, centre, radii * 0.5)
            near.voxels_hu[:] += core * np.minimum(np.float32(0.55 * hu) - near.voxels_hu, 0)
    near.write(site.voxels_hu)
    return True


def _ossicle(site: Site) -> bool:
    """A round piece of bone with a closed bright wall in front of the disc or behind a spinous process."""
    frame, rng = site.frame, site.rng
    if rng.random() < 0.6 and frame.label > 1:
        v = frame.front - rng.uniform(1.5, 3.0)
        plane = frame.floor if rng.random() < 0.5 else frame.ceiling
        centre = np.array([rng.normal(0, 3), v, plane @ (1, 0, v) + rng.normal(0, 1.0)])
    else:
        tip = frame.points[frame.points[:, 1] > frame.tip - 4]
        centre = np.array([rng.normal(0, 1.5), frame.tip + rng.uniform(2.5, 6), float(np.median(tip[:, 2]))])
    radii = rng.uniform(1.2, 3.0, 3)
    near = site.near(centre, 10)
    _add_bone(near, _ellipsoid_share(near, frame, centre, radii), rng.uniform(600, 1000))
    core = _ellipsoid_share(near, frame, centre, radii - 0.8)
    near.voxels_hu[:] += core * np.minimum(np.float32(350) - near.voxels_hu, 0) * (radii.min() > 1.5)
    near.write(site.voxels_hu)
    return True


def _old_fracture(site: Site) -> bool:
    """A healed gap: smooth, without a step, with bright margins on both sides."""
    rng = site.rng
    kinds = ("ring", "dens") if site.frame.label < 3 else ("spinous", "teardrop", "transverse", "lamina")
    clefts = fracture_clefts(str(rng.choice(kinds)), site.frame, rng)
    for cleft in clefts[:1]:
        healed = replace(
            cleft,
            waves=cleft.waves[:1] * (0.5, 1, 1, 1),
            shift_lps_mm=np.zeros(3),
            width_mm=float(rng.uniform(0.8, 2.0)),
            fill_hu=float(rng.uniform(40, 150)),
            rim_mm=float(rng.uniform(0.8, 1.6)),
            rim_hu=float(rng.uniform(600, 1050)),
        )
        _heal(site, healed)
    return bool(clefts)


def _heal(site: Site, cleft: Cleft) -> None:
    near = neighbourhood(site.voxels_hu, site.labels, site.grid, site.frame.label, cleft.centre_lps_mm, cleft.radius_mm)
    cut(near, cleft, site.rng)
    near.write(site.voxels_hu)


def _synchondrosis(site: Site) -> bool:
    """What is left of the growth plate below the dens: a smooth, bright-edged line that ends short of the cortex."""
    if site.frame.label != 2 or (base := dens_base(site.frame)) is None:
        return False
    rng = site.rng
    normal = np.array([rng.normal(0, 0.04), rng.normal(0, 0.08), 1.0])
    cleft = Cleft(
        centre_lps_mm=site.frame.to_lps_mm(base - (0, 0, rng.uniform(0, 4))),
        rows=local_rows(normal / np.linalg.norm(normal)) @ site.frame.rows,
        reach_mm=float(rng.uniform(5.5, 7.5)),
        width_mm=float(rng.uniform(0.4, 1.2)),
        waves=np.zeros((0, 4)),
        shift_lps_mm=np.zeros(3),
        fill_hu=float(rng.uniform(60, 150)),
        rim_mm=float(rng.uniform(0.5, 1.2)),
        rim_hu=float(rng.uniform(450, 800)),
    )
    _heal(site, cleft)
    return True


def _calcification(site: Site) -> bool:
    """Bright specks or a bright arc in the wall of an artery beside the bone, not touching it."""
    frame, rng = site.frame, site.rng
    side = rng.choice((-1, 1))
    centre = np.array([side * rng.uniform(20, 34), frame.front + rng.uniform(-12, 4), rng.normal(0, 4)])
    near = site.near(centre, 9)
    is_soft = ndimage.binary_erosion((near.before < 200) & ~near.own & ~near.other, iterations=1)
    u, v, w = coordinates(frame.index_to_frame(near.grid), near.before.shape)
    u, v, w = u - np.float32(centre[0]), v - np.float32(centre[1]), w - np.float32(centre[2])
    sigma_mm = edge_mm(near.grid, np.array([0.7, 0.7, 0.14]))
    wall = slab_share(np.hypot(u, v) - np.float32(rng.uniform(2, 3.5)), rng.uniform(0.6, 1.4), sigma_mm)
    start, extent = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 2.5)
    turned = np.abs((np.arctan2(v, u) - start + np.pi) % (2 * np.pi) - np.pi)
    arc = wall * (turned < extent / 2) * half_space_share(np.float32(rng.uniform(1, 4)) - np.abs(w), sigma_mm) * is_soft
    if float(arc.max(initial=0)) < 0.3:
        return False
    near.voxels_hu[:] += arc * np.maximum(np.float32(rng.uniform(500, 1300)) - near.voxels_hu, 0)
    near.write(site.voxels_hu)
    return True


def _vacuum(site: Site) -> bool:
    """Gas in the disc below: a dark flat lens between two bodies, as in a worn joint."""
    frame, rng = site.frame, site.rng
    if frame.label < 3:
        return False
    centre = site.middle_of_body(rng.normal(0, 2), rng.uniform(0.25, 0.75), 0.0) - (0, 0, rng.uniform(1.5, 3.0))
    near = site.near(centre, 14)
    radii = np.array([rng.uniform(3, 7), rng.uniform(3, 6), rng.uniform(0.5, 1.2)])
    gas = _ellipsoid_share(near, frame, centre, radii) * ((near.before < 220) & ~near.own & ~near.other)
    if float(gas.sum()) * site.grid.voxel_volume_mm3 < 10:
        return False
    near.voxels_hu[:] += gas * (np.float32(rng.uniform(-700, -150)) - near.voxels_hu)
    near.write(site.voxels_hu)
    return True


def _bent(site: Site) -> bool:
    """The vertebra smoothly out of shape: resampled as a displaced fragment is, but with no break."""
    frame, rng = site.frame, site.rng
    centre = frame.points[rng.integers(len(frame.points))]
    near = site.near(centre, 17)
    u, v, w = coordinates(frame.index_to_frame(near.grid), near.before.shape)
    apart = np.sqrt(sum((axis - np.float32(c)) ** 2 for axis, c in zip((u, v, w), centre, strict=True)))
    amount = np.asarray(np.clip(1 - apart / 15, 0, 1) ** 2, np.float32)
    shift = rng.normal(0, 1, 3)
    shift *= rng.uniform(0.5, 2.5) / np.linalg.norm(shift)
    near.voxels_hu[:] = shifted(near.before, near.grid, -shift @ frame.rows, amount)
    near.write(site.voxels_hu)
    return True


def _worn_joint(site: Site) -> bool:
    """A joint whose gap has narrowed to a line between dense margins: of dens and arch, of two facets."""
    frame, rng = site.frame, site.rng
    centre = _at_a_joint(frame, rng)
    if centre is None:
        return False
    near = site.near(centre, 12)
    own = near.own & (near.before > OTHER_BONE_HU)
    to_own_mm = distance_mm(own, near.grid)
    between_mm = to_own_mm + near.to_other_mm
    z, y, x = np.unravel_index(between_mm.argmin(), between_mm.shape)
    reach_mm = float(between_mm[z, y, x]) + rng.uniform(0.8, 2.0)
    if reach_mm > 6:
        return False
    u, v, w = coordinates(frame.index_to_frame(near.grid), near.before.shape)
    apart = np.sqrt((u - u[z, y, x]) ** 2 + (v - v[z, y, x]) ** 2 + (w - w[z, y, x]) ** 2)
    sigma_mm = edge_mm(near.grid, np.array([0.7, 0.7, 0.14]))
    share = half_space_share(np.abs(to_own_mm - near.to_other_mm) / 2 - np.float32(rng.uniform(0.15, 0.6)), sigma_mm)
    share = share * half_space_share(np.float32(reach_mm) - between_mm, sigma_mm)
    share = share * half_space_share(np.float32(rng.uniform(4, 9)) - apart, 1.0)
    near.voxels_hu[:] += share * np.maximum(np.float32(rng.uniform(450, 950)) - near.voxels_hu, 0)
    near.write(site.voxels_hu)
    return True


def _at_a_joint(frame: VertebraFrame, rng: np.random.Generator) -> FloatArray | None:
    """A place of the vertebra where it may meet another: the front of the dens, or a facet."""
    if frame.label == 2 and rng.random() < 0.7:
        if (base := dens_base(frame)) is None:
            return None
        u, v, w = frame.points.T
        dens = frame.points[(np.abs(u - base[0]) < 4) & (w > base[2] + 3)]
        if not len(dens):
            return None
        front = float(np.percentile(dens[:, 1], 5))
        return np.array([base[0] + rng.normal(0, 1), front, float(np.median(dens[:, 2])) + rng.normal(0, 1.5)])
    u, v, _ = frame.points.T
    beside = frame.points[(np.abs(u) > 8) & (v > frame.back - 6) & (v < frame.canal_back)]
    return np.asarray(beside[rng.integers(len(beside))]) if len(beside) else None


NEGATIVES: dict[str, Callable[[Site], bool]] = {
    "basivertebral_vein": _basivertebral_vein,
    "nutrient_canal": _nutrient_canal,
    "osteophyte": _osteophyte,
    "ossicle": _ossicle,
    "old_fracture": _old_fracture,
    "synchondrosis": _synchondrosis,
    "calcification": _calcification,
    "vacuum": _vacuum,
    "bent": _bent,
    "worn_joint": _worn_joint,
}
"""Every kind of hard negative that stands at one vertebra."""

SHARES = np.array([4.0 if kind == "worn_joint" else 1.0 for kind in NEGATIVES])
"""How often each is drawn: every neck of some age has worn joints."""
