"""Resampling: a voxel's value must come from where it lies in the patient, whatever the grids."""

import numpy as np
import pytest
import torch

from model.geometry import FloatArray, Grid
from model.resample import (
    AIR_HU,
    average_pool,
    body_volume,
    continued,
    crop_to_box,
    lps_grid,
    pool_factors,
    pooled_grid,
    sample,
)

PLAIN = np.array([[0, 0, 0.6], [0, 0.7, 0], [1.1, 0, 0]])
TURNED = PLAIN[[1, 2, 0]]
REVERSED = PLAIN * [[-1, 1, -1]]
OBLIQUE = np.array([[0.1, 0.05, 0.6], [-0.2, 0.7, -0.05], [1.1, 0.15, 0.1]])
SHEARED = PLAIN + np.array([[0, 0, 0], [0.3, 0, 0], [0, 0, 0]])


def make_grid(linear: FloatArray, shape: tuple[int, int, int] = (24, 30, 28)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = np.array([3.0, -5.0, 7.0]) - linear @ ((np.array(shape) - 1) / 2)
    return Grid(shape=shape, affine=affine)


def ramp(grid: Grid) -> np.ndarray:
    """A field that is linear in the patient, so that interpolation and block means are exact."""
    x, y, z = np.moveaxis(grid.to_lps_mm(np.moveaxis(np.indices(grid.shape), 0, -1).astype(float)), -1, 0)
    return 100 + 3 * x - 2 * y + 5 * z


@pytest.mark.parametrize("linear", [PLAIN, TURNED, REVERSED, OBLIQUE, SHEARED])
def test_sampling_reads_each_point_where_it_lies_in_the_patient(linear: FloatArray) -> None:
    source = make_grid(linear)
    target = lps_grid(lower_lps_mm=np.array([0, -8, 3]), upper_lps_mm=np.array([6, -2, 11]), spacing_mm=0.9)

    sampled = sample(torch.from_numpy(ramp(source)).float()[None], source, target)[0]

    np.testing.assert_allclose(sampled.numpy(), ramp(target), atol=1e-2)


@pytest.mark.parametrize("linear", [PLAIN, REVERSED, OBLIQUE, SHEARED])
def test_pooled_voxels_lie_at_the_middle_of_their_blocks(linear: FloatArray) -> None:
    source = make_grid(linear)
    factors = (2, 3, 4)

    pooled = average_pool(np.rint(ramp(source) * 50).astype(np.int16), factors, slab=5)

    assert tuple(pooled.shape) == pooled_grid(source, factors).shape == (12, 10, 7)
    np.testing.assert_allclose(pooled.numpy() / 50, ramp(pooled_grid(source, factors)), atol=0.02)


def test_outside_the_source_there_is_nothing() -> None:
    source = make_grid(PLAIN)
    target = lps_grid(lower_lps_mm=np.array([90, 0, 0]), upper_lps_mm=np.array([99, 9, 9]), spacing_mm=1)

    assert (sample(torch.ones(1, *source.shape), source, target) == 0).all()


def test_sampling_a_single_slice_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 30, 28\)"):
        sample(torch.ones(1, 1, 30, 28), make_grid(OBLIQUE, (1, 30, 28)), make_grid(PLAIN))


def test_pooling_never_averages_past_the_target_spacing_or_down_to_one_voxel() -> None:
    grid = Grid.axial(shape=(3, 100, 100), spacing_mm=(0.5, 0.5, 0.7))

    assert pool_factors(grid, 2.5) == (1, 5, 3)


@pytest.mark.parametrize("linear", [PLAIN, REVERSED, OBLIQUE, SHEARED])
def test_body_volume_leaves_air_out_and_keeps_the_body_in_place(linear: FloatArray) -> None:
    source = make_grid(linear, (40, 60, 60))
    voxels = np.full(source.shape, AIR_HU, np.int16)
    voxels[8:30, 20:50, 10:40] = 40
    truth = source.to_lps_mm(np.argwhere(voxels == 40).astype(float))

    body, grid = body_volume(voxels, source, 2.0, multiple=4)

    assert all(size % 4 == 0 for size in body.shape)
    assert grid.shape == tuple(body.shape)
    found = grid.to_lps_mm(np.argwhere(body.numpy() > -400).astype(float))
    np.testing.assert_allclose(found.mean(axis=0), truth.mean(axis=0), atol=0.7)
    whole_mm3 = np.prod(source.shape) * source.voxel_volume_mm3
    assert body.numel() * grid.voxel_volume_mm3 < 1.1 * whole_mm3


@pytest.mark.parametrize("linear", [PLAIN, REVERSED, OBLIQUE])
def test_what_is_continued_stays_in_place_and_goes_on_towards_the_feet_without_bone(linear: FloatArray) -> None:
    grid = make_grid(linear)
    voxels_hu = np.random.default_rng(0).uniform(-900, 900, grid.shape)

    tensor, there = continued(torch.from_numpy(voxels_hu), grid, 22.0)
    longer = tensor.numpy()

    num = longer.shape[0] - grid.shape[0]
    assert num == round(22.0 / grid.spacing_mm[0])
    first = np.rint(there.to_index(grid.to_lps_mm(np.zeros(3)))).astype(int)
    np.testing.assert_allclose(there.to_lps_mm(first.astype(float)), grid.to_lps_mm(np.zeros(3)), atol=1e-9)
    np.testing.assert_array_equal(longer[first[0] : first[0] + grid.shape[0]], voxels_hu)
    added = np.delete(longer, np.arange(first[0], first[0] + grid.shape[0]), axis=0)
    assert added.max() <= 150
    foot = voxels_hu[0 if linear[2, 0] > 0 else -1]
    np.testing.assert_array_equal(added, np.broadcast_to(np.where(foot > 150, 40, foot), added.shape))
    beyond = there.to_lps_mm(np.array([0.0 if linear[2, 0] > 0 else longer.shape[0] - 1.0, 0, 0]))
    assert beyond[2] < grid.to_lps_mm(np.array([[0.0, 0, 0], [23.0, 0, 0]]))[:, 2].min()


def test_a_crop_keeps_its_place() -> None:
    grid = make_grid(OBLIQUE)
    lower, upper = np.array([1.0, -7, 5]), np.array([4.0, -4, 9])

    part, part_grid = crop_to_box(ramp(grid), grid, lower, upper)

    assert part.size < np.prod(grid.shape) / 4
    np.testing.assert_allclose(part, ramp(part_grid), atol=1e-6)
    assert (part_grid.to_index((lower + upper) / 2) > 0).all()
