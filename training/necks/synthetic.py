"""Endless necks from the atlas: other poses, shapes, tissues, scanners and fields of view, with their truth.

The atlas is bent, stretched and wrinkled by a smooth displacement, then each tissue gets a grey value of its own, drawn
anew for every neck. Appearance need not be real, it must vary more than reality does.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from model.geometry import FloatArray, Grid
from model.resample import AIR_HU
from training.necks import atlas as body
from training.necks.atlas import Atlas
from training.necks.joints import Joints

NODE_MM = 4.0
"""Spacing of the displacement's nodes."""

WRINKLED_MM = 240.0
"""How far from the middle of the neck wrinkles reach, each way."""

CURVE_DEG = ((-35.0, -20.0), (45.0, 20.0))
"""Most that a neck is bent from end to end: to kyphosis, to lordosis beyond the atlas's own, and to the sides."""

ARC_MM = 70.0
"""The bend reaches this far up and down from the middle of C4; head and chest beyond it are straight."""

SHARE_LEANING, LEAN_DEG = 0.5, (-50.0, 15.0)
"""Share of necks that lean as a whole, forward below 0: the kyphotic, and who lies on a pillow."""

SHARE_UNEVEN = 0.6
"""Share of necks whose cortex, or marrow, differs from place to place."""

MAX_LEVEL = 10
"""T3: below it, level numbers count no further."""

