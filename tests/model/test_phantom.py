"""The phantom: its truth, its place in the patient on any grid, its Hounsfield units and its DICOM Series."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import RLELossless
from scipy.ndimage import binary_dilation, label

from model.geometry import Grid
from model.levels import LEVELS
from model.phantom import FRACTURE_KINDS, Anatomy, Fracture, Phantom, default_grid, kinds_at, render, write_series


def crop_around(anatomy: Anatomy, level: str, *, spacing_mm: float = 1.0) -> Grid:
    place = anatomy.place(level)
    extent = np.array(place.upper_lps_mm) - np.array(place.lower_lps_mm) + 6
    x, y, z = (int(np.ceil(length / spacing_mm)) for length in extent)
    spacing = (spacing_mm, spacing_mm, spacing_mm)
    return Grid.axial(shape=(z, y, x), spacing_mm=spacing, centre_lps_mm=place.centre_lps_mm)


def spine_grid(anatomy: Anatomy, *, spacing_mm: float = 1.1) -> Grid:
    places = [anatomy.place(level) for level in (*LEVELS, "T1")]
    lower = np.min([place.lower_lps_mm for place in places], axis=0) - 3
    upper = np.max([place.upper_lps_mm for place in places], axis=0) + 3
    x, y, z = (int(np.ceil(length / spacing_mm)) for length in upper - lower)
    spacing, middle = (spacing_mm, spacing_mm, spacing_mm), (lower + upper) / 2
    return Grid.axial(shape=(z, y, x), spacing_mm=spacing, centre_lps_mm=(middle[0], middle[1], middle[2]))


def voxel_at(phantom: Phantom, points_lps_mm: NDArray[np.float64]) -> tuple[NDArray[np.intp], ...]:
    indices = np.rint(phantom.grid.to_index(points_lps_mm)).astype(int)
    return tuple(indices.T)


def frame_point(anatomy: Anatomy, bone_name: str, point_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    bone = next(bone for bone in anatomy.bones if bone.name == bone_name)
    return (anatomy.pose @ bone.to_patient @ np.array([*point_mm, 1.0]))[:3]


@pytest.fixture(scope="module")
def neck() -> Phantom:
    anatomy = Anatomy.random(3)
    return render(anatomy, spine_grid(anatomy))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_truth_has_every_level_once_and_in_order_from_head_to_foot(seed: int) -> None:
    anatomy = Anatomy.random(seed)
    phantom = render(anatomy, spine_grid(anatomy))
    heights = []
    for number in range(1, 9):
        mask = phantom.vertebrae == number
        assert mask.sum() > 2500, f"label {number} is nearly empty"
        assert label(mask, np.ones((3, 3, 3)))[1] == 1, f"label {number} is in pieces"
        heights.append(np.nonzero(mask)[0].mean())
    assert heights == sorted(heights, reverse=True)
    assert phantom.vertebrae.max() == 8
    assert not phantom.fractures.any()


def test_places_hold_their_vertebrae(neck: Phantom) -> None:
    places = Anatomy.random(3).places
    assert tuple(places) == LEVELS
    for number, level in enumerate(LEVELS, start=1):
        points = neck.grid.to_lps_mm(np.argwhere(neck.vertebrae == number).astype(float))
        assert (points >= np.array(places[level].lower_lps_mm) - 1).all()
        assert (points <= np.array(places[level].upper_lps_mm) + 1).all()


def test_hounsfield_units_are_those_of_a_neck(neck: Phantom) -> None:
    anatomy = Anatomy.random(3)
    quiet = render(anatomy, neck.grid, noise_hu=0)
    hu = quiet.voxels_hu
    airway = frame_point(anatomy, "C4", (0, 0, 0)) + (anatomy.pose[:3, :3] @ np.array([0, -23, 0]))
    for point in (airway, (0, -400, 0), (0, 400, 0)):
        box = Grid.axial(shape=(1, 1, 1), spacing_mm=(1, 1, 1), centre_lps_mm=tuple(point))
        assert render(anatomy, box, noise_hu=0).voxels_hu.max() < -900
    canal = [frame_point(anatomy, level, (0, 16, 0)) for level in ("C3", "C4", "C5", "C6")]
    cord = hu[voxel_at(quiet, np.array(canal))]
    assert ((cord >= 20) & (cord <= 60)).all(), cord
    for number in range(1, 9):
        bone = hu[quiet.vertebrae == number]
        assert np.percentile(bone, 90) > 300
        assert 100 < np.median(bone) < 1400
    assert 10 < (neck.voxels_hu.astype(int) - hu)[-20:].std() < 14


def test_calcified_node_lies_on_the_left_of_the_patient() -> None:
    anatomy = Anatomy.random(4)
    grid = crop_around(anatomy, "C3")
    hu = render(anatomy, grid, noise_hu=0).voxels_hu
    x, y, z = next(bone for bone in anatomy.bones if bone.name == "C3").to_patient[:3, 3]
    left, right = ((anatomy.pose @ np.array([x + dx, y - 1, z - 2, 1.0]))[:3] for dx in (37, -37))
    wide = Grid.axial(shape=(3, 3, 3), spacing_mm=(1, 1, 1), centre_lps_mm=tuple(left))
    assert render(anatomy, wide, noise_hu=0).voxels_hu.mean() > 200
    wide = Grid.axial(shape=(3, 3, 3), spacing_mm=(1, 1, 1), centre_lps_mm=tuple(right))
    assert render(anatomy, wide, noise_hu=0).voxels_hu.mean() < 150
    assert left[0] > right[0]
    assert hu.max() > 300


ALL_FRACTURES = [(level, kind) for level in LEVELS for kind in kinds_at(level)]


@pytest.mark.parametrize(("level", "kind"), ALL_FRACTURES)
def test_fracture_is_a_dark_gap_inside_its_vertebra(level: str, kind: str) -> None:
    number = LEVELS.index(level) + 1
    fracture = Fracture(level=level, kind=kind, width_mm=1.6)
    anatomy = Anatomy.random(number, [fracture])
    grid = crop_around(anatomy, level)
    broken = render(anatomy, grid)
    intact = render(Anatomy.random(number), grid)
    gap = broken.fractures == number
    assert set(np.unique(broken.fractures)) == {0, number}
    assert gap.sum() > 20
    assert not gap[~binary_dilation(broken.vertebrae == number)].any()
    around = binary_dilation(gap, iterations=4) & (broken.vertebrae == number) & ~binary_dilation(gap, iterations=2)
    assert broken.voxels_hu[gap].mean() < broken.voxels_hu[around].mean() - 100
    assert broken.voxels_hu[gap].mean() < intact.voxels_hu[gap].mean() - 80
    assert not intact.fractures.any()


def test_fracture_changes_nothing_far_from_it() -> None:
    broken, intact = Anatomy.random(5, [Fracture(level="C6", kind="spinous")]), Anatomy.random(5)
    grid = crop_around(intact, "C3", spacing_mm=1.0)
    assert np.array_equal(render(broken, grid).voxels_hu, render(intact, grid).voxels_hu)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"level": "C9", "kind": "body"}, "C9"),
        ({"level": "C4", "kind": "dens"}, "dens"),
        ({"level": "C3", "kind": "ring"}, "ring"),
        ({"level": "C1", "kind": "lamina"}, "lamina"),
        ({"level": "C2", "kind": "splinter"}, "splinter"),
        ({"level": "C2", "kind": "dens", "width_mm": 0.0}, "0.0 mm"),
    ],
)
def test_impossible_fracture_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Fracture(**fields)  # type: ignore[arg-type]


def test_every_kind_of_fracture_exists_somewhere() -> None:
    assert {kind for level in LEVELS for kind in kinds_at(level)} == set(FRACTURE_KINDS)


def test_same_seed_gives_the_same_voxels_and_another_seed_another_patient() -> None:
    grid = Grid.axial(shape=(20, 60, 60), spacing_mm=(2, 2, 2))
    first, again, other = (render(Anatomy.random(seed), grid).voxels_hu for seed in (8, 8, 9))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    noisier = render(Anatomy.random(8), grid, seed=1).voxels_hu
    assert not np.array_equal(first, noisier)


def _reversed(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, 0] * (grid.shape[0] - 1)
    affine[:3, 0] *= -1
    return Grid(shape=grid.shape, affine=affine)


def _flipped_in_plane(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    for axis in (1, 2):
        affine[:3, 3] += affine[:3, axis] * (grid.shape[axis] - 1)
        affine[:3, axis] *= -1
    return Grid(shape=grid.shape, affine=affine)


def _oblique(grid: Grid) -> Grid:
    angle = np.deg2rad(25)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    turn = turn @ np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
    centre = grid.to_lps_mm((np.array(grid.shape) - 1) / 2)
    affine = grid.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2)
    return Grid(shape=grid.shape, affine=affine)


def _sheared(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    affine[1, 0] += 0.3 * affine[2, 0]
    affine[:3, 3] -= np.array([0, 0.3 * affine[2, 0], 0]) * (grid.shape[0] - 1) / 2
    return Grid(shape=grid.shape, affine=affine)


@pytest.mark.parametrize("change", [_reversed, _flipped_in_plane, _oblique, _sheared])
def test_other_acquisition_puts_labels_at_the_same_place_in_the_patient(change) -> None:  # type: ignore[no-untyped-def]
    anatomy = Anatomy.random(6, [Fracture(level="C5", kind="lamina", width_mm=2.0)])
    plain = render(anatomy, Grid.axial(shape=(110, 110, 110), spacing_mm=(1, 1, 1)), noise_hu=0)
    changed = render(anatomy, change(plain.grid), noise_hu=0)
    for truth, share in (("vertebrae", 0.93), ("fractures", 0.6)):
        mask, there = getattr(changed, truth), getattr(plain, truth)
        inside = np.argwhere(mask > 0)
        assert len(inside) > 15
        target = plain.grid.to_index(changed.grid.to_lps_mm(inside.astype(float)))
        kept = ((target >= 0) & (target <= np.array(plain.grid.shape) - 1)).all(axis=1)
        values = there[tuple(np.rint(target[kept]).astype(int).T)]
        assert kept.mean() > 0.4
        assert (values == mask[tuple(inside[kept].T)]).mean() > share
    if change in (_reversed, _flipped_in_plane):
        flip = (
            (slice(None, None, -1),)
            if change is _reversed
            else (slice(None), slice(None, None, -1), slice(None, None, -1))
        )
        assert np.abs(changed.voxels_hu[flip].astype(int) - plain.voxels_hu).mean() < 3


def test_coarse_grid_shows_the_average_of_the_fine_one() -> None:
    anatomy = Anatomy.random(2)
    fine = render(anatomy, Grid.axial(shape=(60, 60, 60), spacing_mm=(1, 1, 1)), noise_hu=0).voxels_hu.astype(float)
    coarse = render(anatomy, Grid.axial(shape=(20, 20, 20), spacing_mm=(3, 3, 3)), noise_hu=0).voxels_hu.astype(float)
    averaged = fine.reshape(20, 3, 20, 3, 20, 3).mean(axis=(1, 3, 5))
    assert np.corrcoef(averaged.ravel(), coarse.ravel())[0, 1] > 0.93
    assert abs(averaged.mean() - coarse.mean()) < 25


def test_default_grid_holds_all_levels_and_takes_a_shape() -> None:
    anatomy = Anatomy.random(7)
    grid = default_grid(anatomy)
    corners = grid.to_lps_mm(np.array([[0, 0, 0], np.array(grid.shape) - 1], float))
    for place in anatomy.places.values():
        assert (np.array(place.lower_lps_mm) > corners[0]).all()
        assert (np.array(place.upper_lps_mm) < corners[1]).all()
    assert default_grid(anatomy, (1.0, 1.0, 1.0), (10, 20, 30)).shape == (10, 20, 30)


@pytest.fixture(scope="module")
def small() -> Phantom:
    anatomy = Anatomy.random(1, [Fracture(level="C2", kind="dens")])
    return render(anatomy, _reversed(default_grid(anatomy, (6.0, 2.0, 2.0))))


def test_written_series_reads_back_voxel_by_voxel(small: Phantom, tmp_path: Path) -> None:
    paths = write_series(small, tmp_path, seed=11)
    assert len(paths) == small.grid.shape[0]
    for index, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        hu = ds.pixel_array.astype(int) * int(ds.RescaleSlope) + int(ds.RescaleIntercept)
        assert np.array_equal(hu, small.voxels_hu[index])
        assert ds.InstanceNumber == index + 1
        row, column = np.array(ds.ImageOrientationPatient[:3]), np.array(ds.ImageOrientationPatient[3:])
        for y, x in ((0, 0), (17, 5)):
            point = np.array(ds.ImagePositionPatient) + row * ds.PixelSpacing[1] * x + column * ds.PixelSpacing[0] * y
            assert np.allclose(point, small.grid.to_lps_mm(np.array([index, y, x], float)), atol=1e-3)


def test_series_identity_follows_the_seed(small: Phantom, tmp_path: Path) -> None:
    def identity(folder: str, seed: int) -> tuple[str, str, str]:
        ds = pydicom.dcmread(write_series(small, tmp_path / folder, seed=seed)[0], stop_before_pixels=True)
        return ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID

    assert identity("first", 1) == identity("again", 1)
    assert not set(identity("first", 1)) & set(identity("other", 2))


def test_compressed_series_holds_the_same_voxels(small: Phantom, tmp_path: Path) -> None:
    path = write_series(small, tmp_path, transfer_syntax_uid=RLELossless)[3]
    ds = pydicom.dcmread(path)
    assert ds.file_meta.TransferSyntaxUID == RLELossless
    assert np.array_equal(ds.pixel_array.astype(int) - 1024, small.voxels_hu[3])


def test_slices_that_dicom_cannot_describe_are_refused(small: Phantom, tmp_path: Path) -> None:
    affine = small.grid.affine.copy()
    affine[:3, 1] += 0.2 * affine[:3, 2]
    bent = Phantom(
        voxels_hu=small.voxels_hu,
        grid=Grid(shape=small.grid.shape, affine=affine),
        vertebrae=small.vertebrae,
        fractures=small.fractures,
    )
    with pytest.raises(ValueError, match="cosine"):
        write_series(bent, tmp_path)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(small: Phantom, tmp_path: Path) -> None:
    for path in write_series(small, tmp_path)[:2]:
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Error" not in done.stderr, done.stderr
