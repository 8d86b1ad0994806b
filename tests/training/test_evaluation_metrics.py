"""The numbers of an evaluation, against values worked out by hand or by another way."""

import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, mannwhitneyu, norm

from model.levels import OUTPUTS
from tests.training.evaluation_data import draw_patients
from training.evaluation import average_precision, roc_auc, weighted_log_loss
from training.evaluation.binary import Question, measure
from training.evaluation.bootstrap import (
    draw_resamples,
    over_resamples,
    percentile_interval,
    share_interval,
    wilson_interval,
)
from training.evaluation.loss import best_constants, constant_baselines, study_losses
from training.evaluation.metrics import Settings, any_called, level_accuracy, localisation, measure_all
from training.evaluation.ranking import Ranking, pr_curve, roc_areas, roc_curve
from training.evaluation.subgroups import split
from training.evaluation.tables import InputError, Matched

WILSON = partial(share_interval, resamples=np.zeros((0, 0), np.float32), one_row_per_patient=True)

HALF = dict.fromkeys(OUTPUTS, 0.5)


def matched(truth: Any, predicted: Any) -> Matched:
    studies = tuple(f"1.2.{number}" for number in range(len(truth)))
    return Matched(
        studies=studies,
        truth=np.asarray(truth, bool),
        predicted=np.asarray(predicted, float),
        only_in_predictions=(),
        only_in_truth=(),
    )


def question(truth: list[int], probability: list[float], operating_point: float = 0.5) -> Question:
    return Question(
        truth=np.array(truth, bool),
        probability=np.array(probability),
        operating_point=np.full(len(truth), operating_point),
        study=np.arange(len(truth)),
    )


def answers(asked: Question, num_resamples: int = 50, *, one_row_per_patient: bool = True) -> dict[str, Any]:
    resamples = draw_resamples(range(len(asked.truth)), num_resamples, 0)
    return measure(asked, resamples, one_row_per_patient=one_row_per_patient)


# ---- the challenge's log loss ----


def test_every_probability_one_half_costs_the_logarithm_of_two_whatever_the_truth() -> None:
    truth, _ = draw_patients(50)
    assert weighted_log_loss(truth, np.full((50, 8), 0.5)) == pytest.approx(0.693147, abs=1e-6)


def test_the_weighted_log_loss_of_two_studies_worked_out_by_hand() -> None:
    truth = np.zeros((2, 8), bool)
    truth[0, [0, 2]] = True  # patient and C2: weights 14, 1, 2, 1, 1, 1, 1, 1 = 22; the other Study 7 + 7 x 1 = 14
    probability = np.full((2, 8), 0.1)
    probability[0, 0] = 0.8
    first = (14 * -math.log(0.8) + 2 * -math.log(0.1) + 6 * -math.log(0.9)) / 22
    second = -math.log(0.9)
    assert study_losses(truth, probability) == pytest.approx([first, second])
    assert weighted_log_loss(truth, probability) == pytest.approx((first + second) / 2)


def test_a_wrong_certainty_costs_a_finite_amount() -> None:
    truth = np.ones((1, 8), bool)
    assert weighted_log_loss(truth, np.zeros((1, 8))) == pytest.approx(-math.log(1e-15))
    assert weighted_log_loss(truth, np.ones((1, 8))) == pytest.approx(0, abs=1e-14)


def test_no_other_constant_is_better_than_the_best_constants() -> None:
    truth, _ = draw_patients(300)
    best = best_constants(truth)

    for column in range(8):

        def loss(constant: float, column: int = column) -> float:
            constants = best.copy()
            constants[column] = constant
            return weighted_log_loss(truth, np.tile(constants, (len(truth), 1)))

        found = minimize_scalar(loss, bounds=(0.001, 0.999), method="bounded", options={"xatol": 1e-6})
        assert best[column] == pytest.approx(found.x, abs=1e-4)


def test_constants_on_labels_as_frequent_as_the_challenges_cost_what_they_cost_there() -> None:
    """Published on its 2,019 Studies: base rates 0.5638, best constants 0.5573; levels here are drawn independently."""
    truth, _ = draw_patients(20_000)
    losses = {
        name: weighted_log_loss(truth, np.tile(constants, (len(truth), 1)))
        for name, constants in constant_baselines(truth).items()
    }
    assert losses["base_rates"] == pytest.approx(0.5638, abs=0.005)
    assert losses["best_constants"] == pytest.approx(0.5573, abs=0.005)
    assert losses["best_constants"] < losses["base_rates"] < losses["all_half"]


