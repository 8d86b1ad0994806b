"""Necks drawn from an atlas, real necks labelled by what contours say, and the networks that learn from both."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import nrrd
import numpy as np
import pytest
import torch
from scipy import ndimage

from model.bundle import ClassifySettings
from model.geometry import Grid
from model.networks import VertebraUNet
from training.inserted.insertion import Inserted
from training.necks import atlas as body
from training.necks import stacks, train
from training.necks.atlas import Atlas, build_atlas
from training.necks.joints import Joints
from training.necks.openkbp import OUTLINE_KNOWN, OUTLINE_SOME_BONE, RealNeck, read_contours, weak_labels
from training.necks.pseudo import LENGTHS_MM, STEP_MM, Profile, cut_profile, own_cut, profile, relabelled
from training.necks.recipe import mean_weights
from training.necks.rounds import is_believed
from training.necks.samples import write_phantom
from training.necks.stacks import write_neck_stacks
from training.necks.synthetic import AUX_CORD, MAX_LEVEL, Pose, draw_neck, draw_series, draw_spine, straighten
from training.necks.train import (
    AuxiliaryUNet,
    crop_places,
    guess_path,
    read_crop,
    real_guess,
    shifted,
    train_necks,
    write_guess,
)
from training.vertebra_stacks import vertebrae_by_level
from training.vertebrae import TURN_DEG, turned

BODY_MM, DISC_MM = 12.0, 4.0


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """A made-up label map in the atlas's layout: rings with bodies, a skull, a jaw, a collar of muscle."""
    z, y, x = np.mgrid[0:200, 0:110, 0:110]
    labels = np.zeros(z.shape, np.int16)
    labels[np.hypot(y - 55, x - 55) < 45] = 8
    numbers = [*body.CERVICAL, *body.THORACIC]
    for index, number in enumerate(numbers):
        top = 178 - index * 14
        here = (z <= top) & (z > top - 11)
        ring = (np.hypot(y - 62, x - 55) < 14) & (np.hypot(y - 62, x - 55) > 9)
        solid = (np.hypot(y - 46, x - 55) < 8) | ring
        labels[here & solid] = number
    labels[(z > 184) & (np.hypot(y - 55, x - 55) < 45) & (np.hypot(y - 55, x - 55) > 38)] = body.SKULL
    labels[(z > 140) & (z < 150) & (y < 20) & (np.abs(x - 55) < 20)] = body.MANDIBLE
    path = tmp_path_factory.mktemp("atlas") / "labels.nrrd"
    # As the real one is stored: x to the right, y to the front, z to the head.
    stored = labels[:, ::-1, ::-1].transpose(2, 1, 0)
    header = {"space": "left-posterior-superior", "space directions": np.diag([-1.0, -1.0, 1.0])}
    header["space origin"] = np.array([54.0, 54.0, -100.0])
    nrrd.write(str(path), stored, header)
    return build_atlas(path)


def test_the_atlas_keeps_its_bones_in_place_and_order(atlas: Atlas) -> None:
    heights_mm = atlas.centres_lps_mm[:, 2]
    assert (np.diff(heights_mm) < -11).all()  # C1 to T5, head to foot
    middle = atlas.grid.to_index(np.array([[0.0, -9.0, heights_mm[3]]]))[0].round().astype(int)
    assert atlas.bones[tuple(middle)] == 4
    assert atlas.distance_mm[tuple(middle)] > 1
    cord = np.argwhere(atlas.tissues == body.CORD)
    assert np.abs(atlas.grid.to_lps_mm(cord.astype(float))[:, :2].mean(axis=0) - [0, 7]).max() < 3


def test_a_pose_puts_the_same_tissue_at_the_same_place_on_any_grid(atlas: Atlas) -> None:
    pose = Pose.draw(atlas, np.random.default_rng(3))
    point = np.array([[4.0, -6.0, 12.0]])
    coarse = Grid.axial(shape=(9, 9, 9), spacing_mm=(4.0,) * 3, centre_lps_mm=(4.0, -6.0, 12.0))
    fine = Grid.axial(shape=(9, 9, 9), spacing_mm=(1.0,) * 3, centre_lps_mm=(4.0, -6.0, 12.0))
    places = [pose.places(grid)[4, 4, 4].numpy() for grid in (coarse, fine)]
    assert places[0] == pytest.approx(places[1], abs=0.02)
    index = atlas.grid.to_index(pose.to_atlas(point))[0]
    unit = 2 * index / (np.asarray(atlas.bones.shape) - 1) - 1
    assert places[1] == pytest.approx(unit[::-1], abs=0.01)


