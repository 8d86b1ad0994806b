"""FROC of boxes, and measures of masks, on arrangements whose answer is known."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from model import Grid
from model.levels import OUTPUTS
from training.evaluation.bootstrap import draw_resamples
from training.evaluation.evaluate import measure_regions
from training.evaluation.froc import Box, chains, compare, froc_curves, iou, measure_froc, sensitivity_at
from training.evaluation.masks import attention_alignment, dice, identified, measure_masks, surface_distances_mm
from training.evaluation.metrics import Settings
from training.evaluation.tables import Matched


def box(x: float, z: int = 0, score: float = 1.0, size: float = 10) -> Box:
    return Box(x=x, y=0, width=size, height=size, slice_number=z, score=score)


def test_iou_of_boxes_and_of_chains() -> None:
    assert iou((box(0),), (box(5),)) == pytest.approx(50 / 150)
    assert iou((box(0),), (box(0, z=1),)) == 0
    # Two of three slices agree fully.
    assert iou((box(0), box(0, z=1)), (box(0), box(0, z=1), box(0, z=2))) == pytest.approx(200 / 300)


def test_where_boxes_of_one_chain_overlap_counts_once() -> None:
    # A row given twice, two readers' boxes, the regions of C1 and C2 in one slice.
    assert iou((box(0), box(0)), (box(0),)) == 1
    assert iou((box(0), box(0)), (box(0), box(0))) == 1
    assert iou((box(0), box(5)), (box(0), box(5))) == 1
    assert iou((box(0), box(1), box(2)), (box(9), box(10))) == pytest.approx(30 / 200)


def test_boxes_that_overlap_from_slice_to_slice_are_one_fracture() -> None:
    boxes = [box(0), box(8, z=1), box(16, z=2), box(200, z=1), box(0, z=7)]
    assert sorted(len(chain) for chain in chains(boxes)) == [1, 1, 3]
    assert sorted(len(chain) for chain in chains(boxes[::-1])) == [1, 1, 3]


def test_froc_worked_out_by_hand() -> None:
    true = {"a": [box(0), box(100)], "b": [box(0)]}
    predicted = {
        "a": [box(1, score=0.9), box(2, score=0.5), box(300, score=0.8)],  # one found twice, a false one
        "b": [box(50, score=0.7), box(3, score=0.6)],
        "c": [box(0, score=0.2)],  # intact
    }
    events = compare(["a", "b", "c", "d"], predicted, true, as_chains=False)
    assert events.score.tolist() == [0.9, 0.8, 0.7, 0.6, 0.2]
    assert events.is_found.tolist() == [True, False, False, True, False]
    false_positives, sensitivity = froc_curves(events, np.ones((1, 4)))
    assert false_positives[0].tolist() == [0, 0, 0.25, 0.5, 0.5, 0.75]
    assert sensitivity[0] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert sensitivity_at(false_positives, sensitivity, 0.5)[0] == pytest.approx(2 / 3)
    assert sensitivity_at(false_positives, sensitivity, 0.49)[0] == pytest.approx(1 / 3)


def test_an_iou_of_exactly_one_fifth_is_no_hit() -> None:
    true, guess = box(0), Box(x=0, y=0, width=10, height=2, slice_number=0)
    assert iou((true,), (guess,)) == 0.2
    assert not compare(["a"], {"a": [guess]}, {"a": [true]}, as_chains=False).is_found.any()


def test_finds_and_false_positives_of_one_score_come_together() -> None:
    events = compare(["a"], {"a": [box(0, score=0.5), box(90, score=0.5)]}, {"a": [box(0)]}, as_chains=False)
    false_positives, sensitivity = froc_curves(events, np.ones((1, 1)))
    assert false_positives[0].tolist() == [0, 1]
    assert sensitivity[0].tolist() == [0, 1]


def test_froc_has_intervals_over_studies_and_a_reason_without_any_box() -> None:
    studies = [str(number) for number in range(30)]
    true = {study: [box(0)] for study in studies[:20]}
    predicted = {study: [box(0 if number % 3 else 70, score=0.5)] for number, study in enumerate(studies)}
    resamples = draw_resamples(studies, 200, 0)
    found = measure_froc(compare(studies, predicted, true, as_chains=True), resamples)
    lower, upper = found["sensitivity_at_1_fp_ci"]
    assert lower < found["sensitivity_at_1_fp"] == 13 / 20 < upper
    assert found["sensitivity_at_0_5_fp"] == 0  # the only threshold admits 17 of 30
    assert "no true box" in measure_froc(compare(studies, predicted, {}, as_chains=True), resamples)["reasons"]["all"]


GRID = Grid.axial(shape=(20, 20, 20), spacing_mm=(2.0, 1.0, 0.5))


def blocks(*levels: tuple[int, int]) -> np.ndarray:  # type: ignore[type-arg]
    """Blocks of 4 x 8 x 8 voxels; (label, first slice)."""
    labels = np.zeros(GRID.shape, np.uint8)
    for label, first in levels:
        labels[first : first + 4, 4:12, 4:12] = label
    return labels


def test_dice_leaves_out_what_the_truth_lacks_and_names_what_was_invented() -> None:
    found = measure_masks(blocks((2, 0), (3, 8)), blocks((2, 1), (5, 14)), GRID)
    assert found["dice"] == {"C2": 0.75, "C3": 0.0}
    assert found["invented"] == ["C5"]
    assert found["hd95_mm"]["C3"] is None
    assert found["identified"] == {"C2": True, "C3": False}
    assert dice(np.zeros(3, bool), np.zeros(3, bool)) == 1


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_distances_of_surfaces_are_in_mm_on_sheared_grids_too(tilt: float) -> None:
    affine = GRID.affine.copy()
    affine[1, 0] = tilt * 2  # each slice is shifted along Y: a tilted gantry
    grid = Grid(shape=GRID.shape, affine=affine)
    thin, shifted = np.zeros(GRID.shape, bool), np.zeros(GRID.shape, bool)
    thin[5], shifted[8] = True, True
    hd95, average = surface_distances_mm(thin, shifted, grid)
    # Planes three slices of 2 mm apart, whose nearest voxels lie straight above if the shift is one of whole voxels.
    offset = abs(3 * tilt * 2 - round(3 * tilt * 2))
    inner = np.hypot(6, offset)
    assert average == pytest.approx(inner, rel=0.02)
    assert hd95 is not None
    assert inner <= hd95 <= inner * 1.05
    same = surface_distances_mm(thin, thin, grid)
    assert same == (0, 0)


def test_hd95_ignores_the_farthest_twentieth() -> None:
    true, drawn = np.zeros((30, 30, 30), bool), np.zeros((30, 30, 30), bool)
    true[5:25, 5:25, 5] = drawn[5:25, 5:25, 5] = True
    drawn[5, 5, 5:25] = True  # a spike: 19 of 419 voxels
    grid = Grid.axial(shape=(30, 30, 30), spacing_mm=(1, 1, 1))
    hd95, average = surface_distances_mm(true, drawn, grid)
    assert hd95 == 0
    assert average == pytest.approx(sum(range(1, 20)) / (400 + 419))


def test_a_vertebra_is_identified_near_its_own_place_only() -> None:
    true = {name: np.array([0.0, 0.0, -15.0 * number]) for number, name in enumerate(("C3", "C4", "C5"))}
    moved = {name: place + np.array([0, 0, 6]) for name, place in true.items()}
    assert identified(true, moved) == {"C3": True, "C4": True, "C5": True}
    one_off = {name: place + np.array([0, 0, 10]) for name, place in true.items()}
    assert identified(true, one_off) == {"C3": True, "C4": False, "C5": False}
    far = {name: place + np.array([0, 30, 0]) for name, place in true.items()}
    assert not any(identified(true, far).values())


def test_masks_of_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="bring them onto one grid"):
        measure_masks(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), GRID)


def test_distances_agree_with_scipys_distance_transform() -> None:
    rng = np.random.default_rng(0)
    points = np.argwhere(np.ones((24, 24, 24)))
    grid = Grid.axial(shape=(24, 24, 24), spacing_mm=(1.5, 1.0, 0.5))
    balls = [
        (np.linalg.norm((points - centre) * (1, 1, 0.8), axis=1) < 7).reshape(24, 24, 24)
        for centre in rng.normal(12, 1, size=(2, 3))
    ]
    surfaces = [ball & ~binary_erosion(ball) for ball in balls]
    away = [distance_transform_edt(~surface, sampling=grid.spacing_mm) for surface in surfaces]
    there, back = away[1][surfaces[0]], away[0][surfaces[1]]
    hd95, average = surface_distances_mm(balls[0], balls[1], grid)
    assert hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert average == pytest.approx(np.concatenate([there, back]).mean())


def test_attention_alignment_beside_even_attention() -> None:
    weights = {10: 0.1, 11: 0.6, 12: 0.3, 13: 0.0}
    assert attention_alignment(weights, {11, 12, 40}) == pytest.approx((0.9, 0.5))
    assert attention_alignment(weights, {40}) is None
    assert attention_alignment({}, {1}) is None


def test_the_intervals_of_an_froc_curve_draw_patients_not_studies() -> None:
    studies = ("1", "2")
    matched = Matched(
        studies=studies,
        truth=np.ones((2, 8), bool),
        predicted=np.ones((2, 8)),
        only_in_predictions=(),
        only_in_truth=(),
    )
    box = Box(x=0, y=0, width=10, height=10, slice_number=1)
    settings = Settings(operating_points=dict.fromkeys(OUTPUTS, 0.5), num_resamples=50)
    true = {study: [box] for study in studies}

    alone, _ = measure_regions(matched, {"1": [box]}, true, settings, {})
    together, _ = measure_regions(matched, {"1": [box]}, true, settings, dict.fromkeys(studies, "the same"))

    assert alone["sensitivity_at_1_fp_ci"] == [0, 1]
    assert together["sensitivity_at_1_fp_ci"] is None  # one patient: no resample differs
