"""Stacks of slices by vertebra: what is in them, what they say of it, and when they are cut again."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from model import Grid, SeriesError, Volume
from model.bundle import DEFAULT_BUNDLE
from model.classify import NUM_NEIGHBOURS, sample_mask, stack_grid
from model.phantom import Phantom
from model.pose import about_long_axis, middle_of_box
from tests.training.rsna_data import NUM_STUDIES, uid
from training.cli import main
from training.rsna import Cache, CacheError, CutSettings, Stacks, cut, cut_fingerprint, cut_settings, cut_study
from training.rsna.cuts import visible_shares
from training.rsna.demo import SMALL, draw_study, traits
from training.steps.stacks import judged_vertebrae

SETTINGS = CutSettings(num_slices=9, num_pixels=64, pixel_mm=1.4)
NUM_PLANES = 2 * 8 + 1 + 2 * NUM_NEIGHBOURS
WITH_MASK = [number for number in range(NUM_STUDIES) if traits(number).has_mask]
FRACTURED_WITH_BOXES, FRACTURED_WITHOUT = (0, 4), 6


@cache
def truth(number: int) -> Phantom:
    return draw_study(number, 0, SMALL)


@pytest.fixture(scope="module")
def cut_by_truth(rsna_cache: Cache) -> Cache:
    list(cut(rsna_cache, "truth", SETTINGS, "truth"))
    return rsna_cache


def stacks_of(cache: Cache, number: int, name: str = "truth") -> Stacks:
    stacks = cache.study(uid(number)).stacks(name)
    assert stacks is not None
    return stacks


@pytest.mark.parametrize("number", WITH_MASK)
def test_every_vertebra_lies_in_its_mask_in_the_middle_of_its_stack(cut_by_truth: Cache, number: int) -> None:
    stacks = stacks_of(cut_by_truth, number)

    assert stacks.planes_hu.shape == stacks.masks.shape == stacks.regions.shape == (7, NUM_PLANES, 64, 64)
    assert stacks.judged.all()
    assert (stacks.visible == 1).all()
    for planes_hu, mask in zip(stacks.planes_hu, stacks.masks > 127, strict=True):
        assert planes_hu[mask].mean() > planes_hu[~mask].mean() + 250
        assert np.abs(np.argwhere(mask).mean(axis=0) - (NUM_PLANES / 2, 32, 32)).max() < 12
    levels = [bool((truth(number).fractures == label).any()) for label in range(1, 8)]
    assert stacks.fractured.tolist() == levels


@pytest.mark.parametrize("number", FRACTURED_WITH_BOXES)
def test_regions_hold_the_fracture_and_lie_at_its_bone(cut_by_truth: Cache, number: int) -> None:
    stacks, phantom = stacks_of(cut_by_truth, number), truth(number)
    mask = cut_by_truth.study(uid(number)).mask()
    assert mask is not None

    assert stacks.regions_known.all()
    for i in np.flatnonzero(stacks.fractured):
        points = cut_by_truth.study(uid(number)).grid.to_lps_mm(np.argwhere(mask == i + 1).astype(float))
        planes = stack_grid(middle_of_box(points), float(np.ptp(points[:, 2])), SETTINGS)
        gap = sample_mask(phantom.fractures, phantom.grid, planes, int(i) + 1).numpy() > 0.5
        region = stacks.regions[i] > 0
        assert region[gap].mean() > 0.95
        assert 0 < region.sum() < 0.35 * region.size
        assert (stacks.masks[i][region] > 0).mean() > 0.3
    assert not stacks.regions[~stacks.fractured].any()


def test_a_fractured_vertebra_without_boxes_has_no_region_to_learn(cut_by_truth: Cache) -> None:
    stacks = stacks_of(cut_by_truth, FRACTURED_WITHOUT)

    assert stacks.fractured.any()
    assert (stacks.regions_known == ~stacks.fractured).all()


def test_the_slices_of_the_network_are_every_other_plane(cut_by_truth: Cache) -> None:
    slices = stacks_of(cut_by_truth, 1).masks[:, NUM_NEIGHBOURS : NUM_PLANES - NUM_NEIGHBOURS : 2]

    assert slices.shape[1] == SETTINGS.num_slices
    assert (slices > 127).any(axis=(2, 3)).mean() > 0.8


def without_lowest_slices(volume: Volume, num_slices: int) -> Volume:
    part = volume.voxels_hu[num_slices:]
    return replace(
        volume,
        voxels_hu=part,
        grid=volume.grid.part(np.array([num_slices, 0, 0]), part.shape),
        slices=volume.slices[num_slices:],
    )


@pytest.mark.parametrize(("share_lost", "judged"), [(0.45, True), (0.8, False)])
def test_a_vertebra_that_is_hardly_visible_is_not_judged(rsna_cache: Cache, share_lost: float, judged: bool) -> None:
    study = replace(rsna_cache.study(uid(1)), levels=(True,) * 7)
    mask = study.mask()
    assert mask is not None
    heights = np.sort(np.argwhere(mask == 7)[:, 0])
    lost = int(heights[int(share_lost * len(heights))]) + 1
    volume = without_lowest_slices(study.volume(), lost)

    stacks = cut_study(study, volume, mask[lost:], volume.grid, SETTINGS)

    left = (mask[lost:] == 7).sum() / (mask == 7).sum()
    assert stacks.visible[6] == pytest.approx(left, abs=0.12)
    assert stacks.judged.tolist() == stacks.fractured.tolist() == [True] * 6 + [judged]
    assert stacks.planes_hu[6].any() == judged


@pytest.mark.parametrize("twist_deg", [30.0, -45.0])
def test_a_patient_who_lies_turned_is_cut_facing_forward_as_the_pipeline_judges(
    cut_by_truth: Cache, twist_deg: float
) -> None:
    study = cut_by_truth.study(uid(1))
    mask, volume = study.mask(), study.volume()
    assert mask is not None
    grid = Grid(shape=volume.grid.shape, affine=about_long_axis(twist_deg) @ volume.grid.affine)

    turned = cut_study(study, replace(volume, grid=grid), mask, grid, SETTINGS)

    for one, other in zip(turned.masks > 127, stacks_of(cut_by_truth, 1).masks > 127, strict=True):
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.7, "0.6 at most if cut as scanned"


def test_a_level_without_a_label_is_not_visible(rsna_cache: Cache) -> None:
    study = rsna_cache.study(uid(1))
    labels = study.labels()
    assert labels is not None

    shares = visible_shares(np.where(labels == 3, 0, labels), study.neck_grid, study.grid)

    assert shares.tolist() == [1, 1, 0, 1, 1, 1, 1]


# ---- where the vertebrae come from ----


def test_labels_of_a_set_on_the_neck_grid_give_the_same_stacks_but_for_its_coarseness(cut_by_truth: Cache) -> None:
    study = cut_by_truth.study(uid(0))
    labels = study.labels()
    assert labels is not None
    study.write_labels("predicted", labels)

    reasons = {found.study_instance_uid: why for found, why in cut(cut_by_truth, "predicted", SETTINGS, "predicted")}

    assert [name for name, why in reasons.items() if why is None] == [uid(0)]
    assert cut_by_truth.study(uid(1)).stacks("predicted") is None
    assert cut_by_truth.study(uid(1)).labels("predicted") is None
    mine, true = stacks_of(cut_by_truth, 0, "predicted"), stacks_of(cut_by_truth, 0)
    assert mine.fractured.tolist() == true.fractured.tolist()
    both = (mine.masks > 127) & (true.masks > 127)
    assert 2 * both.sum() / ((mine.masks > 127).sum() + (true.masks > 127).sum()) > 0.8
    with pytest.raises(ValueError, match=r"expected \(\d+, \d+, \d+\)"):
        study.write_labels("predicted", labels[1:])


def test_a_bundle_finds_the_vertebrae_itself(
    rsna_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(rsna_cache, folds={uid(7): 0})

    with monkeypatch.context() as there:
        there.chdir(DEFAULT_BUNDLE.parent)
        ((_, reason),) = cut(one, "bundle", SETTINGS, Path(DEFAULT_BUNDLE.name))
    monkeypatch.chdir(tmp_path)
    assert cut_fingerprint(one, "bundle"), "wherever the next step runs"

    assert reason is None
    assert stacks_of(one, 7, "bundle").judged.sum() >= 4


def test_a_study_that_the_bundle_refuses_has_no_stacks(rsna_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def segment(self, volume: Volume) -> None:
            raise SeriesError(f"Series {volume.series_instance_uid} holds no Hounsfield units.")

    monkeypatch.setattr("training.rsna.cuts._pipeline", lambda bundle: Refuses())

    ((study, reason),) = cut(replace(rsna_cache, folds={uid(7): 0}), "refused", SETTINGS, DEFAULT_BUNDLE)

    assert reason is not None
    assert "holds no Hounsfield units" in reason
    assert study.stacks("refused") is None


# ---- cut once ----


def inodes(cache: Cache, name: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_ino for path in (cache.folder / "cuts" / name).glob("*/stacks.json")}


def test_stacks_are_cut_again_only_if_their_labels_or_settings_changed(rsna_cache: Cache) -> None:
    few = replace(rsna_cache, folds={uid(0): 0, uid(1): 1})
    for number in (0, 1):
        few.study(uid(number)).write_labels("again", np.asarray(few.study(uid(number)).labels()))

    def cut_again(settings: CutSettings) -> set[str]:
        before = inodes(few, "again")
        list(cut(few, "again", settings, "again"))
        return {name for name, inode in inodes(few, "again").items() if before.get(name) != inode}

    assert cut_again(SETTINGS) == {uid(0), uid(1)}
    assert cut_again(SETTINGS) == set()
    few.study(uid(1)).write_labels("again", np.asarray(few.study(uid(1)).labels()) % 7)
    assert cut_again(SETTINGS) == {uid(1)}
    assert cut_again(replace(SETTINGS, num_pixels=32)) == {uid(0), uid(1)}
    assert cut_settings(few, "again") == replace(SETTINGS, num_pixels=32)


def test_a_study_that_can_no_longer_be_read_is_left_out_by_name_and_a_cut_counts_when_it_is_whole(
    rsna_cache: Cache, rsna_folder: Path, tmp_path: Path
) -> None:
    for number in (0, 1):
        shutil.copytree(rsna_folder / "train_images" / uid(number), tmp_path / "train_images" / uid(number))
    for path in (tmp_path / "train_images" / uid(1)).iterdir():
        path.write_bytes(b"damaged")
    few = replace(rsna_cache, source=tmp_path, folds={uid(0): 0, uid(1): 1})

    run = cut(few, "damaged", SETTINGS, "truth")
    done = [next(run)]
    with pytest.raises(CacheError, match="There is no finished cut 'damaged'"):
        cut_settings(few, "damaged")
    done += run

    reasons = {study.study_instance_uid: reason for study, reason in done}
    assert reasons.pop(uid(0)) is None
    assert json.loads((few.folder / "cuts" / "damaged" / "cut.json").read_text())["left_out"] == reasons
    assert reasons[uid(1)]
    assert {vertebra.study.study_instance_uid for vertebra in judged_vertebrae(few.studies(), "damaged")} == {uid(0)}


def test_a_cut_is_not_read_when_its_labels_or_studies_have_changed_since(rsna_cache: Cache) -> None:
    few = replace(rsna_cache, folds={uid(0): 0})
    labels = np.asarray(few.study(uid(0)).labels())
    few.study(uid(0)).write_labels("stale", labels)
    list(cut(few, "stale", SETTINGS, "stale"))
    before = cut_fingerprint(few, "stale")
    few.study(uid(0)).write_labels("stale", labels)  # the same ones again

    assert cut_fingerprint(few, "stale") == before
    few.study(uid(0)).write_labels("stale", labels % 7)
    with pytest.raises(CacheError, match="Since the cut 'stale' was made, the labels 'stale' changed"):
        cut_fingerprint(few, "stale")
    list(cut(few, "stale", SETTINGS, "stale"))
    assert cut_fingerprint(few, "stale") != before
    with pytest.raises(CacheError, match=r"the cache changed\. Run `cspine-train cut"):
        cut_fingerprint(replace(few, fingerprint="another"), "stale")


def test_what_is_not_there_is_one_sentence(rsna_cache: Cache, tmp_path: Path) -> None:
    arguments = ["cut", "--cache", str(rsna_cache.folder), "--name", "none", "--masks", "no-such-set", "--workers", "1"]

    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 1
    assert "Error: No study got labels from 'no-such-set'" in result.output
    with pytest.raises(CacheError, match="There is no finished cut 'other'"):
        cut_settings(rsna_cache, "other")
    with pytest.raises(CacheError, match="no longer in"):
        replace(rsna_cache, source=tmp_path).study(uid(0)).volume()
