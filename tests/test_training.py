"""Training in miniature: a few steps of everything, exported, loaded and run."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.ndimage import binary_dilation

from model.bundle import PHANTOM_BUNDLE, read_bundle
from model.classify import network_input
from model.networks import FractureNet, VertebraUNet
from model.pipeline import load_pipeline
from training.cli import main
from training.fractures import train_fracture_net
from training.phantom import CLASSIFY, SEGMENT
from training.phantom_measures import auc, choose_operating_point
from training.samples import write_neck, write_stacks
from training.stack_changes import changed, uneven
from training.vertebra_stacks import collate, patches, read_stack
from training.vertebrae import draw_crop, train_unet


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more by waiting for threads than they gain, on a busy machine twenty-fold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("patients")


@pytest.fixture(scope="module")
def neck(folder: Path) -> Path:
    path = folder / "neck.npz"
    write_neck(path, 1, SEGMENT)
    return path


@pytest.fixture(scope="module")
def stacks(folder: Path) -> Path:
    path = folder / "stacks.npz"
    write_stacks(path, 1, SEGMENT, CLASSIFY, read_bundle(PHANTOM_BUNDLE).load_networks().unet)
    return path


def test_a_patient_is_drawn_the_same_twice_and_not_drawn_again(neck: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.npz"
    write_neck(again, 1, SEGMENT)

    with np.load(again) as first, np.load(neck) as second:
        for name in second:
            np.testing.assert_array_equal(first[name], second[name])
    before = again.stat().st_mtime_ns
    write_neck(again, 1, SEGMENT)
    assert again.stat().st_mtime_ns == before


def test_only_fractured_vertebrae_have_regions_and_those_lie_at_their_masks(stacks: Path) -> None:
    with np.load(stacks) as arrays:
        assert arrays["fractured"].any()
        for mask, region, fractured in zip(arrays["masks"], arrays["regions"], arrays["fractured"], strict=True):
            assert fractured == (region > 0).any()
            if fractured:
                # The U-Net leaves a wide cleft out of its mask.
                assert binary_dilation(mask > 128, iterations=5)[region > 128].mean() > 0.8


def test_patches_of_a_fractured_vertebra_show_the_fracture(stacks: Path) -> None:
    rng = np.random.default_rng(0)
    with np.load(stacks) as arrays:
        index = int(np.flatnonzero(arrays["fractured"])[0])

    batch = collate(patches(read_stack(stacks, index), rng))
    turned = changed(batch, rng)

    assert batch.fractured.sum() >= 3
    assert network_input(turned.planes_hu, turned.masks).shape == (4, 1, 6, 72, 72)


def test_uneven_bone_differs_from_place_to_place_and_keeps_its_mean_and_its_fractures(stacks: Path) -> None:
    with np.load(stacks) as arrays:
        batch = collate([read_stack(stacks, index) for index in range(len(arrays["fractured"]))] * 3)

    changed_by = uneven(batch, np.random.default_rng(1))

    bone, elsewhere = batch.planes_hu > 300, batch.planes_hu < 0
    before, after = (item.planes_hu for item in (batch, changed_by))
    assert (after - before)[bone].std() > 30 + (after - before)[elsewhere].std()
    assert float(after[bone].mean()) == pytest.approx(float(before[bone].mean()), rel=0.15)
    kept = changed_by.regions.sum(dim=(1, 2, 3)) / batch.regions.sum(dim=(1, 2, 3)).clamp(min=1)
    assert kept[batch.fractured > 0].min() > 0.5
    assert not changed_by.regions[batch.fractured == 0].any()
    # What was moved was moved alike in image, mask and region.
    assert after[:, 2:-2:2][changed_by.masks > 0.9].mean() > 2 * after[:, 2:-2:2][changed_by.masks < 0.1].mean()


def test_uneven_bone_is_denser_or_thinner_as_a_whole(stacks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.stack_changes.UNEVEN_SHARE", 0.0)
    monkeypatch.setattr("training.stack_changes.BENT_PIXELS", 0.0)
    batch = collate([read_stack(stacks, 0)] * 40)

    after = uneven(batch, np.random.default_rng(1)).planes_hu

    bone = batch.planes_hu[0] > 300
    factors = (after[:, bone] - 100) / (batch.planes_hu[:, bone] - 100)
    assert factors.std(dim=1).max() < 0.01
    of_stack = factors.mean(dim=1)
    assert 10 < int((of_stack - 1).abs().lt(0.001).sum()) < 30
    assert 0.6 < of_stack.min() < 0.8
    assert 1.2 < of_stack.max() < 1.5
    assert torch.allclose(after[:, batch.planes_hu[0] < 50], batch.planes_hu[:, batch.planes_hu[0] < 50], atol=0.5)


def test_crops_hold_bone_with_its_level(neck: Path) -> None:
    hu, share, level = draw_crop(neck, np.random.default_rng(6), (32, 32, 32))

    assert hu.shape == share.shape == level.shape == (32, 32, 32)
    assert hu[share > 0.9].mean() > hu[share == 0].mean() + 100
    assert set(level[share > 0.9].unique().tolist()) <= set(range(1, 9))


def test_a_few_steps_on_one_neck_lower_the_unet_loss(neck: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.vertebrae.SMALL_CROP", (20, 32, 32))
    monkeypatch.setattr("training.vertebrae.LARGE_CROP", (20, 32, 32))
    torch.manual_seed(0)
    losses = [value for _, value in train_unet(VertebraUNet((8, 16, 24)), [neck], num_steps=70, seed=0)]

    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])


def test_a_few_steps_lower_the_fracture_loss(stacks: Path) -> None:
    torch.manual_seed(0)
    # Multiples of 8: with 4 channels PyTorch 2.13 hung here on a CPU with AVX2 only, in a 1 x 1 convolution of oneDNN.
    network = FractureNet("residual-8-16-24", 8)
    steps = train_fracture_net(network, [stacks], num_patch_steps=60, num_stack_steps=1, batch_size=2, seed=0)
    losses = [value for _, value in steps][:-1]

    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_the_operating_point_separates_what_can_be_separated() -> None:
    logits, truths = np.array([-3.0, -2.0, 1.0, 4.0]), np.array([False, False, True, True])

    assert auc(logits, truths) == 1
    assert auc(-logits, truths) == 0
    assert -2 < np.log(1 / (1 / choose_operating_point(logits, truths) - 1)) < 1


def test_where_no_operating_point_is_specific_enough_it_is_the_greatest() -> None:
    assert choose_operating_point(np.array([7.0, 8.0]), np.array([False, True])) > 0.99


def test_the_phantom_command_trains_exports_and_measures_a_bundle(tmp_path: Path) -> None:
    amounts = "--patients 1 --held-out 1 --segment-steps 1 --patch-steps 1 --stack-steps 1 --batch-size 2 --evaluate 1"
    arguments = [
        "phantom",
        *amounts.split(),
        "--workers",
        "1",
        "--out",
        str(tmp_path / "bundle"),
        "--work",
        str(tmp_path / "work"),
    ]

    result = CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert result.exit_code == 0, result.output
    bundle = read_bundle(tmp_path / "bundle")
    assert json.loads(result.output[result.output.index("{") :]) == bundle.metrics
    assert bundle.metrics["unseen_phantoms"]["num_phantoms"] == 1
    assert load_pipeline(tmp_path / "bundle", device="cpu").info.operating_point == bundle.info.operating_point


def test_measuring_no_bundle_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["measure", str(tmp_path)])

    assert result.exit_code == 1
    assert result.output.startswith("Error: No model bundle in")