def test_each_vertebra_turns_as_one_piece_on_the_next_and_the_chest_stays(atlas: Atlas) -> None:
    rng, turns_deg = np.random.default_rng(4), []
    for _ in range(20):
        joints = Joints.draw(atlas, rng, strength=1.0)
        for label in range(1, 9):
            turn, centre = joints.turns[label], atlas.centres_lps_mm[label - 1]
            here = turn.T @ (centre - joints.slips_mm[label])
            step_mm = 2.0 * np.eye(3)
            there = joints.to_atlas(np.stack([here, *(here + step_mm), *(here - step_mm)]))
            assert there[0] == pytest.approx(centre, abs=0.6), label
            turned = (there[1:4] - there[4:]) / 4
            np.testing.assert_allclose(turned, turn.T, atol=0.12, err_msg=str(label))
        np.testing.assert_array_equal(joints.turns[8], np.eye(3))
        turns_deg.append(np.rad2deg(np.arcsin((joints.turns[1] @ joints.turns[2].T)[1, 0])))  # C1 about the dens
    assert 5 < np.std(turns_deg) < 14


def test_joints_that_do_not_move_leave_everything_where_it_was(atlas: Atlas) -> None:
    points = np.random.default_rng(0).uniform(-60, 60, size=(50, 3))
    still = Joints.draw(atlas, np.random.default_rng(0), strength=0.0)
    np.testing.assert_allclose(still.to_atlas(points), points, atol=1e-3)


def test_a_drawn_neck_is_bright_where_its_truth_has_bone(atlas: Atlas) -> None:
    neck = draw_neck(atlas, np.random.default_rng(5), spacing_mm=3.0, shape=(64, 32, 32))
    bone = neck.share > 200
    around = ndimage.binary_dilation(bone, iterations=2) & (neck.share == 0)
    assert bone.sum() > 50
    assert neck.hu[bone].mean() > neck.hu[around].mean() + 60
    assert 1 <= neck.level[bone].min() <= neck.level.max() <= MAX_LEVEL
    centres = ndimage.center_of_mass(bone, neck.level, sorted(set(neck.level[bone].tolist()) - {MAX_LEVEL}))
    assert (np.diff([centre[0] for centre in centres]) < 0).all()  # higher numbers lie lower


def test_a_drawn_series_is_bright_where_its_labels_are(atlas: Atlas) -> None:
    hu, labels, grid = draw_series(atlas, np.random.default_rng(7), pixel_mm=2.0, thick=2)
    assert hu.shape == labels.shape == grid.shape
    assert grid.spacing_mm == pytest.approx((4.0, 2.0, 2.0))
    assert set(np.unique(labels)) == set(range(8))
    around = ndimage.binary_dilation(labels > 0, iterations=2) & (labels == 0)
    assert hu[labels > 0].mean() > hu[around].mean() + 60


def test_stacks_of_a_drawn_neck_hold_broken_vertebrae_with_their_regions(atlas: Atlas, tmp_path: Path) -> None:
    classify = ClassifySettings(
        encoder="residual-8-16", num_hidden=4, num_slices=5, num_pixels=48, pixel_mm=1.0, region_threshold=0.5
    )
    hu, labels, grid = draw_spine(atlas, np.random.default_rng(1), spacing_mm=1.0, reach_mm=29)
    assert hu.shape == labels.shape == grid.shape
    fractured = []
    for seed in range(4):
        write_neck_stacks(tmp_path / f"{seed}.npz", seed, atlas, classify)
        with np.load(tmp_path / f"{seed}.npz") as arrays:
            assert arrays["planes"].shape[1:] == (2 * 4 + 1 + 4, 48, 48)
            assert len(arrays["levels"]) == len(arrays["fractured"]) == len(arrays["masks"])
            intact = ~arrays["fractured"]
            assert arrays["regions"][intact].max(initial=0) == 0
            fractured += arrays["fractured"].tolist()
    assert 0 < sum(fractured) < len(fractured)
    broken, intact = vertebrae_by_level(sorted(tmp_path.glob("*.npz")))
    for vertebrae, is_broken in ((broken, True), (intact, False)):
        for of_level in vertebrae:
            assert {bool(np.load(path)["fractured"][index]) for path, index in of_level} == {is_broken}
            assert len({int(np.load(path)["levels"][index]) for path, index in of_level}) == 1
    assert sum(map(len, broken)) == sum(fractured)


