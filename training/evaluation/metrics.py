"""From the matched tables to everything in metrics.json that needs probabilities and labels only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.levels import LEVELS, OUTPUTS
from training.evaluation.binary import Question, measure
from training.evaluation.bootstrap import (
    draw_resamples,
    mean_interval,
    over_resamples,
    percentile_interval,
    share_interval,
)
from training.evaluation.loss import constant_baselines, study_losses, weighted_log_loss
from training.evaluation.ranking import Ranking, roc_areas
from training.evaluation.subgroups import split
from training.evaluation.tables import PATIENT, Matched

Array = NDArray[np.float64]

Interval = Callable[[Array, NDArray[np.int64]], list[float] | None]
"""The interval of the mean of scores, from them and their Studies; see `share_interval`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    operating_points: of each output, the probability from which it is called fractured; fixed before anyone looks at
    the truth. num_resamples, seed: of the bootstrap.
    """

    operating_points: Mapping[str, float]
    num_resamples: int = 1000
    seed: int = 0


def measure_all(matched: Matched, settings: Settings, subgroups: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The metrics of all Studies and of each subgroup; keys as in README.md.

    subgroups: column to Study to category, see `tables.read_subgroups`; its column PatientID groups the bootstrap.
    """
    patient_of = subgroups.get(PATIENT, {})
    patients = [patient_of.get(study, study) for study in matched.studies]
    measured = measure_studies(matched, patients, settings)
    measured["num_patients"] = len(set(patients))
    measured["subgroups"] = {
        name: {
            category: _in_brief(measure_studies(part(matched, rows), [patients[row] for row in rows], settings))
            for category, rows in split(matched.studies, categories, name).items()
        }
        for name, categories in subgroups.items()
        if name != PATIENT
    }
    return measured


