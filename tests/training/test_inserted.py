"""Inserted fractures and hard negatives: right in millimetres on any grid, and nowhere but where they belong."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from model.findings import Analysis, Finding, Findings, LevelFinding, ModelInfo, PatientFinding, SliceWeight
from model.geometry import Grid
from model.levels import LEVELS
from model.phantom import Anatomy, default_grid, render
from model.segment import Vertebra
from model.volume import SliceSource, Volume
from training.evaluation.loss import LEVEL_PREVALENCE
from training.inserted import (
    Inserted,
    disturb,
    draw_levels,
    insert,
    inserted_stacks,
    measure_on_inserted,
    summarise_inserted,
)
from training.inserted.clefts import Cleft, cut
from training.inserted.compression import compress
from training.inserted.frame import vertebra_frames
from training.inserted.insertion import CORRELATION
from training.inserted.negatives import NEGATIVES, add_negative
from training.inserted.region import neighbourhood
from training.inserted.show import contact_sheet
from training.inserted.sites import local_rows
from training.phantom import CLASSIFY
from training.vertebra_stacks import collate, read_stack

BONE_HU = 800


@dataclass(frozen=True, kw_only=True, eq=False)
class Neck:
    """A small, coarse phantom without fractures."""

    voxels_hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    grid: Grid


@pytest.fixture(scope="module")
def neck() -> Neck:
    anatomy = Anatomy.random(5, ())
    phantom = render(anatomy, default_grid(anatomy, (1.2, 0.8, 0.8), shape=(150, 110, 110)), noise_hu=10, seed=1)
    assert set(range(1, 8)) <= set(np.unique(phantom.vertebrae))
    return Neck(voxels_hu=phantom.voxels_hu, labels=phantom.vertebrae, grid=phantom.grid)


@pytest.fixture(scope="module")
def broken(neck: Neck) -> Inserted:
    return insert(neck.voxels_hu, neck.labels, neck.grid, np.random.default_rng(3), levels={2, 5, 6}, negatives=1.0)


def oblique_grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], signs: tuple[int, ...]) -> Grid:
    """Turned by 20 degrees about the long axis and tilted, some of its axes reversed, centred on the origin."""
    a, b = np.deg2rad(20), np.deg2rad(12)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (turn @ tilt)[:, ::-1] * (np.array(spacing_mm) * signs)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape=shape, affine=affine)


def plane(normal: tuple[float, float, float], *, width_mm: float, shift_mm: tuple[float, float, float]) -> Cleft:
    rows = local_rows(np.array(normal) / np.linalg.norm(normal))
    return Cleft(
        centre_lps_mm=np.array([0.3, -0.2, 0.4]),
        rows=rows,
        reach_mm=14.0,
        width_mm=width_mm,
        waves=np.zeros((0, 4)),
        shift_lps_mm=np.array(shift_mm),
        fill_hu=50.0,
    )


GRIDS = [
    oblique_grid((48, 80, 80), (1.0, 0.5, 0.5), (1, 1, 1)),
    oblique_grid((16, 60, 110), (3.0, 0.7, 0.4), (-1, 1, -1)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=["fine", "thick_reversed"])
@pytest.mark.parametrize("normal", [(1.0, 0.1, 0.0), (0.2, 0.3, 1.0), (0.5, -0.7, 0.4)])
def test_bone_loses_as_much_as_the_gap_takes_of_it(grid: Grid, normal: tuple[float, float, float]) -> None:
    voxels_hu = np.full(grid.shape, BONE_HU, np.int16)
    cleft = plane(normal, width_mm=0.3, shift_mm=(0, 0, 0))
    near = neighbourhood(voxels_hu, np.full(grid.shape, 5, np.uint8), grid, 5, cleft.centre_lps_mm, 18.0)
    cut(near, cleft, np.random.default_rng(0))

    u, v, _ = cleft.local(near.grid)
    inside = np.hypot(u, v) < 6
    lost_mm3 = (BONE_HU - near.voxels_hu)[inside].sum() / (BONE_HU - 50) * grid.voxel_volume_mm3
    # Of voxels, some lie across the cylinder's wall: hence not quite.
    assert lost_mm3 == pytest.approx(0.3 * np.pi * 6**2, rel=0.06)


def test_a_thin_gap_is_fainter_in_thick_slices() -> None:
    depths = []
    for grid in GRIDS:
        voxels_hu = np.full(grid.shape, BONE_HU, np.int16)
        cleft = plane((0.1, 0.2, 1.0), width_mm=0.3, shift_mm=(0, 0, 0))
        near = neighbourhood(voxels_hu, np.full(grid.shape, 5, np.uint8), grid, 5, cleft.centre_lps_mm, 18.0)
        cut(near, cleft, np.random.default_rng(0))
        depths.append(BONE_HU - np.percentile(near.voxels_hu, 0.5))
    assert 100 < depths[0] < 400
    assert 30 < depths[1] < 0.7 * depths[0]


@pytest.mark.parametrize("grid", GRIDS, ids=["fine", "thick_reversed"])
def test_the_far_side_moves_by_the_stated_millimetres(grid: Grid) -> None:
    points = grid.to_lps_mm(np.stack(np.indices(grid.shape), axis=-1).astype(float))
    cleft = plane((1.0, 0.0, 0.0), width_mm=0.3, shift_mm=(0.4, 1.2, 2.0))
    places = {"far": np.array([6.0, 0, 0]), "near": np.array([-6.0, 0, 0])}
    blobs = {name: np.exp(-((points - place) ** 2).sum(axis=-1) / (2 * 2.2**2)) for name, place in places.items()}
    voxels_hu = (500 + 900 * (blobs["far"] + blobs["near"])).astype(np.int16)
    near = neighbourhood(voxels_hu, np.full(grid.shape, 5, np.uint8), grid, 5, cleft.centre_lps_mm, cleft.radius_mm)
    cut(near, replace(cleft, is_loose=True), np.random.default_rng(0))

    after = near.grid.to_lps_mm(np.stack(np.indices(near.before.shape), axis=-1).astype(float))
    moved = {}
    for name, place in places.items():
        about = np.linalg.norm(after - place, axis=-1) < 7.0
        weights = np.where(about & (np.sign(after[..., 0] - 0.9) == np.sign(place[0])), near.voxels_hu - 500, 0)
        weights = np.clip(weights - 100, 0, None)
        moved[name] = (after * weights[..., None]).sum(axis=(0, 1, 2)) / weights.sum() - place
    np.testing.assert_allclose(moved["far"], (0.4, 1.2, 2.0), atol=0.3)
    np.testing.assert_allclose(moved["near"], 0, atol=0.1)


def test_landmarks_do_not_depend_on_how_the_voxels_are_stored(neck: Neck) -> None:
    flipped = np.diag([-1.0, 1, -1, 1])
    flipped[:3, 3] = (neck.grid.shape[0] - 1, 0, neck.grid.shape[2] - 1)
    grid = Grid(shape=neck.grid.shape, affine=neck.grid.affine @ flipped)
    frames = vertebra_frames(neck.voxels_hu, neck.labels, neck.grid)
    others = vertebra_frames(neck.voxels_hu[::-1, :, ::-1], neck.labels[::-1, :, ::-1], grid)

    assert [frame.label for frame in frames] == [1, 2, 3, 4, 5, 6, 7]
    for frame, other in zip(frames, others, strict=True):
        np.testing.assert_allclose(frame.rows, other.rows, atol=0.06)
        np.testing.assert_allclose(
            frame.to_lps_mm(np.array([0, frame.back, 0])), other.to_lps_mm(np.array([0, other.back, 0])), atol=1.2
        )
        assert 0.5 < frame.rows[2] @ (0, 0, 1) <= 1
        assert frame.front < frame.back < frame.canal_back < frame.tip


def test_nothing_changes_away_from_the_broken_vertebra(neck: Neck) -> None:
    for label in (1, 2, 5, 7):
        inserted = insert(
            neck.voxels_hu, neck.labels, neck.grid, np.random.default_rng(label), levels={label}, negatives=0
        )
        away_mm = ndimage.distance_transform_edt(neck.labels != label, sampling=neck.grid.spacing_mm)
        changed = inserted.voxels_hu != neck.voxels_hu
        assert changed.any()
        assert away_mm[changed].max() < 9.0
        neighbours = (neck.labels > 0) & (neck.labels != label)
        assert np.abs(inserted.voxels_hu[neighbours].astype(int) - neck.voxels_hu[neighbours]).mean() < 0.5
        assert set(np.unique(inserted.regions)) == {0, label}


def test_fractures_are_dark_gaps_of_bone_and_recorded(neck: Neck, broken: Inserted) -> None:
    assert {fracture.level for fracture in broken.fractures} == {"C2", "C5", "C6"}
    assert set(np.unique(broken.regions)) == {0, 2, 5, 6}
    for label in (2, 5, 6):
        region = broken.regions == label
        near = ndimage.distance_transform_edt(neck.labels != label, sampling=neck.grid.spacing_mm) < 3.5
        assert near[region].all()
        of_level = [fracture for fracture in broken.fractures if fracture.level == LEVELS[label - 1]]
        volume_mm3 = region.sum() * neck.grid.voxel_volume_mm3
        assert max(fracture.volume_mm3 for fracture in of_level) <= volume_mm3 * 1.01
        assert sum(fracture.volume_mm3 for fracture in of_level) >= volume_mm3 * 0.99
        assert all(fracture.contrast_to_noise >= 1 for fracture in of_level)
        if all(fracture.kind != "compression" for fracture in of_level):
            assert broken.voxels_hu[region].mean() < neck.voxels_hu[region].mean() - 50


def test_the_same_seed_draws_the_same_and_another_one_does_not(neck: Neck, broken: Inserted) -> None:
    def again(seed: int) -> Inserted:
        rng = np.random.default_rng(seed)
        return insert(neck.voxels_hu, neck.labels, neck.grid, rng, levels={2, 5, 6}, negatives=1.0)

    same, other = again(3), again(4)
    np.testing.assert_array_equal(same.voxels_hu, broken.voxels_hu)
    np.testing.assert_array_equal(same.regions, broken.regions)
    assert (same.fractures, same.negatives) == (broken.fractures, broken.negatives)
    assert (other.voxels_hu != broken.voxels_hu).any()


def test_what_cannot_be_seen_is_not_inserted(neck: Neck) -> None:
    rng = np.random.default_rng(0)
    inserted = insert(neck.voxels_hu, neck.labels, neck.grid, rng, levels={4, 5}, negatives=0, min_contrast=1e3)

    assert inserted.fractures == ()
    assert not inserted.regions.any()
    np.testing.assert_array_equal(inserted.voxels_hu, neck.voxels_hu)


@pytest.mark.parametrize("kind", NEGATIVES)
def test_hard_negatives_change_the_volume_near_their_vertebra(neck: Neck, kind: str) -> None:
    label = 2 if kind == "synchondrosis" else 4
    frame = vertebra_frames(neck.voxels_hu, neck.labels, neck.grid)[label - 1]
    changed = neck.voxels_hu.copy()
    rng = np.random.default_rng(1)

    assert any(add_negative(changed, neck.labels, neck.grid, frame, kind, rng) for _ in range(6))
    difference = np.abs(changed.astype(int) - neck.voxels_hu)
    away_mm = ndimage.distance_transform_edt(neck.labels != label, sampling=neck.grid.spacing_mm)
    assert difference.max() > 80
    assert away_mm[difference > 0].max() < 25


def test_hard_negatives_are_no_fracture(neck: Neck) -> None:
    inserted = insert(neck.voxels_hu, neck.labels, neck.grid, np.random.default_rng(2), levels=(), negatives=2.0)

    assert len(inserted.negatives) > 5
    assert inserted.fractures == ()
    assert not inserted.regions.any()


def test_a_compressed_body_is_lower_and_denser(neck: Neck) -> None:
    frame = vertebra_frames(neck.voxels_hu, neck.labels, neck.grid)[4]
    middle = np.array([0, (frame.front + frame.back) / 2, (frame.floor[0] + frame.ceiling[0]) / 2])
    near = neighbourhood(neck.voxels_hu, neck.labels, neck.grid, 5, frame.to_lps_mm(middle), 20.0)
    region = compress(near, frame, 3.0, np.random.default_rng(1))

    up = np.arange(middle[2], frame.ceiling[0] + 3, 0.1)
    tops = []
    for voxels in (near.before, near.voxels_hu):
        for v in np.linspace(frame.front + 2, frame.back - 3, 8):
            points = frame.to_lps_mm(np.stack([np.zeros_like(up), np.full_like(up, v), up], axis=1))
            along = ndimage.map_coordinates(voxels, near.grid.to_index(points).T, order=1)
            tops.append(up[np.flatnonzero(along > 250)[-1]])
    sunk_mm = np.array(tops[:8]) - np.array(tops[8:])
    assert 2.0 < sunk_mm.max() < 3.8
    assert sunk_mm.min() > -0.5
    assert near.voxels_hu[region].mean() > near.before[region].mean() + 40


def test_levels_are_drawn_as_often_as_in_the_rsna_data_and_in_clusters() -> None:
    rng = np.random.default_rng(0)
    drawn = np.zeros((20_000, 7), bool)
    for row in drawn:
        row[[label - 1 for label in draw_levels(rng)]] = True

    np.testing.assert_allclose(drawn.mean(axis=0), LEVEL_PREVALENCE, atol=0.01)
    assert drawn.any(axis=1).mean() == pytest.approx(0.476, abs=0.015)
    assert np.corrcoef(drawn[:, 4], drawn[:, 5])[0, 1] == pytest.approx(0.36, abs=0.04)
    assert len(CORRELATION) == len(LEVELS) - 1


def test_stacks_are_read_as_those_of_phantoms_are(neck: Neck, tmp_path: Path) -> None:
    path = tmp_path / "stacks.npz"
    inserted = insert(neck.voxels_hu, neck.labels, neck.grid, np.random.default_rng([2, 31]), boost=10)
    np.savez(path, **inserted_stacks(inserted, neck.labels, neck.grid, CLASSIFY))
    with np.load(path) as arrays:
        levels, fractured, regions = arrays["levels"], arrays["fractured"], arrays["regions"]
    batch = collate([read_stack(path, index) for index in range(len(levels))])

    assert levels.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert 0 < fractured.sum() < 7
    np.testing.assert_array_equal(batch.fractured.numpy() > 0.5, fractured)
    np.testing.assert_array_equal((regions > 64).any(axis=(1, 2, 3)), fractured)


def test_the_scanner_disturbs_whole_slices(neck: Neck) -> None:
    changed = neck.voxels_hu.copy()
    done = disturb(changed, neck.grid, np.random.default_rng(0), probability=1.0)

    assert set(done) == {"motion", "streaks", "noise", "kernel"}
    slices = (changed != neck.voxels_hu).mean(axis=(1, 2))
    assert slices.max() > 0.9


class KnowsTheTruth:
    """A pipeline that compares with the untouched volume; of C7 it has no opinion."""

    def __init__(self, neck: Neck) -> None:
        self.neck = neck

    def segment(self, volume: Volume) -> tuple[NDArray[np.uint8], list[Vertebra]]:
        return self.neck.labels, []

    def analyse(self, volume: Volume) -> Analysis:
        return self.judge(volume, *self.segment(volume))

    def judge(self, volume: Volume, labels: NDArray[np.uint8], vertebrae: list[Vertebra]) -> Analysis:
        different = np.abs(volume.voxels_hu.astype(int) - self.neck.voxels_hu) > 100
        shown = np.where(different, self.neck.labels, 0).astype(np.uint8)
        levels = {}
        for label, name in enumerate(LEVELS, start=1):
            count = int((shown == label).sum())
            slices = np.flatnonzero((shown == label).any(axis=(1, 2))) if count else [0]
            is_present = count > 0
            levels[name] = LevelFinding(
                in_field_of_view=True,
                probability=None if label == 7 else count / (count + 10),
                finding=Finding.UNDETERMINED if label == 7 else (Finding.PRESENT if is_present else Finding.ABSENT),
                attention=tuple(SliceWeight(sop_instance_uid=str(index), weight=1 / len(slices)) for index in slices),
            )
        findings = Findings(
            study_instance_uid="1",
            series_instance_uid="2",
            model=ModelInfo(name="truth", version="1", trained_on="nothing", operating_point=0.5),
            patient_overall=PatientFinding(probability=None, finding=Finding.UNDETERMINED),
            levels=levels,
        )
        return Analysis(findings=findings, vertebrae=self.neck.labels, fractures=shown, saliency=shown)


def test_whoever_sees_every_change_is_measured_as_perfect(neck: Neck) -> None:
    volume = Volume(
        study_instance_uid="1",
        series_instance_uid="2",
        voxels_hu=neck.voxels_hu,
        grid=neck.grid,
        slices=tuple(SliceSource(sop_instance_uid=str(z), path=Path("x")) for z in range(neck.grid.shape[0])),
    )
    outcomes = measure_on_inserted(KnowsTheTruth(neck), volume, np.random.default_rng(0), 4)  # type: ignore[arg-type]
    summary = summarise_inserted(outcomes)

    assert summary["num_untouched"] == 6
    assert summary["num_broken"] >= 4
    assert "C7" not in {outcome.level for outcome in outcomes}
    assert summary["vertebra_auc"] == summary["vertebra_sensitivity"] == summary["vertebra_specificity"] == 1
    assert summary["region_hits"] == 1
    assert summary["attention_on_fracture"] > 0.6


def test_the_contact_sheet_shows_every_kind(neck: Neck, tmp_path: Path) -> None:
    only = np.where(neck.labels == 5, 5, np.where(neck.labels > 0, 8, 0)).astype(np.uint8)
    num_rows = contact_sheet(neck.voxels_hu, only, neck.grid, np.random.default_rng(0), tmp_path / "sheet.png")

    assert num_rows >= 12
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
        assert sheet.height > num_rows // 2 * 100