def test_in_outlines_of_the_networks_nothing_is_judged_that_they_number_wrongly(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.repeat(np.arange(1, 8, dtype=np.uint8), 4)[:, None, None] * np.ones((1, 6, 6), np.uint8)
    grid = Grid.axial(shape=labels.shape, spacing_mm=(1.0, 1.0, 1.0))
    inserted = Inserted(
        voxels_hu=np.zeros(labels.shape, np.int16),
        regions=np.zeros_like(labels),
        fractures=(),
        negatives=(),
        eligible=(1, 2, 3, 5, 6, 7),
    )
    drawn = np.where(labels >= 5, labels + 1, labels)
    drawn[labels == 2] = 0
    drawn[4:7] = 2  # three slices of four
    judged, outlines = stacks.in_found_outlines(inserted, labels, grid, lambda volume: (drawn, []))
    assert judged.eligible == (1, 2, 3)
    assert outlines is drawn
    monkeypatch.setattr(stacks, "SHARE_FOUND", 1.0)
    classify = ClassifySettings(
        encoder="residual-8-16", num_hidden=4, num_slices=5, num_pixels=48, pixel_mm=1.0, region_threshold=0.5
    )
    path = tmp_path / "nothing-found.npz"
    write_neck_stacks(path, 1, atlas, classify, lambda volume: (np.zeros(volume.grid.shape, np.uint8), []))
    assert not path.exists()


def made_up_spine(num_levels: int = 8) -> tuple[Profile, list[float]]:
    """A profile of bodies and discs under a brainstem that ends at 40 mm, and its borders."""
    lengths = [36.0, *[BODY_MM + DISC_MM] * (num_levels - 1)]
    borders = [40.0, *(40.0 + np.cumsum(lengths)).tolist()]
    at = np.arange(0, borders[-1] + 20, STEP_MM)
    hu, level = np.full(len(at), 250.0), np.full(len(at), np.nan)
    for number, (first, last) in enumerate(pairwise(borders), start=2):
        level[(at >= first) & (at < last)] = number - 0.6  # off, as a young network is
        hu[(at >= last - DISC_MM) & (at < last)] = 90.0
    bone = np.where(np.isnan(level), 0.0, 0.9)
    points = np.stack([np.zeros_like(at), np.zeros_like(at), -at], axis=1)
    forward = np.tile([0.0, -1.0, 0.0], (len(at), 1))
    return Profile(points=points, forward=forward, hu=hu, bone=bone, level=level, top_mm=40.0), borders


def test_discs_and_the_brainstem_number_a_spine_that_the_network_miscounts() -> None:
    found, borders = made_up_spine()
    cut = cut_profile(found, trust=0.1)
    assert cut is not None
    assert np.abs(cut.borders_mm - borders[: len(cut.borders_mm)]).max() <= 4.5
    assert cut.off == pytest.approx(-0.6, abs=0.01)
    assert is_believed(cut, found)


def test_a_profile_without_discs_or_anchor_is_not_believed() -> None:
    found, _ = made_up_spine()
    noise = np.random.default_rng(0).normal(200, 5, len(found.hu))
    level = np.where(np.isnan(found.level), np.nan, np.random.default_rng(1).uniform(1, 9, len(found.hu)))
    blurred = Profile(
        points=found.points, forward=found.forward, hu=noise, bone=found.bone, level=level, top_mm=found.top_mm
    )
    cut = cut_profile(blurred, trust=0.5)
    assert cut is None or not is_believed(cut, blurred)


@pytest.mark.parametrize("scale", [0.9, 1.1, 1.5])
def test_a_network_that_knows_cuts_a_neck_itself_unless_no_neck_is_so_long(scale: float) -> None:
    at = np.arange(0, 220, STEP_MM)
    borders = 30 + scale * np.cumsum([0, *LENGTHS_MM])
    found = Profile(
        points=np.zeros((len(at), 3)),
        forward=np.zeros((len(at), 3)),
        hu=np.full(len(at), 250.0),
        bone=np.full(len(at), 0.9),
        level=np.interp(at, borders, np.arange(1.5, 10)),
        top_mm=30.0,
    )
    cut = own_cut(found)
    if scale == 1.5:
        assert cut is None
        return
    assert cut is not None
    assert cut.borders_mm == pytest.approx(borders[: len(cut.borders_mm)], abs=2)
    assert len(cut.off) == len(cut.borders_mm) - 1 >= 6
    there_and_back = np.where((at > 60) & (at < 75), 2.0, found.level)
    assert own_cut(replace(found, level=there_and_back)) is None
    assert own_cut(replace(found, level=np.where(at < 110, found.level, np.nan))) is None, "too little of it"


def real_neck() -> tuple[RealNeck, np.ndarray, np.ndarray]:
    """A straight spine on the coarse grid, and what a network that is off by a whole level says of it."""
    grid = Grid.axial(shape=(80, 32, 32), spacing_mm=(3.0,) * 3)
    z, y, x = (np.stack(np.indices(grid.shape), axis=-1) @ grid.affine[:3, :3].T + grid.affine[:3, 3]).T[::-1]
    z, y, x = (axis.transpose(2, 1, 0) for axis in (z, y, x))
    depth = 80.0 - z  # mm below the top of C2
    length = BODY_MM + DISC_MM
    number = np.where(depth < 36, 2.0, 3.0 + np.floor((depth - 36) / length)).clip(1, 10)
    in_disc = (depth > 32) & (np.mod(depth - 36, length) > BODY_MM)
    column = (np.hypot(y + 14, x) < 9) & (depth > 0) & (depth < 160) & ~in_disc
    hu = np.where(column, 260, 60).astype(np.int16)
    line = np.stack([np.zeros(60), np.zeros(60), np.linspace(-85, 92, 60)], axis=1)
    neck = RealNeck(
        name="made up",
        grid=grid,
        hu=hu,
        share=np.zeros(grid.shape, np.uint8),
        level=np.zeros(grid.shape, np.uint8),
        aux=np.full(grid.shape, 5, np.uint8),
        certainty=np.zeros(grid.shape, np.uint8),
        cord_lps_mm=line,
        brainstem_end_mm=80.0,
    )
    return neck, np.where(column, 4.0, -4.0).astype(np.float32), (number - 1).astype(np.float32)


def test_pseudo_labels_correct_a_network_that_is_one_level_off() -> None:
    neck, logit, level = real_neck()
    found = profile(neck, logit, level)
    assert found is not None
    cut = cut_profile(found, trust=0.1)
    assert cut is not None
    labelled = relabelled(neck, logit, level, found, cut)
    for number in (3, 4, 5, 6):
        core = (labelled.share > 0) & (np.rint(level + 1) == number)
        assert core.sum() > 100
        assert np.median(labelled.level[core]) == number
    assert (labelled.certainty[labelled.share > 0] != 0).all()


def test_what_may_be_the_arch_of_c1_is_not_said_to_be_c2() -> None:
    neck, logit, level = real_neck()
    found = profile(neck, logit, level + 1)
    assert found is not None
    cut = cut_profile(found, trust=0.5)
    assert cut is not None
    labelled = relabelled(neck, logit, level + 1, found, cut)
    where = neck.grid.to_lps_mm(np.stack(np.indices(neck.grid.shape), axis=-1).astype(float))
    depth, in_front = found.points[0, 2] - where[..., 2] - cut.borders_mm[0], where[..., 1] < -17
    bone = logit > 0
    assert (labelled.certainty[bone & in_front & (depth > 2) & (depth < 12)] == OUTLINE_SOME_BONE).all()
    assert (labelled.certainty[bone & in_front & (depth > 17) & (depth < 30)] == OUTLINE_KNOWN).all()


def test_contours_say_where_bone_must_be_spine(tmp_path: Path) -> None:
    ct, mask = np.full((64, 64, 64), 1024 + 40, np.int16), np.zeros((64, 64, 64), np.uint16)
    ct[:8], ct[-8:] = 0, 0  # air before and behind
    ct[24:30, 28:36, 10:60] = 1024 + 500  # bone in front of the cord
    mask[32:35, 30:34, 12:58] = 1
    mask[31:36, 29:35, 4:12] = 2
    np.savez(tmp_path / "train-pats_pt_1.npz", ct=ct, mask=mask, voxel_mm=np.array([4.0, 4.0, 2.5]))
    patient = read_contours(tmp_path / "train-pats_pt_1.npz")
    assert patient.name == "pt_1"
    # Stored head to foot: the brainstem is at the top of a volume that runs foot to head.
    assert np.argwhere(patient.brainstem)[:, 0].min() > np.argwhere(patient.cord)[:, 0].max()
    neck = weak_labels(patient, 3.0, 16)
    some = neck.certainty == OUTLINE_SOME_BONE
    assert neck.hu[some].min() > 250
    assert (neck.certainty[neck.hu < -60] == OUTLINE_KNOWN).all()
    assert (neck.aux == AUX_CORD).sum() > 100
    top_of_cord = neck.cord_lps_mm[:, 2].max()
    assert neck.brainstem_end_mm == pytest.approx(top_of_cord, abs=6)


def test_a_crop_keeps_image_and_truth_together(tmp_path: Path) -> None:
    write_phantom(tmp_path / "50000.npz", 50_000, False)
    rng = np.random.default_rng(0)
    contrasts = []
    for _ in range(4):
        crop = read_crop(tmp_path / "50000.npz", rng, (48, 32, 32))
        assert crop.inputs.shape == (2, 48, 32, 32)
        bone, rest = crop.share > 0.9, (crop.share == 0) & (crop.inputs[0] > -1.5)
        if bone.sum() > 20:
            contrasts.append(float(crop.inputs[0][bone].mean() - crop.inputs[0][rest].mean()))
    assert min(contrasts) > 0.2


def test_a_crop_leans_and_turns_as_far_as_it_may() -> None:
    rng = np.random.default_rng(0)
    for pitch_deg in (TURN_DEG, 40.0):
        most_deg = (pitch_deg, TURN_DEG, TURN_DEG)
        matrices = np.stack([turned(np.zeros(3), np.ones(3), rng, most_deg)[:3, :3] for _ in range(100)])
        up = matrices[:, :, 0] / np.linalg.norm(matrices[:, :, 0], axis=1, keepdims=True)
        lean, tilt = np.rad2deg(np.arcsin(np.abs(up[:, 1]))), np.rad2deg(np.arcsin(np.abs(up[:, 2])))
        assert 0.7 * pitch_deg < lean.max() < pitch_deg + 5
        assert tilt.max() < TURN_DEG + 5
    matrices = np.stack([turned(np.zeros(3), np.ones(3), rng, (0, 0, 45.0))[:3, :3] for _ in range(100)])
    front = matrices[:, :, 1] / np.linalg.norm(matrices[:, :, 1], axis=1, keepdims=True)
    about = np.rad2deg(np.arctan2(np.abs(front[:, 2]), front[:, 1]))
    assert 35 < about.max() < 46
    assert np.abs(front[:, 0]).max() < 1e-9


@pytest.mark.parametrize(("axis", "side"), [(1, 1), (1, -1), (0, 1)])
def test_a_straightened_neck_has_its_discs_across_it(axis: int, side: int) -> None:
    """The edges of three discs on an arc of 100 mm, and a place in the head, beyond the arc."""
    angle = np.array([-0.3, 0.3, 0.7])
    outward, upward = (np.stack([-np.cos(angle), np.sin(angle)]), np.stack([np.sin(angle), np.cos(angle)]))
    middle = np.array([[100.0], [0.0]])
    bent = np.hstack([middle + 110 * outward, middle + 90 * outward, (middle + 95 * outward + 20 * upward)[:, 2:]])
    points = np.zeros((7, 3))
    points[:, axis], points[:, 2] = side * bent[0], bent[1]

    straighten(points, axis, side / 100, 70.0)

    np.testing.assert_allclose(side * points[:, axis], [-10, -10, -10, 10, 10, 10, 5], atol=1e-6)
    np.testing.assert_allclose(points[:, 2], [-30, 30, 70, -30, 30, 70, 90], atol=1e-6)


def test_crops_are_bent_about_their_middle_some_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    crop, rng = Grid(shape=(81, 41, 41), affine=np.eye(4)), np.random.default_rng(0)
    monkeypatch.setattr(train, "SHARE_CURVED", 0.0)
    monkeypatch.setattr(train, "SHARE_NODDING", 0.0)
    plain = crop_places(crop, 3.0, rng).numpy()
    np.testing.assert_array_equal(plain, np.stack(np.indices(crop.shape), axis=-1))
    monkeypatch.setattr(train, "SHARE_CURVED", 1.0)
    ends_deg = []
    for _ in range(100):
        bent = crop_places(crop, 3.0, rng).numpy()
        np.testing.assert_allclose(bent[40, 20, 20], [40, 20, 20], atol=1e-3)
        up = bent[80, 20, 20] - bent[79, 20, 20]
        ends_deg.append(np.rad2deg(np.arctan2(up[1:], up[0])))
    assert 15 < np.abs(ends_deg)[:, 0].max() <= 21, "half of it at either end"
    assert 5 < np.abs(ends_deg)[:, 1].max() <= 8


def test_crops_are_bent_once_more_somewhere_along_them(monkeypatch: pytest.MonkeyPatch) -> None:
    crop, rng = Grid(shape=(81, 41, 41), affine=np.eye(4)), np.random.default_rng(0)
    monkeypatch.setattr(train, "SHARE_CURVED", 0.0)
    monkeypatch.setattr(train, "SHARE_NODDING", 1.0)
    turns_deg, heights = [], []
    for _ in range(100):
        up = np.diff(crop_places(crop, 3.0, rng).numpy()[:, 20, 20], axis=0)
        lean_deg = np.rad2deg(np.arctan2(up[:, 1], up[:, 0]))
        turns_deg.append(lean_deg[-1] - lean_deg[0])
        heights.append(float(np.interp(0.5, (lean_deg - lean_deg[0]) / turns_deg[-1], np.arange(80))))
    assert 20 < np.abs(turns_deg).max() < 32
    assert min(heights) < 20
    assert max(heights) > 60


def test_the_mean_of_two_networks_is_that_of_their_weights_and_counts_as_the_last() -> None:
    first, second = (torch.nn.BatchNorm1d(2).state_dict() for _ in range(2))
    second["weight"], second["num_batches_tracked"] = torch.tensor([3.0, 1.0]), torch.tensor(7)

    mean = mean_weights([first, second])

    assert mean["weight"].tolist() == [2.0, 1.0]
    assert mean["num_batches_tracked"] == 7
    torch.nn.BatchNorm1d(2).load_state_dict(mean)


def test_a_guess_cut_in_other_places_still_counts_the_same() -> None:
    rng = np.random.default_rng(0)
    moved = torch.stack([shifted(torch.full((20, 4, 4), 4.0), rng) - 4 for _ in range(100)])

    assert 0.4 < float(moved.abs().max()) < 0.7
    assert 0.1 < float((moved == 0).float().mean()) < 0.5, "some guesses stay as they are"
    assert float((moved - moved[:, :, :1, :1]).abs().max()) < 1e-6, "a level moves as a whole"
    assert float((moved[:, 0] - moved[:, -1]).abs().max()) > 0.2, "one end by more than the other"


def test_both_networks_learn_and_the_refiner_reads_what_the_coarse_one_said(tmp_path: Path, atlas: Atlas) -> None:
    neck = draw_neck(atlas, np.random.default_rng(2), spacing_mm=1.0, shape=(64, 48, 48), oversample=1)
    path = tmp_path / "0.npz"
    np.savez(path, hu=neck.hu, share=neck.share, level=neck.level, aux=neck.aux)
    torch.manual_seed(0)
    coarse = AuxiliaryUNet(VertebraUNet((8, 8, 8)))
    first, last = _trained(coarse, path, refine=False, num_steps=30)
    assert last < first
    write_guess(coarse.unet, path)
    everywhere = torch.from_numpy(np.stack(np.indices(neck.hu.shape), axis=-1)).float()
    logit, level = real_guess(guess_path(path), everywhere, torch.from_numpy(neck.hu).float())
    assert logit.shape == level.shape == (64, 48, 48)
    bone = (neck.share > 200) & (neck.level <= 8)
    assert abs(float(np.median(level.numpy()[bone] - neck.level[bone]))) <= 1  # whole levels were taken away
    refiner = AuxiliaryUNet(VertebraUNet((8, 8, 8), 4))
    first, last = _trained(refiner, path, refine=True, num_steps=30)
    assert last < first


def _trained(network: AuxiliaryUNet, path: Path, *, refine: bool, num_steps: int) -> tuple[float, float]:
    """Mean loss of the first and of the last five steps."""
    losses = [
        loss
        for _, loss in train_necks(
            network, [(1.0, [path])], num_steps=num_steps, learning_rate=5e-3, shape=(32, 32, 32), refine=refine
        )
    ]
    return float(np.mean(losses[:5])), float(np.mean(losses[-5:]))
