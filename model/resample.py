"""From the source grid to the grids the networks see, and back, through full affines (oblique, sheared, reversed).

No float copy of a whole Series is ever made: pooling goes by slabs, sampling by boxes. Used by `model/segment.py`,
`model/classify.py` and the training data in `training/`.
"""

import math
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from model.geometry import FloatArray, Grid

Scalar = TypeVar("Scalar", bound=np.generic)

AIR_HU = -1024.0
"""What lies outside the field of view."""

BODY_HU = -400
"""Voxels above it are body (or table); used to leave air out of the network's way."""

CONTINUED_BONE_HU, SOFT_HU = 150.0, 40.0
"""Of slices that are `continued`, what is brighter becomes soft tissue."""

HALF_WIDTH_MM = 100.0
"""The spine is sought this far to the left and right of the body's middle: arms and shoulders cost time, not more."""


def lps_grid(*, lower_lps_mm: FloatArray, upper_lps_mm: FloatArray, spacing_mm: float, multiple: int = 1) -> Grid:
    """An isotropic grid along the patient's axes over a box; sides are rounded up to `multiple` voxels.

    Z runs foot to head, Y front to back, X right to left: the affine is a permutation with one spacing.
    """
    extent_mm = np.asarray(upper_lps_mm, float) - np.asarray(lower_lps_mm, float)
    counts_xyz = np.maximum(np.ceil(extent_mm / spacing_mm / multiple).astype(int), 1) * multiple
    shape = (int(counts_xyz[2]), int(counts_xyz[1]), int(counts_xyz[0]))
    centre = (np.asarray(lower_lps_mm, float) + np.asarray(upper_lps_mm, float)) / 2
    return Grid.axial(shape=shape, spacing_mm=(spacing_mm,) * 3, centre_lps_mm=tuple(centre))


