"""Measures of a vertebra from its mask, against vertebrae whose measures are known."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from model import Grid, body_heights, find_midline
from model.phantom import Anatomy, render

GRID = Grid.axial(shape=(80, 140, 100), spacing_mm=(0.5, 0.5, 0.5))


def vertebra(anterior_mm: float = 12.0, posterior_mm: float = 12.0, turn: Rotation | None = None) -> NDArray[np.bool_]:
    """A body 24 mm wide and 16 mm deep with straight endplates, a canal 14 mm deep, an arch, on `GRID`."""
    points = GRID.to_lps_mm(np.stack(np.indices(GRID.shape), axis=-1).astype(float))
    x, y, z = np.moveaxis((turn or Rotation.identity()).inv().apply(points.reshape(-1, 3)).reshape(points.shape), -1, 0)
    half = (anterior_mm + (posterior_mm - anterior_mm) * (y + 16) / 16) / 2
    body = (np.abs(x) < 12) & (y > -16) & (y < 0) & (np.abs(z) < half)
    canal = (np.abs(x) < 10) & (y >= 0) & (y < 14)
    ring = (np.abs(x) < 16) & (y >= -4) & (y < 19) & (np.abs(z) < 4) & ~canal
    spine = (np.abs(x) < 3) & (y >= 14) & (y < 34) & (np.abs(z) < 6)
    return body | ring | spine


@pytest.mark.parametrize("tilt_deg", [-15, 0, 25])
@pytest.mark.parametrize("yaw_deg", [0, 20])
@pytest.mark.parametrize(("anterior_mm", "posterior_mm"), [(12.0, 12.0), (6.0, 12.0)], ids=["intact", "wedge"])
def test_heights_of_a_body_are_those_it_was_drawn_with(
    anterior_mm: float, posterior_mm: float, yaw_deg: float, tilt_deg: float
) -> None:
    turn = Rotation.from_euler("xz", [tilt_deg, yaw_deg], degrees=True)
    found = body_heights(vertebra(anterior_mm, posterior_mm, turn), GRID)
    assert found is not None
    span = posterior_mm - anterior_mm
    expected = [anterior_mm + share * span for share in (1 / 6, 1 / 2, 5 / 6)]
    assert [found.anterior_mm, found.middle_mm, found.posterior_mm] == pytest.approx(expected, abs=0.5)
    assert found.ratio == pytest.approx(expected[0] / expected[2], abs=0.06)


def test_no_heights_are_told_of_thick_slices_or_of_what_bulges() -> None:
    mask = vertebra(12.0, 12.0)
    thick = Grid.axial(shape=(16, 140, 100), spacing_mm=(2.5, 0.5, 0.5))
    assert body_heights(mask[::5], thick) is None
    x, y, z = np.moveaxis(GRID.to_lps_mm(np.stack(np.indices(GRID.shape), axis=-1).astype(float)), -1, 0)
    bulge = (np.abs(x) < 12) & (np.abs(y + 8) < 4) & (np.abs(z) < 10)
    assert body_heights(mask, GRID) is not None
    assert body_heights(mask | bulge, GRID) is None


@pytest.mark.parametrize("level", ["C3", "C5", "C7"])
def test_heights_of_the_phantom_s_bodies_are_those_of_its_anatomy(level: str) -> None:
    anatomy = Anatomy.random(2)
    (bone,) = (bone for bone in anatomy.bones if bone.name == level)
    to_lps = anatomy.pose @ bone.to_patient
    x, y, z = (float(value) for value in to_lps[:3, 3] + (0, 20, 0))
    grid = Grid.axial(shape=(64, 150, 140), spacing_mm=(0.8, 0.5, 0.5), centre_lps_mm=(x, y, z))
    found = body_heights(render(anatomy, grid).vertebrae == bone.label, grid)
    assert found is not None

    across, _, along = np.linalg.norm(to_lps[:3, :3], axis=0)
    u, v, w = np.meshgrid(np.arange(-4, 4.1) / across, np.arange(-16, 16, 0.2), np.arange(-16, 16, 0.1), indexing="ij")
    solid = bone.shape.parts[0].solid
    inside = solid.distance_mm(u.astype(np.float32), v.astype(np.float32), w.astype(np.float32)) < 0
    high = inside.sum(axis=2).mean(axis=0) * 0.1 * along
    high = high[high > np.median(high[high > 2]) / 2]
    places = (np.arange(len(high)) + 0.5) / len(high)
    truth = [float(high[np.abs(places - at) <= 1 / 12].mean()) for at in (1 / 6, 1 / 2, 5 / 6)]
    assert [found.anterior_mm, found.middle_mm, found.posterior_mm] == pytest.approx(truth, abs=0.6)


def test_the_midline_follows_the_turn_of_the_head_and_tells_left_from_right() -> None:
    mask = vertebra(turn=Rotation.from_euler("z", 24, degrees=True))
    midline = find_midline(GRID.to_lps_mm(np.argwhere(mask).astype(float)))
    assert midline is not None
    angle_deg = np.degrees(np.arctan2(midline.left[1], midline.left[0]))
    assert angle_deg == pytest.approx(24, abs=2)
    assert midline.to_left_mm(np.array([30.0, 0.0, 0.0])) > 20
    assert midline.to_left_mm(np.array([-30.0, 0.0, 0.0])) < -20


def test_a_vertebra_without_half_its_arch_has_no_midline() -> None:
    mask = vertebra()
    mask[:, 60:, :50] = False  # the arch on one side
    assert find_midline(GRID.to_lps_mm(np.argwhere(mask).astype(float))) is None