# ---- ranking ----


def test_auc_counts_a_tie_as_half_a_win() -> None:
    # Pairs: 0.9 > 0.5 win, 0.9 > 0.2 win, 0.5 = 0.5 tie, 0.5 > 0.2 win: 3.5 of 4.
    assert roc_auc(np.array([1, 1, 0, 0], bool), np.array([0.9, 0.5, 0.5, 0.2])) == 3.5 / 4
    assert roc_auc(np.array([1, 0, 1, 0], bool), np.full(4, 0.3)) == 0.5


def test_scores_that_are_no_numbers_are_refused_and_no_scores_have_no_auc() -> None:
    with pytest.raises(ValueError, match="2 of 3 scores are NaN"):
        roc_auc(np.array([1, 1, 0], bool), np.array([math.nan, math.nan, 1.0]))
    for measure_of in (roc_auc, average_precision):
        assert math.isnan(measure_of(np.zeros(0, bool), np.zeros(0)))
    assert roc_auc(np.array([1, 0], bool), np.full(2, math.inf)) == 0.5


def test_auc_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    scores = np.round(rng.normal(size=300) + truth, 1)  # many ties
    statistic = mannwhitneyu(scores[truth], scores[~truth]).statistic
    assert roc_auc(truth, scores) == pytest.approx(statistic / (truth.sum() * (~truth).sum()))
    assert np.trapezoid(*roc_curve(truth, scores)[::-1]) == pytest.approx(roc_auc(truth, scores))


def test_average_precision_worked_out_by_hand() -> None:
    # Precision at the positives: 1/1, 2/3; each adds half of the recall.
    truth, scores = np.array([1, 0, 1, 0], bool), np.array([0.9, 0.8, 0.7, 0.1])
    assert average_precision(truth, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # All tied: one threshold, whose precision is the prevalence.
    assert average_precision(truth, np.full(4, 0.5)) == 0.5
    recall, precision = pr_curve(truth, scores)
    assert recall.tolist() == [0.5, 0.5, 1, 1]
    assert precision == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])


def test_a_resample_has_the_auc_of_the_rows_repeated_as_often_as_it_counts_them() -> None:
    rng = np.random.default_rng(1)
    truth, scores = rng.random(40) < 0.4, np.round(rng.random(40), 1)
    counts = rng.integers(0, 4, size=(5, 40)).astype(float)
    found = roc_areas(*Ranking.of(truth, scores).counted(counts))
    for row, area in zip(counts.astype(int), found, strict=True):
        assert area == pytest.approx(roc_auc(np.repeat(truth, row), np.repeat(scores, row)))


# ---- intervals ----


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_wilson_intervals_agree_with_scipy(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx([expected.low, expected.high])


def test_resamples_draw_as_many_patients_as_there_are_and_never_split_one() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    counts = draw_resamples(patients, 200, seed=3)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 0] == counts[:, 5]).all()
    assert (counts[:, 1] == counts[:, 4]).all()
    assert (counts[:, 0] + counts[:, 1] + counts[:, 3] == 3).all()
    assert len({tuple(row) for row in counts.tolist()}) > 5


def test_a_seed_gives_the_same_intervals_again() -> None:
    truth, predicted = draw_patients(60)
    settings = Settings(operating_points=HALF, num_resamples=50, seed=4)
    first, second = (measure_all(matched(truth, predicted), settings, {}) for _ in range(2))
    assert first == second
    other = measure_all(matched(truth, predicted), Settings(operating_points=HALF, num_resamples=50, seed=5), {})
    assert other["patient_overall"]["auc"] == first["patient_overall"]["auc"]
    assert other["patient_overall"]["auc_ci"] != first["patient_overall"]["auc_ci"]


def test_the_bootstrap_interval_covers_the_true_auc_about_as_often_as_it_says() -> None:
    truth = np.arange(120) < 40
    true_auc = norm.cdf(1 / math.sqrt(2))  # two normal distributions, one standard deviation apart
    num_covered = 0
    for seed in range(100):
        scores = np.random.default_rng(seed).normal(size=120) + truth
        ranking = Ranking.of(truth, scores)
        found = over_resamples(
            draw_resamples(range(120), 200, seed),
            np.arange(120),
            lambda counts, ranking=ranking: {"auc": roc_areas(*ranking.counted(counts))},  # type: ignore[misc]
        )
        lower, upper = percentile_interval(found["auc"]) or (1, 0)
        num_covered += lower <= true_auc <= upper
    assert 88 <= num_covered <= 100