def measure_studies(matched: Matched, patients: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Everything of one group of Studies."""
    truth, predicted = matched.truth, matched.predicted
    num_studies = len(truth)
    resamples = draw_resamples(patients, settings.num_resamples, settings.seed)
    points = np.array([settings.operating_points[name] for name in OUTPUTS])
    rows = np.arange(num_studies)
    one_row_per_patient = len(set(patients)) == num_studies

    def question(columns: slice) -> Question:
        width = len(OUTPUTS[columns])
        return Question(
            truth=truth[:, columns].ravel(),
            probability=predicted[:, columns].ravel(),
            operating_point=np.tile(points[columns], num_studies),
            study=np.repeat(rows, width),
        )

    def interval(scores: Array, studies: NDArray[np.int64]) -> list[float] | None:
        return share_interval(scores, studies, resamples, one_row_per_patient=one_row_per_patient)

    baselines = constant_baselines(truth)
    answered = np.where(np.isnan(predicted), baselines["base_rates"], predicted)
    losses = study_losses(truth, answered)
    each = [
        measure(question(slice(column, column + 1)), resamples, one_row_per_patient=one_row_per_patient)
        for column in range(len(OUTPUTS))
    ]
    return {
        "num_studies": num_studies,
        "weighted_log_loss": float(losses.mean()),
        "weighted_log_loss_ci": mean_interval(losses, rows, resamples),
        "baselines": {
            name: {
                "weighted_log_loss": weighted_log_loss(truth, np.tile(constants, (num_studies, 1))),
                "constants": dict(zip(OUTPUTS, constants.tolist(), strict=True)),
            }
            for name, constants in baselines.items()
        },
        "patient_overall": each[0],
        "levels": dict(zip(LEVELS, each[1:], strict=True)),
        "all_levels": measure(question(slice(1, None)), resamples, one_row_per_patient=False),
        **mean_level_auc(truth[:, 1:], predicted[:, 1:], resamples),
        **level_accuracy(truth[:, 1:], predicted[:, 1:], points[1:], interval),
        "any_called": any_called(truth[:, 0], predicted, points, interval),
        **localisation(truth, predicted, points[0], interval),
    }


def mean_level_auc(truth: NDArray[np.bool_], predicted: Array, resamples: NDArray[np.float32]) -> dict[str, Any]:
    """Mean AUC over the levels that have one, and over how many; truth and predicted `(N, 7)`."""
    rankings = []
    for labels, probability in zip(truth.T, predicted.T, strict=True):
        rows = np.flatnonzero(~np.isnan(probability))
        if 0 < labels[rows].sum() < len(rows):
            rankings.append((rows, Ranking.of(labels[rows], probability[rows])))

    def statistics(counts: Array) -> dict[str, Array]:
        areas = [roc_areas(*ranking.counted(counts[:, rows])) for rows, ranking in rankings]
        return {"auc": np.mean(areas, axis=0)}

    if not rankings:
        return {"mean_level_auc": None, "mean_level_auc_ci": None, "mean_level_auc_num": 0}
    return {
        "mean_level_auc": float(statistics(np.ones((1, len(truth))))["auc"][0]),
        "mean_level_auc_ci": percentile_interval(over_resamples(resamples, np.arange(len(truth)), statistics)["auc"]),
        "mean_level_auc_num": len(rankings),
    }


def level_accuracy(truth: NDArray[np.bool_], predicted: Array, points: Array, interval: Interval) -> dict[str, Any]:
    """Share of answered levels called rightly, and of Studies with all seven answered and called rightly."""
    answered = ~np.isnan(predicted)
    right = answered & ((predicted >= points) == truth)
    whole = np.all(right, axis=1).astype(np.float64)
    return {
        "level_accuracy": float(right.sum() / answered.sum()) if answered.any() else None,
        "all_levels_right": float(whole.mean()),
        "all_levels_right_ci": interval(whole, np.arange(len(whole))),
    }


def any_called(fractured: NDArray[np.bool_], predicted: Array, points: Array, interval: Interval) -> dict[str, Any]:
    """The patient as the node calls it: for its own probability or for that of any level.

    fractured: `(N,)`. predicted: `(N, 8)`.
    """
    answered = ~np.isnan(predicted[:, 0])
    called = (np.nan_to_num(predicted, nan=-1.0) >= points).any(axis=1)
    found: dict[str, Any] = {}
    for name, studies, right in (
        ("sensitivity", answered & fractured, called),
        ("specificity", answered & ~fractured, ~called),
    ):
        scores = np.asarray(right)[studies].astype(float)
        found[name] = float(scores.mean()) if len(scores) else None
        found[f"{name}_ci"] = interval(scores, np.flatnonzero(studies))
    return found


def localisation(
    truth: NDArray[np.bool_], predicted: Array, patient_point: float, interval: Interval
) -> dict[str, Any]:
    """Whether the most probable level of a fractured neck is a fractured one.

    localisation_accuracy: of all Studies with a fractured level and an answer for some level. level_agreement: of those
    among them that were also called fractured as a whole. Of levels that tie for the highest probability, the share
    that is fractured counts.
    """
    levels, labels = predicted[:, 1:], truth[:, 1:]
    fractured = labels.any(axis=1) & ~np.isnan(levels).all(axis=1)
    filled = np.where(np.isnan(levels), -1.0, levels)
    top = filled == filled.max(axis=1, keepdims=True)
    score = (top & labels).sum(axis=1) / top.sum(axis=1)
    found: dict[str, Any] = {}
    called = fractured & (predicted[:, 0] >= patient_point)
    for name, studies in (("localisation_accuracy", fractured), ("level_agreement", called)):
        num = int(studies.sum())
        found[name] = float(score[studies].mean()) if num else None
        found[f"{name}_ci"] = interval(score[studies], np.flatnonzero(studies))
        found[f"{name}_num"] = num
    return found


def part(matched: Matched, rows: Sequence[int]) -> Matched:
    """Some of the Studies."""
    rows = list(rows)
    return Matched(
        studies=tuple(matched.studies[row] for row in rows),
        truth=matched.truth[rows],
        predicted=matched.predicted[rows],
        only_in_predictions=(),
        only_in_truth=(),
    )


def _in_brief(measured: dict[str, Any]) -> dict[str, Any]:
    """A subgroup as metrics.json has it: what few Studies can tell, without the single levels' details."""
    brief = {name: measured[name] for name in ("num_studies", "weighted_log_loss", "weighted_log_loss_ci")}
    brief["base_rates_weighted_log_loss"] = measured["baselines"]["base_rates"]["weighted_log_loss"]
    for name in ("patient_overall", "all_levels"):
        brief[name] = {key: value for key, value in measured[name].items() if key != "reliability"}
    brief["levels"] = {
        level: {key: answers.get(key) for key in ("num", "num_positive", "auc", "auc_ci", "sensitivity", "specificity")}
        for level, answers in measured["levels"].items()
    }
    return brief
