"""What the whole pipeline says of what is no neck, or of a neck that ends in the field of view."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from model.findings import Finding
from model.geometry import Grid
from model.pipeline import Pipeline, load_pipeline
from model.quality import reasons_not_to_judge
from model.segment import Vertebra
from model.series import read_series
from model.volume import Volume
from tests.factories import make_volume

Labels = np.ndarray
REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "ct"


@cache
def pipeline() -> Pipeline:
    return load_pipeline(device="cpu", num_threads=2)


def cylinder(hu: int) -> np.ndarray:
    y, x = np.mgrid[:80, :80] - 40
    voxels_hu = np.full((50, 80, 80), -1000, np.int16)
    voxels_hu[:, y**2 + x**2 < 30**2] = hu
    return voxels_hu + np.random.default_rng(1).normal(0, 10, voxels_hu.shape).astype(np.int16)


def lumbar() -> np.ndarray:
    """Blocks of bone, 28 mm high and 36 mm apart, in a torso 300 mm wide."""
    voxels_hu = np.full((90, 80, 110), -1000, np.int16)
    z, y, x = np.mgrid[:90, :80, :110]
    voxels_hu[((y - 40) / 36) ** 2 + ((x - 55) / 50) ** 2 < 1] = 40
    is_bone = (z % 12 < 9) & (((y - 50) / 6) ** 2 + ((x - 55) / 8) ** 2 < 1)
    voxels_hu[is_bone] = 350
    return voxels_hu


NO_NECKS = {
    "water phantom": cylinder(0),
    "plastic cylinder": cylinder(120),
    "lumbar spine": lumbar(),
    "noise": np.random.default_rng(2).integers(-1024, 3071, (60, 80, 80)).astype(np.int16),
    "zeros": np.zeros((50, 80, 80), np.int16),
}


@pytest.mark.parametrize("voxels_hu", NO_NECKS.values(), ids=NO_NECKS.keys())
def test_what_is_no_neck_gets_no_answer(voxels_hu: np.ndarray) -> None:
    z, y, x = voxels_hu.shape
    volume = make_volume(voxels_hu, Grid.axial(shape=(z, y, x), spacing_mm=(3.0, 2.0, 2.0)))

    found = pipeline().analyse(volume).findings

    assert {level.finding for level in found.levels.values()} == {Finding.UNDETERMINED}
    assert found.patient_overall.finding is Finding.UNDETERMINED
    assert found.warnings


@pytest.mark.skipif(not REAL.is_dir(), reason="real CT is not here: data/ct of the shared data")
@pytest.mark.parametrize("is_head_first", [True, False])
def test_levels_keep_their_numbers_where_the_slices_end_in_the_neck(is_head_first: bool) -> None:
    """Before air the network saw a level too many: of these slices, which end in C4, C3 was called C3 and C4."""
    volume = read_series(sorted((REAL / "pycerr_pt1").glob("*")))
    whole, _ = pipeline().segment(volume)
    seen = slice(21, None)
    labels, voxels_hu = whole[seen], volume.voxels_hu[seen]
    grid = volume.grid.part(np.array([seen.start, 0, 0]), labels.shape)
    if is_head_first:
        labels, voxels_hu = labels[::-1], voxels_hu[::-1]
        affine = grid.affine.copy()
        affine[:3, 3] = grid.to_lps_mm(np.array([grid.shape[0] - 1.0, 0, 0]))
        affine[:3, 0] *= -1
        grid = Grid(shape=grid.shape, affine=affine)

    part = make_volume(np.ascontiguousarray(voxels_hu), grid)
    found, vertebrae = pipeline().segment(part)

    both = (found > 0) & (labels > 0)
    assert (found == labels)[both].mean() > 0.93  # before: 0.78
    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4]
    assert set(reasons_not_to_judge(part, found, vertebrae)) == {4}


@pytest.mark.parametrize("is_head_first", [True, False])
def test_of_a_whole_body_the_upper_700_mm_are_looked_at(monkeypatch: pytest.MonkeyPatch, is_head_first: bool) -> None:
    voxels_hu = np.full((500, 8, 8), 40, np.int16)
    voxels_hu[-20:] = -1024  # air above the head
    grid = Grid.axial(shape=voxels_hu.shape, spacing_mm=(4.0, 2.0, 2.0))
    if is_head_first:
        voxels_hu = voxels_hu[::-1].copy()
        affine = grid.affine.copy()
        affine[:3, 3] = grid.to_lps_mm(np.array([499.0, 0, 0]))
        affine[:3, 0] *= -1
        grid = Grid(shape=grid.shape, affine=affine)
    seen: list[Volume] = []

    def find(volume: Volume, *_: object, **__: object) -> tuple[Labels, list[Vertebra]]:
        seen.append(volume)
        return np.ones(volume.grid.shape, np.uint8), []

    monkeypatch.setattr("model.pipeline.find_vertebrae", find)
    labels, _ = pipeline().segment(make_volume(voxels_hu, grid))

    planes = np.flatnonzero(labels.any(axis=(1, 2)))
    assert labels.shape == (500, 8, 8)
    assert (planes.min(), planes.max()) == ((20, 194) if is_head_first else (305, 479))
    np.testing.assert_allclose(seen[0].grid.affine[:3, 3], grid.to_lps_mm(np.array([float(planes.min()), 0, 0])))
    assert len(seen[0].slices) == 175