def test_rows_of_one_patient_widen_the_interval() -> None:
    """Ten copies of a patient tell no more than the patient: a bootstrap over rows would not know."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(30) < 12, 10)
    scores = np.repeat(rng.normal(size=30), 10) + truth
    patients = np.repeat(np.arange(30), 10)

    def width(groups: Any) -> float:
        ranking = Ranking.of(truth, scores)
        found = over_resamples(
            draw_resamples(list(groups), 300, 0),
            np.arange(300),
            lambda counts: {"auc": roc_areas(*ranking.counted(counts))},
        )
        lower, upper = percentile_interval(found["auc"]) or (0, 0)
        return upper - lower

    assert width(patients) > 2 * width(range(300))


def test_several_studies_of_a_patient_do_not_make_shares_surer() -> None:
    truth, predicted = draw_patients(40)

    def widths(times: int) -> list[float]:
        copied = matched(np.tile(truth, (times, 1)), np.tile(predicted, (times, 1)))
        patient_of = {study: str(number % 40) for number, study in enumerate(copied.studies)}
        found = measure_all(copied, Settings(operating_points=HALF), {"PatientID": patient_of})
        assert found["num_patients"] == 40
        intervals = (
            found["patient_overall"]["accuracy_ci"],
            found["any_called"]["specificity_ci"],
            found["all_levels_right_ci"],
        )
        return [upper - lower for lower, upper in intervals]

    for once, ten_times in zip(widths(1), widths(10), strict=True):
        assert ten_times > 0.6 * once  # a third, if the Studies counted


def test_what_is_the_same_in_all_resamples_has_no_interval() -> None:
    truth = np.arange(60) < 5
    found = answers(question(truth.astype(int).tolist(), truth.astype(float).tolist()), 200, one_row_per_patient=False)
    assert found["auc"] == found["sensitivity"] == found["f1"] == 1
    assert found["auc_ci"] is found["sensitivity_ci"] is found["f1_ci"] is None
    assert "all the same" in found["reasons"]["f1_ci"]


def test_what_differs_by_rounding_only_has_no_interval() -> None:
    assert percentile_interval(np.tile([0.6931471805599455, 0.6931471805599461], 50)) is None
    assert percentile_interval(np.tile([1e-12, 2e-12], 50)) == [1e-12, 2e-12]


@pytest.mark.parametrize(("said", "called"), [(0.0, "fractured"), (1.0, "intact")])
def test_a_predictive_value_of_nothing_says_that_nothing_was_called(said: float, called: str) -> None:
    found = answers(question([1, 0, 1, 0], [said] * 4))
    kind = "ppv" if called == "fractured" else "npv"
    assert found[f"{kind}_at_5_percent"] is None
    assert found["reasons"][f"{kind}_at_5_percent"] == f"nothing was called {called}"
    one_class = answers(question([1, 1], [said] * 2))
    assert "sensitivity or specificity" in one_class["reasons"]["ppv_at_5_percent"]


@pytest.mark.parametrize("seed", range(5))
def test_an_auc_of_three_positives_never_has_an_interval(seed: int) -> None:
    truth = np.arange(60) < 3
    asked = question(truth.astype(int).tolist(), np.random.default_rng(seed).random(60).tolist())
    found = measure(asked, draw_resamples(range(60), 500, seed), one_row_per_patient=True)
    assert found["auc_ci"] is found["pr_auc_ci"] is None


# ---- calls and calibration ----


def test_calls_at_the_operating_point_worked_out_by_hand() -> None:
    found = answers(question([1, 1, 1, 0, 0, 0, 0, 0], [0.9, 0.4, 0.3, 0.5, 0.39, 0.2, 0.1, 0.0], 0.4))
    counts = [found[f"{kind}_{what}"] for what in ("positives", "negatives") for kind in ("true", "false")]
    assert counts == [2, 1, 4, 1]  # a probability at the point itself is a call
    assert found["sensitivity"] == found["recall"] == pytest.approx(2 / 3)
    assert found["specificity"] == 0.8
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["specificity_ci"] == wilson_interval(4, 5)
    # Of 1,000 patients, 50 fractured: 33.3 found, 0.2 x 950 = 190 false alarms.
    assert found["ppv_at_5_percent"] == pytest.approx(33.333 / (33.333 + 190), rel=1e-4)
    assert found["npv_at_10_percent"] == pytest.approx(0.9 * 0.8 / (0.9 * 0.8 + 0.1 / 3))


def test_calibration_worked_out_by_hand() -> None:
    found = answers(question([0, 1, 1, 1], [0.2, 0.2, 0.9, 1.0]))
    assert found["brier"] == pytest.approx((0.04 + 0.64 + 0.01 + 0) / 4)
    # Bin 0.2..0.3: said 0.2, was 0.5, two of four; bin 0.9..1: said 0.95, was 1, two of four.
    assert found["ece"] == pytest.approx(0.5 * 0.3 + 0.5 * 0.05)
    assert [(part["num"], part["share_positive"]) for part in found["reliability"]] == [(2, 0.5), (2, 1.0)]


@pytest.mark.parametrize("truth", [[0, 0, 0], [1, 1, 1]])
def test_one_class_gives_null_and_a_reason_and_never_nan(truth: list[int]) -> None:
    found = answers(question(truth, [0.1, 0.2, 0.3]))
    assert found["auc"] is None
    assert found["auc_ci"] is None
    assert "fractured and intact" in found["reasons"]["auc"]
    json.dumps(found, allow_nan=False)


def test_too_few_positives_for_an_interval_give_the_value_without_one_and_say_so() -> None:
    found = answers(question([1, 0, 0, 0, 0, 0], [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]), 200)
    assert found["auc"] == 1
    assert found["auc_ci"] is None
    assert "5 %" in found["reasons"]["auc_ci"]


def test_undetermined_answers_are_counted_and_left_out() -> None:
    found = answers(question([1, 0, 1, 0], [0.9, 0.1, math.nan, math.nan]))
    assert (found["num"], found["num_undetermined_positive"], found["num_undetermined_negative"]) == (2, 1, 1)
    assert found["auc"] == found["sensitivity"] == found["specificity"] == 1


def test_no_answer_at_all_is_measured_as_nothing() -> None:
    found = answers(question([1, 0], [math.nan, math.nan]))
    assert found["num"] == found["true_positives"] == 0
    assert found["reasons"]
    assert found.keys() == answers(question([1, 0], [0.9, 0.1])).keys()
    assert found["auc"] is found["auc_ci"] is found["ece"] is None


# ---- all together ----


def test_an_undetermined_output_costs_what_the_base_rate_costs() -> None:
    truth, predicted = draw_patients(80)
    nothing = np.full((80, 8), math.nan)
    found = measure_all(matched(truth, nothing), Settings(operating_points=HALF, num_resamples=20), {})
    assert found["weighted_log_loss"] == pytest.approx(found["baselines"]["base_rates"]["weighted_log_loss"])
    json.dumps(found, allow_nan=False)
    predicted[:, 3] = math.nan
    partly = measure_all(matched(truth, predicted), Settings(operating_points=HALF, num_resamples=20), {})
    assert partly["levels"]["C3"]["num"] == 0
    assert partly["mean_level_auc_num"] == 6
    assert partly["localisation_accuracy"] is not None


def test_localisation_worked_out_by_hand() -> None:
    truth, predicted = np.zeros((4, 8), bool), np.full((4, 8), 0.1)
    truth[0, [0, 2]] = truth[1, [0, 5]] = truth[2, [0, 7]] = True
    predicted[0, [0, 2]] = 0.9  # right level, called
    predicted[1, [0, 3]] = 0.9  # wrong level, called
    predicted[2, [6, 7]] = 0.4  # C6 and C7 tie, C7 is fractured; not called
    found = localisation(truth, predicted, 0.5, WILSON)
    assert found["localisation_accuracy"] == pytest.approx(1.5 / 3)
    assert found["localisation_accuracy_num"] == 3
    assert found["level_agreement"] == 0.5
    accuracy = level_accuracy(truth[:, 1:], predicted[:, 1:], np.full(7, 0.5), WILSON)
    # Wrong: C5 missed and C3 invented in the second, C7 missed in the third.
    assert accuracy["level_accuracy"] == pytest.approx(25 / 28)
    assert accuracy["all_levels_right"] == 0.5


def test_the_mean_auc_of_levels_is_over_those_with_both_classes() -> None:
    truth, predicted = draw_patients(200)
    truth[:, 3] = False
    found = measure_all(matched(truth, predicted), Settings(operating_points=HALF, num_resamples=100), {})
    areas = [level["auc"] for level in found["levels"].values() if level["auc"] is not None]
    assert found["mean_level_auc_num"] == len(areas) == 6
    assert found["mean_level_auc"] == pytest.approx(np.mean(areas))
    lower, upper = found["mean_level_auc_ci"]
    one = found["levels"]["C7"]["auc_ci"]
    assert lower < found["mean_level_auc"] < upper
    assert upper - lower < one[1] - one[0]  # the mean of six is surer than one


def test_each_level_is_called_at_its_own_operating_point() -> None:
    truth, predicted = draw_patients(50)
    points = HALF | {"C2": 0.0}
    found = measure_all(matched(truth, predicted), Settings(operating_points=points, num_resamples=20), {})
    assert found["levels"]["C2"]["sensitivity"] == 1
    assert found["levels"]["C2"]["specificity"] == 0
    assert found["all_levels"]["operating_point"] is None
    assert found["all_levels"]["false_positives"] == sum(part["false_positives"] for part in found["levels"].values())


def test_subgroups_are_measured_on_their_own_studies_and_lose_none() -> None:
    truth, predicted = draw_patients(60)
    data = matched(truth, predicted)
    scanner = {study: "A" if number < 40 else "B" for number, study in enumerate(data.studies[:50])}
    age = {study: str(20 + number) for number, study in enumerate(data.studies)}
    found = measure_all(data, Settings(operating_points=HALF, num_resamples=20), {"scanner": scanner, "age": age})
    groups = found["subgroups"]["scanner"]
    assert {name: group["num_studies"] for name, group in groups.items()} == {"A": 40, "B": 10, "not stated": 10}
    assert groups["A"]["patient_overall"]["auc"] == pytest.approx(roc_auc(truth[:40, 0], predicted[:40, 0]))
    bins = found["subgroups"]["age"]
    assert list(bins) == ["20 to 34", "35 to 49", "50 to 64", "65 to 79"]
    assert {group["num_studies"] for group in bins.values()} == {15}


@pytest.mark.parametrize(
    ("values", "categories"),
    [
        ([f"2019{month:02d}{day:02d}" for month in (1, 2) for day in range(1, 9)], 4),
        ([f"0.12345678{number:02d}" for number in range(16)], 4),
        (["120", "120.0", "1.2e2", "80", "080"], ["80", "120"]),
        ([str(100_000_000_000_000_000 + number) for number in range(3)], 3),
    ],
)
def test_numbers_are_grouped_by_value_and_named_as_they_are_spelled(values: list[str], categories: object) -> None:
    rows = split(values, {value: value for value in values}, "any")

    assert (len(rows) if isinstance(categories, int) else list(rows)) == categories
    assert sorted(row for part in rows.values() for row in part) == list(range(len(values)))
    if categories == 4:
        assert next(iter(rows)) == f"{values[0]} to {values[3]}"
        assert {len(part) for part in rows.values()} == {4}


def test_a_column_that_is_no_category_is_refused() -> None:
    truth, predicted = draw_patients(60)
    data = matched(truth, predicted)
    names = {study: f"room {number}" for number, study in enumerate(data.studies)}
    with pytest.raises(InputError, match="room has 60 different values"):
        measure_all(data, Settings(operating_points=HALF, num_resamples=5), {"room": names})


def test_a_column_of_patients_groups_the_bootstrap_and_is_no_subgroup() -> None:
    truth, predicted = draw_patients(40)
    data = matched(truth, predicted)
    patients = {study: str(number // 2) for number, study in enumerate(data.studies)}
    settings = Settings(operating_points=HALF, num_resamples=50)
    found = measure_all(data, settings, {"PatientID": patients})
    assert found["num_patients"] == 20
    assert found["subgroups"] == {}
    assert found["patient_overall"]["auc_ci"] != measure_all(data, settings, {})["patient_overall"]["auc_ci"]


def test_a_level_that_is_called_calls_the_patient() -> None:
    fractured = np.array([True, True, False, False, True])
    predicted = np.full((5, 8), 0.1)
    predicted[0, 3], predicted[1, 0], predicted[2, 7] = 0.3, 0.6, 0.3
    predicted[3, 1:], predicted[4] = np.nan, np.nan

    found = any_called(fractured, predicted, np.array([0.5, *[0.25] * 7]), WILSON)

    assert (found["sensitivity"], found["specificity"]) == (1, 0.5)
    assert any_called(fractured[:2], predicted[:2], np.ones(8), WILSON)["specificity"] is None
