"""Solids as signed distances in mm, and their evaluation on any affine voxel grid.

A solid lives in a parent frame (a vertebra's, or the patient's); `evaluate` samples it only inside its bounding box.
Distances are negative inside, and close to Euclidean near the surface, which is where coverage is taken from them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Point = Sequence[float] | Float64Array
Box = tuple[slice, slice, slice]

_SIGNS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])

FAR_MM = 10.0
"""Distance given to voxels that no solid of a bone comes near."""


class Solid(Protocol):
    """A shape with a signed distance in its own coordinates `(u, v, w)`, mm."""

    @property
    def to_local(self) -> Float64Array:
        """Float64 `(3, 4)`: maps parent `(x, y, z, 1)` in mm to `(u, v, w)`."""
        ...

    @property
    def corners_mm(self) -> Float64Array:
        """Float64 `(8, 3)`: corners, in the parent frame, of a box around the solid."""
        ...

    def distance_mm(self, u: Float32Array, v: Float32Array, w: Float32Array) -> Float32Array:
        """Signed distance at local coordinates that broadcast against each other."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundedBox:
    """A box with round edges; without extent along v and w a capsule. radius grows by taper per mm along u."""

    to_local: Float64Array
    half_mm: tuple[float, float, float]
    radius_mm: float
    taper: float = 0.0

    @cached_property
    def corners_mm(self) -> Float64Array:
        grown = np.asarray(self.half_mm) + self.radius_mm + abs(self.taper) * self.half_mm[0]
        return corners_of(self.to_local, grown)

    def distance_mm(self, u: Float32Array, v: Float32Array, w: Float32Array) -> Float32Array:
        outside_u, outside_v, outside_w = (
            np.abs(c) - np.float32(h) if h else np.abs(c) for c, h in zip((u, v, w), self.half_mm, strict=True)
        )
        inside = np.minimum(np.maximum(np.maximum(outside_u, outside_v), outside_w), 0)
        for part in (outside_u, outside_v, outside_w):
            np.maximum(part, 0, out=part)
        distance: Float32Array = np.sqrt(outside_u * outside_u + outside_v * outside_v + outside_w * outside_w)
        distance += inside
        distance -= np.float32(self.radius_mm)
        if self.taper:
            distance -= np.float32(self.taper) * np.clip(u, -self.half_mm[0], self.half_mm[0])
        return distance