def pool_factors(grid: Grid, target_mm: float) -> tuple[int, int, int]:
    """How many voxels to average along each axis so that sampling at `target_mm` does not alias."""
    # 1e-6: a spacing of 0.1 + 0.2 must not lose a factor to rounding. At least 2 voxels stay along each axis.
    sizes = zip(grid.spacing_mm, grid.shape, strict=True)
    z, y, x = (max(1, min(int(target_mm / spacing + 1e-6), size // 2)) for spacing, size in sizes)
    return z, y, x


def pooled_grid(grid: Grid, factors: tuple[int, int, int]) -> Grid:
    """The grid of block means: voxel i covers source voxels `factor * i` to `factor * i + factor - 1`."""
    affine = grid.affine.copy()
    affine[:3, 3] += grid.affine[:3, :3] @ ((np.asarray(factors) - 1) / 2)
    affine[:3, :3] *= np.asarray(factors)
    z, y, x = (size // factor for size, factor in zip(grid.shape, factors, strict=True))
    return Grid(shape=(z, y, x), affine=affine)


def average_pool(voxels_hu: NDArray[np.int16], factors: tuple[int, int, int], slab: int = 12) -> Tensor:
    """Block means, float32 `(Z', Y', X')`, by slabs; what does not fill a block at the far ends is left out."""
    z, y, x = (size // factor * factor for size, factor in zip(voxels_hu.shape, factors, strict=True))
    step = max(1, slab // factors[0]) * factors[0]
    slabs = []
    for first in range(0, z, step):
        sums = torch.from_numpy(np.ascontiguousarray(voxels_hu[first : min(first + step, z), :y, :x]))
        # Axis after axis: whole planes are added fastest and leave less to add. Where planes are added (factor 3), 3
        # times as fast as avg_pool3d; with a first factor of 1, no faster.
        for axis, factor in enumerate(factors):
            sums = _block_sums(sums, axis, factor)
        slabs.append(sums)
    return torch.cat(slabs) / math.prod(factors)


def _block_sums(voxels: Tensor, axis: int, factor: int) -> Tensor:
    """Sums of `factor` neighbours along an axis, float32."""
    blocks = voxels.reshape(*voxels.shape[:axis], -1, factor, *voxels.shape[axis + 1 :])
    sums: Tensor = blocks.select(axis + 1, 0).to(torch.float32, copy=factor > 1)
    for k in range(1, factor):
        sums += blocks.select(axis + 1, k)
    return sums


def sample(voxels: Tensor, source: Grid, target: Grid, *, nearest: bool = False) -> Tensor:
    """`voxels` (float32, `(C, Z, Y, X)` on `source`) at the voxel centres of `target`, `(C, Z', Y', X')`; 0 outside."""
    index = np.linalg.inv(source.affine) @ target.affine
    along = np.abs(index[:3, :3]) > 1e-5 * np.abs(index[:3, :3]).max()
    if not nearest and (along.sum(axis=0) == 1).all() and (along.sum(axis=1) == 1).all():
        return _sample_along_axes(voxels, index, along.argmax(axis=1), target.shape)
    if 1 in target.shape:  # affine_grid warns of these
        z, y, x = (max(size, 2) for size in target.shape)
        twice = sample(voxels, source, Grid(shape=(z, y, x), affine=target.affine), nearest=nearest)
        return twice[:, : target.shape[0], : target.shape[1], : target.shape[2]]
    # grid_sample wants (x, y, z) normalised so that -1 and 1 are the centres of the first and last voxel.
    matrix = _index_to_unit(source.shape) @ index @ _unit_to_index(target.shape)
    matrix_xyz = matrix[:3][::-1][:, [2, 1, 0, 3]]
    theta = torch.from_numpy(np.ascontiguousarray(matrix_xyz)).to(voxels.device, torch.float32)
    points = F.affine_grid(theta[None], [1, 1, *target.shape], align_corners=True)
    mode = "nearest" if nearest else "bilinear"
    return F.grid_sample(voxels[None], points, mode=mode, align_corners=True)[0]


def _sample_along_axes(
    voxels: Tensor, index: FloatArray, target_axes: NDArray[np.int64], shape: tuple[int, int, int]
) -> Tensor:
    """`sample` of a grid whose axes run along those of the target, one axis after the other: ten times as fast.

    index: `(4, 4)`, target index to source index. target_axes: for each source axis, the target axis along it.
    """
    for source_axis, target_axis in enumerate(target_axes):
        position = torch.from_numpy(
            index[source_axis, target_axis] * np.arange(shape[target_axis]) + index[source_axis, 3]
        )
        # The axis to contract is always the first behind the channels: each result goes to the end.
        away = (position[:, None] - torch.arange(voxels.shape[1])).abs()
        weights = (1 - away).clamp(min=0).to(voxels)
        voxels = torch.tensordot(voxels, weights, dims=([1], [1]))
    return voxels.permute(0, *(1 + int(axis) for axis in np.argsort(target_axes)))


def _unit_to_index(shape: tuple[int, int, int]) -> FloatArray:
    """Matrix from [-1, 1] coordinates to voxel indices."""
    half = (np.asarray(shape) - 1) / 2
    matrix = np.diag([*half, 1.0])
    matrix[:3, 3] = half
    return matrix


def _index_to_unit(shape: tuple[int, int, int]) -> FloatArray:
    half = (np.asarray(shape) - 1) / 2
    if half.min() == 0:
        raise ValueError(f"A volume of shape {shape} has a single voxel along an axis; at least 2 are needed.")
    matrix = np.diag([*(1 / half), 1.0])
    matrix[:3, 3] = -1.0
    return matrix


def body_volume(
    voxels_hu: NDArray[np.int16], grid: Grid, spacing_mm: float, multiple: int, continued_mm: float = 0.0
) -> tuple[Tensor, Grid]:
    """HU, float32 `(Z, Y, X)`, on an isotropic LPS-aligned grid over the middle of the body, and that grid.

    Air, table and what lies further than HALF_WIDTH_MM to the side are cropped; outside the source's field of view is
    air, but for `continued_mm` towards the feet (see `continued`). Sides are multiples of `multiple`.
    """
    factors = pool_factors(grid, spacing_mm)
    pooled, on = average_pool(voxels_hu, factors), pooled_grid(grid, factors)
    if continued_mm:
        pooled, on = continued(pooled, on, continued_mm)
    points = on.to_lps_mm(_body(pooled.numpy()))
    lower, upper = points.min(axis=0), points.max(axis=0)
    middle_mm = float(np.median(points[:, 0]))
    lower[0], upper[0] = max(lower[0], middle_mm - HALF_WIDTH_MM), min(upper[0], middle_mm + HALF_WIDTH_MM)
    target = lps_grid(lower_lps_mm=lower, upper_lps_mm=upper, spacing_mm=spacing_mm, multiple=multiple)
    return sample((pooled - AIR_HU)[None], on, target)[0] + AIR_HU, target


def continued(hu: Tensor, grid: Grid, length_mm: float) -> tuple[Tensor, Grid]:
    """HU `(Z, Y, X)` with so much more towards the feet: the last slice again and again, its bone made soft tissue."""
    num = round(length_mm / grid.spacing_mm[0])
    is_foot_first = grid.affine[2, 0] > 0
    last = hu[0 if is_foot_first else -1]
    more = torch.where(last > CONTINUED_BONE_HU, SOFT_HU, last).expand(num, *last.shape)
    longer = torch.cat([more, hu] if is_foot_first else [hu, more])
    return longer, grid.part(np.array([-num if is_foot_first else 0, 0, 0]), tuple(longer.shape))


def _body(pooled_hu: NDArray[np.float32]) -> FloatArray:
    """Indices `(n, 3)` of the largest connected part that is not air: the body, not the table; of all if all is air."""
    components, num_components = ndimage.label(pooled_hu > BODY_HU)
    if num_components == 0:
        return np.argwhere(np.ones(pooled_hu.shape, bool)).astype(float)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return np.argwhere(components == sizes.argmax()).astype(float)


def crop_to_box(
    voxels: NDArray[Scalar], grid: Grid, lower_lps_mm: FloatArray, upper_lps_mm: FloatArray, margin: int = 2
) -> tuple[NDArray[Scalar], Grid]:
    """A view of the part of the source that covers an LPS box, and its grid; at least 2 voxels along each axis."""
    first, last = index_range(grid, lower_lps_mm, upper_lps_mm, margin)
    part = voxels[first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    return part, grid.part(first, part.shape)


def index_range(
    grid: Grid, lower_lps_mm: FloatArray, upper_lps_mm: FloatArray, margin: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one-past-last voxel index `(z, y, x)` of the part of `grid` that covers an LPS box."""
    corners = np.stack(np.meshgrid(*zip(lower_lps_mm, upper_lps_mm, strict=True), indexing="ij"), axis=-1)
    indices = grid.to_index(corners.reshape(-1, 3))
    size = np.asarray(grid.shape)
    first = np.clip(np.floor(indices.min(axis=0)).astype(np.int64) - margin, 0, size - 2)
    last = np.clip(np.ceil(indices.max(axis=0)).astype(np.int64) + margin + 1, first + 2, size)
    return first, last
