"""The pipeline with the shipped weights: phantoms in, findings and masks out, compared with the truth."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, distance_transform_edt
from scipy.spatial.transform import Rotation

from model.bundle import PHANTOM_BUNDLE
from model.findings import Analysis, Finding
from model.geometry import FloatArray, Grid
from model.levels import LEVELS
from model.phantom import Anatomy, Fracture, Phantom, default_grid, render
from model.pipeline import Pipeline, load_pipeline
from tests import factories

BROKEN = Fracture(level="C5", kind="body", width_mm=2.5)


@cache
def pipeline() -> Pipeline:
    return load_pipeline(PHANTOM_BUNDLE, device="cpu", num_threads=2)


make_volume = partial(factories.make_volume, warnings=("A localizer was left out.",))


def turned(grid: Grid, turn: FloatArray) -> Grid:
    """The same box acquired with other axes: `turn` maps LPS to LPS around the grid's centre."""
    centre = grid.to_lps_mm((np.asarray(grid.shape) - 1) / 2)
    affine = grid.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.asarray(grid.shape) - 1) / 2)
    return Grid(shape=grid.shape, affine=affine)


@cache
def phantom(is_broken: bool = True) -> Phantom:
    anatomy = Anatomy.random(31, (BROKEN,) if is_broken else ())
    return render(anatomy, default_grid(anatomy, (1.25, 0.8, 0.8)), seed=1)


@cache
def analysis(is_broken: bool = True) -> Analysis:
    made = phantom(is_broken)
    return pipeline().analyse(make_volume(made.voxels_hu, made.grid))


def dice(drawn: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()))


def test_every_level_is_outlined_and_numbered() -> None:
    truth = phantom().vertebrae

    scores = {name: dice(analysis().vertebrae == k, truth == k) for k, name in enumerate(LEVELS, start=1)}

    assert np.mean(list(scores.values())) >= 0.85, scores
    assert min(scores.values()) >= 0.7, scores


def test_centroid_and_volume_are_those_of_the_mask() -> None:
    for k, name in enumerate(LEVELS, start=1):
        mask = analysis().vertebrae == k
        level = analysis().findings.levels[name]
        centroid = phantom().grid.to_lps_mm(np.argwhere(mask).mean(axis=0))
        np.testing.assert_allclose(level.centroid_lps_mm, centroid, atol=0.01)
        assert level.volume_mm3 == pytest.approx(mask.sum() * phantom().grid.voxel_volume_mm3)


def test_the_fractured_level_and_no_other_is_present() -> None:
    findings = {name: level.finding for name, level in analysis().findings.levels.items()}

    assert findings == {name: Finding.PRESENT if name == "C5" else Finding.ABSENT for name in LEVELS}
    assert analysis().findings.patient_overall.finding is Finding.PRESENT


def test_an_intact_neck_is_absent_everywhere_and_has_no_region() -> None:
    findings = analysis(is_broken=False).findings

    assert [level.finding for level in findings.levels.values()] == [Finding.ABSENT] * 7
    assert findings.patient_overall.finding is Finding.ABSENT
    seen = findings.levels | {"C7": replace(findings.levels["C7"], finding=Finding.UNDETERMINED, probability=None)}
    assert pipeline()._patient(seen, -9.0).finding is Finding.UNDETERMINED
    assert pipeline()._patient(seen, -9.0).probability is not None
    assert not analysis(is_broken=False).fractures.any()
    assert all(level.regions == () for level in findings.levels.values())


def test_regions_lie_on_the_fracture() -> None:
    drawn, truth = analysis().fractures, phantom().fractures

    assert set(np.unique(drawn)) == {0, 5}
    assert (truth[drawn > 0] == 5).mean() > 0.3
    to_truth_mm = distance_transform_edt(truth == 0, sampling=phantom().grid.spacing_mm)
    assert (to_truth_mm[drawn > 0] < 3).mean() > 0.8


def test_saliency_is_strongest_at_the_fracture_and_zero_away_from_suspected_levels() -> None:
    saliency, truth = analysis().saliency, phantom().fractures
    planes = saliency.max(axis=(1, 2))

    assert not saliency[(analysis().vertebrae > 0) & ~np.isin(analysis().vertebrae, (4, 5, 6))].any()
    assert saliency.max() > 128
    strongest = saliency >= np.quantile(saliency[saliency > 0], 0.99)
    to_truth_mm = distance_transform_edt(truth == 0, sampling=phantom().grid.spacing_mm)
    assert to_truth_mm[strongest].mean() < 3
    most = max(analysis().findings.levels["C5"].attention, key=lambda share: share.weight)
    assert abs(int(most.sop_instance_uid.split(".")[-1]) - int(planes.argmax())) <= 2


def test_boxes_enclose_the_region_mask_of_their_instance() -> None:
    left = analysis().fractures.copy()
    regions = analysis().findings.levels["C5"].regions

    assert regions
    for region in regions:
        z = int(region.sop_instance_uid.split(".")[-1])
        box = left[z, region.y : region.y + region.height, region.x : region.x + region.width]
        assert box.any()
        box[:] = 0
    assert not left.any()