@dataclass(frozen=True, kw_only=True, eq=False)
class Ellipsoid:
    """An ellipsoid; to_local scales nothing, radii_mm are along u, v, w."""

    to_local: Float64Array
    radii_mm: tuple[float, float, float]

    @cached_property
    def corners_mm(self) -> Float64Array:
        return corners_of(self.to_local, np.asarray(self.radii_mm))

    def distance_mm(self, u: Float32Array, v: Float32Array, w: Float32Array) -> Float32Array:
        scaled = [c * np.float32(1 / r) for c, r in zip((u, v, w), self.radii_mm, strict=True)]
        squares = [c * c for c in scaled]
        norm = np.sqrt(squares[0] + squares[1] + squares[2])
        slope = np.sqrt(sum(s * np.float32(1 / r**2) for s, r in zip(squares, self.radii_mm, strict=True)))
        # The small terms keep the centre, where slope and norm vanish together, deep inside.
        slope += np.float32(1e-4 / min(self.radii_mm))
        result: Float32Array = (norm + np.float32(1e-4)) * (norm - 1) / slope
        return np.maximum(result, np.float32(-min(self.radii_mm)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Cone:
    """A piece of a tube between two parallel ellipses; w runs 0..1 from the first ellipse to the second.

    to_local shears so that the centres lie on u = v = 0. Outside 0 <= w < 1 the distance is `FAR_MM`.
    """

    to_local: Float64Array
    corners_mm: Float64Array
    radii_start_mm: tuple[float, float]
    radii_end_mm: tuple[float, float]

    def distance_mm(self, u: Float32Array, v: Float32Array, w: Float32Array) -> Float32Array:
        (u0, v0), (u1, v1) = self.radii_start_mm, self.radii_end_mm
        within = np.clip(w, 0, 1)
        inverse_u = 1 / (np.float32(u0) + within * np.float32(u1 - u0))
        inverse_v = 1 / (np.float32(v0) + within * np.float32(v1 - v0))
        scaled_u, scaled_v = u * inverse_u, v * inverse_v
        norm = np.sqrt(scaled_u * scaled_u + scaled_v * scaled_v)
        scaled_u *= inverse_u
        scaled_v *= inverse_v
        slope = np.sqrt(scaled_u * scaled_u + scaled_v * scaled_v)
        slope += np.float32(1e-4 / max(u0, v0, u1, v1))
        result = (norm + np.float32(1e-4)) * (norm - 1) / slope
        np.maximum(result, np.float32(-max(u0, v0, u1, v1)), out=result)
        if float(w.min()) >= 0 and float(w.max()) < 1:
            return np.asarray(result, np.float32)
        return np.where((w >= 0) & (w < 1), result, np.float32(FAR_MM))


@dataclass(frozen=True, kw_only=True, eq=False)
class VertebralBody:
    """A vertebral body around its centre: waisted, flat behind, concave endplates, uncinate processes, front lip.

    half_mm: half width, half depth, half height. uncinate_mm: height of the lateral rims of the upper endplate.
    lip_mm: how far the front of the lower endplate reaches down. wedge: slope of the upper endplate to the front.
    """

    to_local: Float64Array
    half_mm: tuple[float, float, float]
    uncinate_mm: float
    lip_mm: float

    @cached_property
    def corners_mm(self) -> Float64Array:
        a, b, h = self.half_mm
        return corners_of(self.to_local, np.array([a * 1.15, b * 1.15, h + max(self.uncinate_mm, self.lip_mm) + 0.5]))

    def distance_mm(self, u: Float32Array, v: Float32Array, w: Float32Array) -> Float32Array:
        a, b, h = (np.float32(value) for value in self.half_mm)
        height = np.clip(w / h, -1, 1)
        waist = np.float32(0.95) + np.float32(0.07) * height * height - np.float32(0.03) * height
        x = np.abs(u) / (a * waist)
        y = v / (b * waist)
        x_square, y_square = x * x, y * y
        # Between a circle (factor 2) and a rounded square (factor 0); squarer behind, where the canal begins.
        squareness = np.where(y > 0, np.float32(0.2), np.float32(1.4))
        rho_square = np.sqrt(x_square * x_square + y_square * y_square + squareness * x_square * y_square)
        side = (np.sqrt(rho_square) - 1) * np.sqrt(a * b)
        hollow = 1 - np.minimum(rho_square, 1)
        rim = np.clip((x - np.float32(0.62)) * np.float32(2.6), 0, 1)
        top = (
            w
            - h
            + np.float32(0.7) * hollow
            - np.float32(self.uncinate_mm) * rim * rim * np.clip(y + np.float32(0.9), 0, 1)
        )
        front = np.clip(-y - np.float32(0.2), 0, 1)
        bottom = -h + np.float32(1.1) * hollow - np.float32(self.lip_mm) * front * front + np.float32(1.6) * rim - w
        return smooth_max(side, np.maximum(top, bottom), 2.0)


Placeable = RoundedBox | Ellipsoid | Cone


def inverse(matrix: Float64Array) -> Float64Array:
    """Inverse of a map `(4, 4)`."""
    return np.asarray(np.linalg.inv(matrix), np.float64)


def corners_of(to_local: Float64Array, half_mm: Float64Array) -> Float64Array:
    """Corners `(8, 3)` in the parent frame of the box `±half_mm` in local coordinates."""
    corners: Float64Array = (_SIGNS * half_mm - to_local[:, 3]) @ np.linalg.inv(to_local[:, :3]).T
    return corners


def local_frame(origin: Point, rows: Float64Array | None = None) -> Float64Array:
    """`(3, 4)` map from parent mm to coordinates along `rows` (unit vectors, one per row) from `origin`."""
    axes = np.eye(3) if rows is None else np.asarray(rows, float)
    return np.concatenate([axes, (-axes @ np.asarray(origin, float))[:, None]], axis=1)


def placed(solid: "Placeable", frame: Float64Array) -> "Placeable":
    """The solid carried into another frame; frame `(4, 4)` maps its parent frame to the new one."""
    to_local = solid.to_local @ inverse(frame)
    if isinstance(solid, Cone):
        corners = solid.corners_mm @ frame[:3, :3].T + frame[:3, 3]
        return replace(solid, to_local=to_local, corners_mm=corners)
    return replace(solid, to_local=to_local)


def plate(
    start: Point,
    end: Point,
    *,
    up: Point,
    half_up_mm: float,
    half_thick_mm: float,
    radius_mm: float,
    taper: float = 0.0,
) -> RoundedBox:
    """A rounded box from start to end, half_up_mm high along `up` and half_thick_mm thick across both."""
    first, last = np.asarray(start, float), np.asarray(end, float)
    length = float(np.linalg.norm(last - first))
    along = (last - first) / length
    across = np.cross(np.asarray(up, float), along)
    norm = float(np.linalg.norm(across))
    across = across / norm if norm > 1e-6 else np.array([1.0, 0.0, 0.0])
    rows = np.stack([along, across, np.cross(along, across)])
    return RoundedBox(
        to_local=local_frame((first + last) / 2, rows),
        half_mm=(length / 2, half_thick_mm, half_up_mm),
        radius_mm=radius_mm,
        taper=taper,
    )


def capsule(start: Point, end: Point, radius_mm: float, end_radius_mm: float | None = None) -> RoundedBox:
    """A rod with round ends; its radius runs from radius_mm to end_radius_mm."""
    last_radius = radius_mm if end_radius_mm is None else end_radius_mm
    length = float(np.linalg.norm(np.asarray(end, float) - np.asarray(start, float)))
    up = (0.0, 0.3, 1.0)
    mean, taper = (radius_mm + last_radius) / 2, (last_radius - radius_mm) / length
    return plate(start, end, up=up, half_up_mm=0.0, half_thick_mm=0.0, radius_mm=mean, taper=taper)


def chain(points: Sequence[Point], radii_mm: Sequence[float]) -> list[RoundedBox]:
    """Rods along a polyline, one radius per point."""
    return [capsule(points[i], points[i + 1], radii_mm[i], radii_mm[i + 1]) for i in range(len(points) - 1)]


def ellipsoid(centre: Point, radii_mm: tuple[float, float, float], rows: Float64Array | None = None) -> Ellipsoid:
    """An ellipsoid at `centre`, its axes along `rows`."""
    return Ellipsoid(to_local=local_frame(centre, rows), radii_mm=radii_mm)


@dataclass(frozen=True, kw_only=True)
class Station:
    """One ellipse of a tube: centre in parent mm, radii across and along, turned about z."""

    x: float
    y: float
    z: float
    radius_x: float
    radius_y: float
    turn_deg: float = 0.0


def loft(stations: Sequence[Station]) -> list[Cone]:
    """A tube through horizontal ellipses, given in descending or ascending z; it ends flat at both ends."""
    return [_cone(first, last) for first, last in pairwise(stations)]


def _cone(first: Station, last: Station) -> Cone:
    rise = last.z - first.z
    along = np.array([0, 0, 1 / rise, -first.z / rise])
    offset_x = np.array([1.0, 0, 0, -first.x]) - (last.x - first.x) * along
    offset_y = np.array([0, 1.0, 0, -first.y]) - (last.y - first.y) * along
    turn = np.deg2rad((first.turn_deg + last.turn_deg) / 2)
    rows = [
        np.cos(turn) * offset_x + np.sin(turn) * offset_y,
        np.cos(turn) * offset_y - np.sin(turn) * offset_x,
        along,
    ]
    cos, sin = abs(np.cos(turn)), abs(np.sin(turn))
    corners = [
        (
            station.x + sign_x * (cos * station.radius_x + sin * station.radius_y),
            station.y + sign_y * (sin * station.radius_x + cos * station.radius_y),
            station.z,
        )
        for station in (first, last)
        for sign_x in (-1, 1)
        for sign_y in (-1, 1)
    ]
    return Cone(
        to_local=np.stack(rows),
        corners_mm=np.array(corners),
        radii_start_mm=(first.radius_x, first.radius_y),
        radii_end_mm=(last.radius_x, last.radius_y),
    )


def index_box(
    corners_mm: Float64Array, to_index: Float64Array, shape: tuple[int, int, int], pad_mm: float
) -> Box | None:
    """Voxels around the corners (parent mm) plus a margin; None when none of them lies in the array.

    to_index: `(4, 4)`, parent `(x, y, z, 1)` to voxel indices `(z, y, x, 1)`.
    """
    linear = to_index[:3, :3]
    indices = corners_mm @ linear.T + to_index[:3, 3]
    pad = pad_mm * np.sqrt((linear * linear).sum(axis=1))
    lower, upper = (indices.min(axis=0) - pad).tolist(), (indices.max(axis=0) + pad).tolist()
    starts = [max(ceil(value), 0) for value in lower]
    stops = [min(floor(value) + 1, size) for value, size in zip(upper, shape, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    return slice(starts[0], stops[0]), slice(starts[1], stops[1]), slice(starts[2], stops[2])


def coordinates(matrix: Float64Array, box: Box) -> list[Float32Array]:
    """One float32 array per row of `matrix` `(n, 4)`, its value at the voxels `(z, y, x, 1)` of the box.

    An axis on which a row does not depend keeps length 1: callers broadcast.
    """
    z, y, x = (np.arange(part.start, part.stop, dtype=np.float64) for part in box)
    result = []
    for along_z, along_y, along_x, constant in matrix:
        # The small array in float64, and one float32 addition over all voxels.
        value = np.full((1, 1, 1), constant)
        if abs(along_z) > 1e-9:
            value = value + (along_z * z)[:, None, None]
        if abs(along_y) > 1e-9:
            value = value + (along_y * y)[None, :, None]
        row = value.astype(np.float32)
        result.append(row + (along_x * x).astype(np.float32) if abs(along_x) > 1e-9 else row)
    return result


def evaluate(solid: Solid, to_parent: Float64Array, box: Box) -> Float32Array:
    """Signed distance, float32, of the shape of `box`; to_parent `(4, 4)` maps `(z, y, x, 1)` to parent mm."""
    u, v, w = coordinates(solid.to_local @ to_parent, box)
    return solid.distance_mm(u, v, w)


def inner_box(solid: Solid, to_index: Float64Array, box: Box, pad_mm: float) -> tuple[Box, Box] | None:
    """Where a solid meets a box: in the volume's indices, and in indices of the box; None when it does not."""
    near = index_box(solid.corners_mm, to_index, (box[0].stop, box[1].stop, box[2].stop), pad_mm)
    if near is None:
        return None
    starts = [max(part.start, outer.start) for part, outer in zip(near, box, strict=True)]
    if any(start >= part.stop for start, part in zip(starts, near, strict=True)):
        return None
    z, y, x = (slice(start, part.stop) for start, part in zip(starts, near, strict=True))
    in_z, in_y, in_x = (slice(i.start - o.start, i.stop - o.start) for i, o in zip((z, y, x), box, strict=True))
    return (z, y, x), (in_z, in_y, in_x)


def combine(
    parts: Iterable[tuple[Solid, float, bool]], to_parent: Float64Array, box: Box, far_mm: float = FAR_MM
) -> Float32Array:
    """Signed distance, float32, of the shape of `box`: solids added or cut out in order, far_mm where none is near.

    parts: `(solid, blend_mm, cut)`. Distances are right up to 3 mm outside, with a larger far_mm to most of it.
    """
    distance = np.full([part.stop - part.start for part in box], far_mm, np.float32)
    to_index = inverse(to_parent)
    pad_mm = 3.0 if far_mm == FAR_MM else 0.8 * far_mm
    for solid, blend_mm, cut in parts:
        boxes = inner_box(solid, to_index, box, pad_mm)
        if boxes is None:
            continue
        near, local = boxes
        own = evaluate(solid, to_parent, near)
        distance[local] = (
            smooth_max(distance[local], -own, blend_mm) if cut else smooth_min(distance[local], own, blend_mm)
        )
    return distance


def smooth_max(first: Float32Array, second: Float32Array, blend_mm: float) -> Float32Array:
    """Maximum of two distances, with a rounded edge of about blend_mm."""
    near = np.maximum(np.float32(blend_mm) - np.abs(first - second), 0)
    near *= near
    near *= np.float32(0.25 / blend_mm)
    result: Float32Array = near + np.maximum(first, second)
    return result


def smooth_min(first: Float32Array, second: Float32Array, blend_mm: float) -> Float32Array:
    """Minimum of two distances, with a fillet of about blend_mm."""
    near = np.maximum(np.float32(blend_mm) - np.abs(first - second), 0)
    near *= near
    near *= np.float32(-0.25 / blend_mm)
    result: Float32Array = near + np.minimum(first, second)
    return result


def coverage(distance_mm: Float32Array, width_mm: float) -> Float32Array:
    """Part of a voxel that lies inside, 0..1: a smooth step of the given width about distance zero."""
    share = distance_mm * np.float32(-1 / width_mm)
    share += np.float32(0.5)
    np.maximum(share, 0, out=share)
    np.minimum(share, 1, out=share)
    rest = share * np.float32(-2)
    rest += 3
    share *= share
    share *= rest
    return share