AUX_NONE, AUX_CORD, AUX_SKULL, AUX_MANDIBLE, AUX_BRAINSTEM, AUX_UNKNOWN = range(6)
"""Numbers of `Neck.aux`, the structures that the network learns beside the vertebrae."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Neck:
    """One drawn neck, all `(Z, Y, X)` on one isotropic grid.

    hu: int16. share: uint8, 0..255 of the voxel that is vertebra. level: uint8, 1..MAX_LEVEL of the nearest vertebra, 0
    where none is near. aux: uint8, see the numbers above.
    """

    hu: NDArray[np.int16]
    share: NDArray[np.uint8]
    level: NDArray[np.uint8]
    aux: NDArray[np.uint8]


def draw_neck(
    atlas: Atlas, rng: np.random.Generator, *, spacing_mm: float, shape: tuple[int, int, int], oversample: int = 2
) -> Neck:
    """A neck of the atlas around some point of its spine.

    shape: of the result. oversample: the neck is drawn this many times finer and averaged, for partial volumes.
    """
    fine_mm = spacing_mm / oversample
    centre = atlas.centres_lps_mm[rng.integers(0, 8)] + rng.uniform(-12, 12, size=3)
    centre[1] += rng.uniform(-45, 0)
    grid = Grid.axial(
        shape=(shape[0] * oversample, shape[1] * oversample, shape[2] * oversample),
        spacing_mm=(fine_mm,) * 3,
        centre_lps_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
    )
    places = Pose.draw(atlas, rng).places(grid)
    bones, distance, tissues, hu = _drawn(atlas, places, fine_mm, rng)
    vertebra = (bones >= 1) & (bones <= body.NUM_VERTEBRAE)
    share = torch.where(vertebra, (distance / fine_mm + 0.5).clamp(0, 1), 0.0)
    level = torch.where(vertebra & (distance > -6), bones.float().clamp(max=MAX_LEVEL), 0.0)
    hu, share, level, aux = _averaged(hu, share, level, _aux(bones, distance, tissues), oversample)
    hu = _scanned(hu, spacing_mm, rng)
    return Neck(
        hu=hu.round().clamp(-1024, 3071).to(torch.int16).numpy(),
        share=(share * 255).round().to(torch.uint8).numpy(),
        level=level.to(torch.uint8).numpy(),
        aux=aux.to(torch.uint8).numpy(),
    )


def draw_spine(
    atlas: Atlas, rng: np.random.Generator, *, spacing_mm: float, reach_mm: float
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """C1..C7 of a neck without noise or blur: HU and labels `(Z, Y, X)`, 1..7 and 8 for T1 and below, and their grid.

    reach_mm: how far the volume reaches about each vertebra's middle, to the sides, to the front and to the back.
    """
    pose = Pose.draw(atlas, rng)
    middle = atlas.centres_lps_mm[3]
    rough = Grid.axial(shape=(64, 56, 48), spacing_mm=(4.0,) * 3, centre_lps_mm=tuple(middle.tolist()))
    seen = _look_up(atlas.bones, rough_places := pose.places(rough)).numpy()
    solid = _look_up_smooth(atlas.distance_mm, rough_places).numpy() > -1
    places = [rough.to_lps_mm(np.argwhere(solid & (seen == level)).astype(float)) for level in range(1, 8)]
    centres = np.array([(place.min(axis=0) + place.max(axis=0)) / 2 for place in places if len(place)])
    every = np.concatenate(places)
    lower, upper = centres.min(axis=0) - reach_mm, centres.max(axis=0) + reach_mm
    lower[2], upper[2] = every[:, 2].min() - 8, every[:, 2].max() + 8
    x, y, z = (int(n) for n in np.ceil((upper - lower) / spacing_mm))
    grid = Grid.axial(
        shape=(z, y, x), spacing_mm=(spacing_mm,) * 3, centre_lps_mm=tuple(((lower + upper) / 2).tolist())
    )
    bones, distance, _, hu = _drawn(atlas, pose.places(grid), spacing_mm, rng)
    vertebra = (bones >= 1) & (bones <= body.NUM_VERTEBRAE) & (distance > 0)
    labels = torch.where(vertebra, bones.clamp(max=8), 0).to(torch.uint8)
    return hu.round().clamp(-1024, 3071).to(torch.int16).numpy(), labels.numpy(), grid


def draw_series(
    atlas: Atlas, rng: np.random.Generator, *, pixel_mm: float, thick: int
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """A whole neck as a scanner would show it: HU and true labels `(Z, Y, X)`, 1..7 = C1..C7, and their grid.

    thick: pixels to a slice's thickness.
    """
    x, y, z = atlas.centres_lps_mm[3] + [0, -25, 0]
    extent = [round(mm / pixel_mm) for mm in (260, 190, 190)]
    shape = (extent[0] // thick * thick, extent[1], extent[2])
    grid = Grid.axial(shape=shape, spacing_mm=(pixel_mm,) * 3, centre_lps_mm=(float(x), float(y), float(z)))
    bones, distance, _, hu = _drawn(atlas, Pose.draw(atlas, rng).places(grid), pixel_mm, rng)
    labels = torch.where((bones >= 1) & (bones <= 7) & (distance > 0), bones, 0)
    hu = _scanned(hu, pixel_mm, rng).reshape(-1, thick, *shape[1:]).mean(dim=1)
    slices = Grid.axial(
        shape=(shape[0] // thick, shape[1], shape[2]),
        spacing_mm=(thick * pixel_mm, pixel_mm, pixel_mm),
        centre_lps_mm=(float(x), float(y), float(z)),
    )
    middle = labels.reshape(-1, thick, *shape[1:])[:, thick // 2]
    return hu.round().clamp(-1024, 3071).to(torch.int16).numpy(), middle.to(torch.uint8).numpy(), slices


def _drawn(
    atlas: Atlas, places: Tensor, spacing_mm: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bones, depth inside them (mm), tissues and HU at these places of the atlas."""
    bones = _look_up(atlas.bones, places)
    distance = _look_up_smooth(atlas.distance_mm, places) - rng.uniform(0.0, 0.6)
    tissues = _look_up(atlas.tissues, places)
    return bones, distance, tissues, _paint(bones, distance, tissues, spacing_mm, rng)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pose:
    """How one neck differs from the atlas: a smooth map from its LPS mm to the atlas's, the same on any grid."""

    atlas: Atlas
    matrix: FloatArray
    scale: FloatArray
    curves_per_mm: FloatArray
    sway_mm: float
    wave_size: FloatArray
    wave_phase: FloatArray
    wrinkles: tuple[tuple[float, FloatArray], ...]
    joints: Joints

    @classmethod
    def draw(cls, atlas: Atlas, rng: np.random.Generator) -> "Pose":
        """Turned, scaled, mirrored half the time, bent, wrinkled, and stretched along the spine unevenly.

        From nearly as the atlas lies, which is how most patients lie, to more than any patient shows.
        """
        strength = rng.uniform(0.25, 1.0)
        matrix = np.eye(3)
        angles = strength * np.deg2rad(rng.uniform([-18, -12, -15], [18, 12, 15]))
        if rng.random() < SHARE_LEANING:
            angles[0] += np.deg2rad(rng.uniform(*LEAN_DEG))
        for (i, j), angle in zip(((1, 2), (0, 2), (0, 1)), angles, strict=True):
            turn = np.eye(3)
            turn[np.ix_((i, j), (i, j))] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            matrix = turn @ matrix
        scale = rng.uniform(0.85, 1.2) * rng.uniform(0.9, 1.12, size=3)
        scale[0] *= rng.choice([-1, 1])
        wrinkles = []
        for reach_mm, size_mm in ((60.0, 5.0), (30.0, 2.4)):
            nodes = int(2 * WRINKLED_MM / reach_mm) + 1
            height_mm = strength * size_mm * rng.uniform(0.3, 1.2)
            wrinkles.append((reach_mm, rng.normal(size=(3, nodes, nodes, nodes)) * height_mm))
        return cls(
            atlas=atlas,
            matrix=matrix,
            scale=scale,
            curves_per_mm=strength * np.deg2rad(rng.uniform(*CURVE_DEG)) / (2 * ARC_MM),
            sway_mm=strength * rng.uniform(-8, 8),
            wave_size=strength * rng.normal(0, 2.2, size=6) / np.arange(1, 7) ** 0.5,
            wave_phase=rng.uniform(0, 2 * np.pi, size=6),
            wrinkles=tuple(wrinkles),
            joints=Joints.draw(atlas, rng, strength),
        )

    def to_atlas(self, points_lps_mm: FloatArray) -> FloatArray:
        """LPS mm `(n, 3)` of the neck to LPS mm of the atlas."""
        middle = self.atlas.centres_lps_mm[3]
        moved = (points_lps_mm - middle) @ self.matrix.T / self.scale
        for axis, curve in zip((1, 0), self.curves_per_mm, strict=True):
            straighten(moved, axis, curve, ARC_MM)
        moved[:, 1] += self.sway_mm * np.sin(2.2 * moved[:, 2] / 70.0)
        waves = np.arange(1, 7)
        moved[:, 2] += (self.wave_size * np.sin(waves * moved[:, 2:3] / 32.0 + self.wave_phase)).sum(axis=1)
        for reach_mm, nodes in self.wrinkles:
            index = ((points_lps_mm - middle + WRINKLED_MM) / reach_mm).T
            moved += np.stack([ndimage.map_coordinates(axis, index, order=1, mode="nearest") for axis in nodes], axis=1)
        return self.joints.to_atlas(moved + middle)

    def places(self, grid: Grid) -> Tensor:
        """Where in the atlas each voxel of the grid takes its tissue: `(Z, Y, X, 3)` of `grid_sample`."""
        shape = tuple(int(np.ceil(n * mm / NODE_MM)) + 1 for n, mm in zip(grid.shape, grid.spacing_mm, strict=True))
        axes = [np.linspace(0, n - 1, m) for n, m in zip(grid.shape, shape, strict=True)]
        nodes = grid.to_lps_mm(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
        index = self.atlas.grid.to_index(self.to_atlas(nodes))
        unit = 2 * index / (np.asarray(self.atlas.bones.shape) - 1) - 1
        coarse = torch.from_numpy(unit[:, ::-1].copy().reshape(*shape, 3)).float().permute(3, 0, 1, 2)[None]
        return F.interpolate(coarse, size=grid.shape, mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)


def straighten(points: FloatArray, axis: int, curve: float, reach: float) -> None:
    """Undoes, in place, a bend that turns discs with the neck, which shearing it would not do.

    points: `(n, 3)`, x, y and z from the middle. axis: towards which it is bent, 0 or 1. curve: of an arc that reaches
    so far up and down; beyond it all is straight. All in one unit of length.
    """
    radius, side = 1 / max(abs(curve), 1e-6), np.sign(curve)
    inward, up = radius - side * points[:, axis], points[:, 2].copy()
    angle = np.arctan2(up, inward).clip(-reach / radius, reach / radius)
    points[:, axis] = side * (radius - inward * np.cos(angle) - up * np.sin(angle))
    points[:, 2] = radius * angle + up * np.cos(angle) - inward * np.sin(angle)


def _look_up(voxels: NDArray[np.uint8], places: Tensor) -> Tensor:
    """Nearest labels, uint8."""
    values = torch.from_numpy(voxels).float()[None, None]
    return F.grid_sample(values, places[None], mode="nearest", align_corners=True)[0, 0].to(torch.uint8)


def _look_up_smooth(voxels: NDArray[np.float16], places: Tensor) -> Tensor:
    # Far outside, grid_sample answers 0: the surface of a bone. Distances are shifted so that it means "far".
    values = torch.from_numpy(voxels).float()[None, None] + body.MAX_DISTANCE_MM
    return F.grid_sample(values, places[None], mode="bilinear", align_corners=True)[0, 0] - body.MAX_DISTANCE_MM


def _paint(bones: Tensor, distance: Tensor, tissues: Tensor, spacing_mm: float, rng: np.random.Generator) -> Tensor:
    """HU of every voxel: soft tissues first, then bone with its shell."""
    uniform = rng.uniform
    base = torch.tensor(
        [
            -1000.0,
            uniform(-130, -60),
            uniform(20, 85),
            uniform(-60, 40),
            uniform(20, 45),
            uniform(-900, -700),
            uniform(25, 55),
            uniform(0, 25),
            uniform(20, 150),
            uniform(25, 60) if rng.random() < 0.5 else uniform(80, 420),
            uniform(-20, 110),
            uniform(60, 350),
        ]
    )
    hu = base[tissues.long()]
    # Between the muscles lies fat, in streaks and pads that no atlas names.
    streaks = _texture(hu.shape, spacing_mm, uniform(5, 14), rng)
    fatty = (tissues == body.MUSCLE) & (streaks > uniform(0.3, 1.6))
    hu = torch.where(fatty, base[body.FAT], hu)
    hu = hu + 8 * _texture(hu.shape, spacing_mm, uniform(3, 10), rng) * (tissues != body.AIR)
    return _paint_bones(hu, bones, distance, spacing_mm, rng)


def _paint_bones(hu: Tensor, bones: Tensor, distance: Tensor, spacing_mm: float, rng: np.random.Generator) -> Tensor:
    count = body.BONE_OTHER + 1
    marrow = torch.from_numpy(rng.uniform(60, 420) * rng.uniform(0.8, 1.2, size=count)).float()
    cortex = torch.from_numpy(rng.uniform(350, 1400) * rng.uniform(0.85, 1.15, size=count)).float()
    marrow[body.BONE_SKULL :] += rng.uniform(0, 400)
    cortex = torch.maximum(cortex, marrow + 100)
    shell_mm: Tensor | float = rng.uniform(0.6, 2.6)
    # Cortex is thick here and thin there, marrow dense here and empty there, over far more than its texture.
    if rng.random() < SHARE_UNEVEN:
        shell_mm = shell_mm * torch.exp(rng.uniform(0, 0.5) * _texture(hu.shape, spacing_mm, rng.uniform(6, 20), rng))
    numbers = bones.long()
    spongy = 1 + rng.uniform(0, 0.35) * _texture(hu.shape, spacing_mm, rng.uniform(2, 5), rng)
    if rng.random() < SHARE_UNEVEN:
        spongy = spongy + rng.uniform(0, 0.4) * _texture(hu.shape, spacing_mm, rng.uniform(5, 15), rng)
    inside = marrow[numbers] * spongy + (cortex - marrow)[numbers] * torch.exp(-((distance / shell_mm).clamp(0) ** 2))
    share = (distance / spacing_mm + 0.5).clamp(0, 1) * (bones > 0)
    return hu * (1 - share) + inside * share


def _texture(shape: torch.Size, spacing_mm: float, reach_mm: float, rng: np.random.Generator) -> Tensor:
    """Smooth noise of about unit size that changes over `reach_mm`."""
    coarse = [max(2, int(np.ceil(n * spacing_mm / reach_mm)) + 1) for n in shape]
    values = torch.from_numpy(rng.normal(size=(1, 1, *coarse)).astype(np.float32))
    return 1.5 * F.interpolate(values, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]


def _aux(bones: Tensor, distance: Tensor, tissues: Tensor) -> Tensor:
    aux = torch.zeros_like(bones)
    aux[tissues == body.CORD] = AUX_CORD
    solid = distance > 0
    aux[solid & (bones == body.BONE_SKULL)] = AUX_SKULL
    aux[solid & (bones == body.BONE_MANDIBLE)] = AUX_MANDIBLE
    return aux


def _averaged(
    hu: Tensor, share: Tensor, level: Tensor, aux: Tensor, factor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All on the coarser grid: HU and share averaged, level of most vertebra, aux of the middle voxel."""
    if factor == 1:
        return hu, share, level, aux
    pooled = F.avg_pool3d(torch.stack([hu, share])[None], factor)[0]
    # The level of the voxel with most vertebra in it decides, so that no mean of two levels appears.
    key = F.max_pool3d((share * 64).round()[None] * 16 + level[None], factor)[0]
    middle = factor // 2
    return pooled[0], pooled[1], key.remainder(16), aux[middle::factor, middle::factor, middle::factor]


def _scanned(hu: Tensor, spacing_mm: float, rng: np.random.Generator) -> Tensor:
    """As a scanner would show it: blurred, thick slices, streaked, noisy."""
    in_plane_mm, along_mm = rng.uniform(0.3, 1.6), rng.choice([rng.uniform(0.3, 1.0), rng.uniform(0.8, 2.2)])
    hu = _blurred(hu, (along_mm / spacing_mm, in_plane_mm / spacing_mm, in_plane_mm / spacing_mm))
    body_part = hu > -600
    noise = torch.from_numpy(rng.normal(size=hu.shape).astype(np.float32))
    hu = hu + noise * rng.uniform(0, 45)
    if rng.random() < 0.4:
        hu = hu + _shoulder_streaks(hu.shape, rng)
    if rng.random() < 0.25:
        hu = _dental_metal(hu, rng)
    return torch.where(body_part, hu, torch.maximum(hu * 0.3 - 700, torch.tensor(AIR_HU)))


def _blurred(hu: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    for axis, sigma in enumerate(sigmas):
        if sigma < 0.2:
            continue
        reach = max(1, int(np.ceil(2.5 * sigma)))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        moved = hu.movedim(axis, -1)
        flat = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (reach, reach), mode="replicate")
        hu = F.conv1d(flat, (kernel / kernel.sum())[None, None]).reshape(moved.shape).movedim(-1, axis)
    return hu


def _shoulder_streaks(shape: torch.Size, rng: np.random.Generator) -> Tensor:
    """Noise drawn out from side to side in the lower slices, where the shoulders are."""
    noise = torch.from_numpy(rng.normal(size=(shape[0], shape[1], 1)).astype(np.float32))
    fades = torch.linspace(1, -1, shape[0]).add(rng.uniform(-0.6, 0.4)).clamp(0, 1)
    return (noise * fades[:, None, None] * rng.uniform(10, 90)).expand(*shape)


def _dental_metal(hu: Tensor, rng: np.random.Generator) -> Tensor:
    """Some bright dots in the front third, with rays through their slices."""
    z = int(rng.integers(hu.shape[0] // 4, hu.shape[0]))
    y, x = torch.meshgrid(torch.arange(hu.shape[1]), torch.arange(hu.shape[2]), indexing="ij")
    for _ in range(int(rng.integers(1, 5))):
        cy, cx = rng.uniform(0, hu.shape[1] / 3), rng.uniform(0.3, 0.7) * hu.shape[2]
        angle = torch.atan2(y - cy, x - cx)
        away = torch.hypot(y - cy, x - cx)
        rays = torch.cos(angle * int(rng.integers(3, 12)) + rng.uniform(0, 6)) * 300 / (1 + away / 6)
        for dz in (-1, 0, 1):
            if 0 <= z + dz < hu.shape[0]:
                hu[z + dz] = hu[z + dz] + rays * rng.uniform(0.2, 1)
                hu[z + dz][away < 1.5] = 3000
    return hu