def test_attention_sums_to_one_over_instances_of_the_level() -> None:
    for k, name in enumerate(LEVELS, start=1):
        attention = analysis().findings.levels[name].attention
        planes = np.flatnonzero((analysis().vertebrae == k).any(axis=(1, 2)))
        indices = [int(share.sop_instance_uid.split(".")[-1]) for share in attention]
        assert sum(share.weight for share in attention) == pytest.approx(1)
        assert planes.min() - 1 <= min(indices) <= max(indices) <= planes.max() + 1


def test_attention_looks_at_the_fracture() -> None:
    broken = (phantom().fractures == 5).any(axis=(1, 2))
    near = {z + step for z in np.flatnonzero(broken) for step in (-1, 0, 1)}

    on_it = sum(
        share.weight
        for share in analysis().findings.levels["C5"].attention
        if int(share.sop_instance_uid.split(".")[-1]) in near
    )

    assert on_it > 0.7


def test_the_same_volume_gets_the_same_answer() -> None:
    made = phantom()

    again = pipeline().analyse(make_volume(made.voxels_hu, made.grid))

    assert again.findings.levels == analysis().findings.levels
    np.testing.assert_array_equal(again.vertebrae, analysis().vertebrae)
    np.testing.assert_array_equal(again.fractures, analysis().fractures)


ACQUISITIONS = {
    "feet first, seen from above": np.diag([-1.0, 1, -1]),
    "face down": np.diag([-1.0, -1, 1]),
    "tilted by 15 degrees": np.array([[1, 0, 0], [0, 0.966, -0.259], [0, 0.259, 0.966]]),
}


@pytest.mark.parametrize("turn", ACQUISITIONS.values(), ids=ACQUISITIONS.keys())
def test_masks_fall_on_the_same_patient_however_it_was_acquired(turn: FloatArray) -> None:
    anatomy = Anatomy.random(31, (BROKEN,))
    grid = turned(default_grid(anatomy, (1.5, 1.0, 1.0)), turn)
    made = render(anatomy, grid, seed=1)

    found = pipeline().analyse(make_volume(made.voxels_hu, grid))

    middle = [k for k in range(1, 8) if found.findings.levels[LEVELS[k - 1]].probability is not None]
    assert set(middle) >= {3, 4, 5, 6}
    assert np.mean([dice(found.vertebrae == k, made.vertebrae == k) for k in middle]) > 0.8
    assert found.findings.levels["C5"].finding is Finding.PRESENT


@pytest.mark.parametrize("twist_deg", [40, -40])
def test_a_patient_on_one_shoulder_gets_the_findings_of_one_on_the_back(twist_deg: float) -> None:
    made = phantom()
    grid = turned(made.grid, Rotation.from_euler("z", twist_deg, degrees=True).as_matrix())

    found = pipeline().analyse(make_volume(made.voxels_hu, grid))

    for label, name in enumerate(LEVELS, start=1):
        plain = analysis().findings.levels[name]
        assert found.findings.levels[name].finding is plain.finding
        assert dice(found.vertebrae == label, analysis().vertebrae == label) > 0.9
    shown = found.fractures == 5
    there = binary_dilation(analysis().fractures == 5, iterations=2)
    assert (shown & there).any()


def test_a_cut_vertebra_is_undetermined_and_what_lies_beyond_is_not_invented() -> None:
    made = phantom()
    first = int(np.argwhere(made.vertebrae == 6).mean(axis=0)[0])
    affine = made.grid.affine.copy()
    affine[:3, 3] = made.grid.to_lps_mm(np.array([first, 0, 0], float))
    voxels_hu = made.voxels_hu[first:]
    z, y, x = voxels_hu.shape

    found = pipeline().analyse(make_volume(voxels_hu, Grid(shape=(z, y, x), affine=affine))).findings

    assert found.levels["C6"].in_field_of_view
    assert found.levels["C6"].finding is Finding.UNDETERMINED
    assert found.levels["C6"].probability is None
    assert found.levels["C5"].finding is Finding.PRESENT
    assert any("C6" in warning and "Cut" in warning for warning in found.warnings)


@pytest.mark.parametrize("hu", [-1024, 40], ids=["air", "water"])
def test_without_a_spine_nothing_is_judged_and_it_says_so(hu: int) -> None:
    grid = Grid.axial(shape=(40, 64, 64), spacing_mm=(2.0, 2.0, 2.0))

    found = pipeline().analyse(make_volume(np.full(grid.shape, hu, np.int16), grid))

    assert not found.vertebrae.any()
    assert [level.finding for level in found.findings.levels.values()] == [Finding.UNDETERMINED] * 7
    assert found.findings.patient_overall.finding is Finding.UNDETERMINED
    assert found.findings.patient_overall.probability is None
    assert "No cervical vertebra was found" in found.findings.warnings[-1]
    assert found.findings.warnings[0] == "A localizer was left out."


def test_stages_are_announced_in_order_and_timed() -> None:
    grid = Grid.axial(shape=(20, 32, 32), spacing_mm=(2.0, 2.0, 2.0))
    stages: list[str] = []

    found = pipeline().analyse(make_volume(np.zeros(grid.shape, np.int16), grid), on_stage=stages.append)

    assert stages == ["segment", "classify"]
    assert found.findings.timings_s.keys() == {"segment", "classify"}


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'toaster'"):
        load_pipeline(device="toaster")
