"""Everything measured of one yes-or-no question: is this level, is this patient fractured?

Ranking, calls at an operating point fixed beforehand, calibration; each with its interval. What cannot be computed is
None, with the reason, never NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.bootstrap import over_resamples, percentile_interval, wilson_interval
from training.evaluation.loss import log_losses
from training.evaluation.ranking import Ranking, average_precisions, roc_areas

Array = NDArray[np.float64]

PREVALENCES = (0.05, 0.10)
"""Of fractures in an emergency department's neck CT, unlike in the challenge's data, where half are fractured."""

MIN_OF_A_CLASS = 4
"""Of fewer fractured, or intact, ones an AUC has no interval: one resample in twenty lacks them."""

NUM_BINS = 10
"""Of equal width, for the expected calibration error and the reliability plot."""

SHARES = {
    "accuracy": ("true_positives true_negatives", "false_positives false_negatives"),
    "precision": ("true_positives", "false_positives"),
    "recall": ("true_positives", "false_negatives"),
    "sensitivity": ("true_positives", "false_negatives"),
    "specificity": ("true_negatives", "false_positives"),
    "npv": ("true_negatives", "false_negatives"),
}
"""Shares of calls: what counts for and what against."""

_COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")

_MEASURES = (
    "auc",
    "pr_auc",
    *SHARES,
    "f1",
    *(f"{kind}_at_{round(100 * prevalence)}_percent" for prevalence in PREVALENCES for kind in ("ppv", "npv")),
    "brier",
    "log_loss",
    "mean_probability",
    "prevalence",
)
"""What has a value and an interval."""

_REASONS = {
    "auc": "needs fractured and intact ones",
    "pr_auc": "needs fractured ones",
    "precision": "nothing was called fractured",
    "npv": "nothing was called intact",
    "recall": "needs fractured ones",
    "sensitivity": "needs fractured ones",
    "f1": "nothing is or was called fractured",
    "specificity": "needs intact ones",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Answers to one question, one row each; rows without an answer are counted and left out.

    truth: bool `(M,)`. probability: `(M,)`, NaN where undetermined. operating_point: `(M,)`, the probability from which
    a row is called fractured. study: `(M,)`, the Study each row is of, an index into the resamples.
    """

    truth: NDArray[np.bool_]
    probability: Array
    operating_point: Array
    study: NDArray[np.int64]

    @property
    def answered(self) -> "Question":
        """The rows with an answer."""
        keep = ~np.isnan(self.probability)
        return Question(
            truth=self.truth[keep],
            probability=self.probability[keep],
            operating_point=self.operating_point[keep],
            study=self.study[keep],
        )


def measure(question: Question, resamples: NDArray[np.float32], *, one_row_per_patient: bool) -> dict[str, Any]:
    """All measures as plain values, keys as in README.md; `reasons` says why a value is None.

    one_row_per_patient: each row is of another patient; then shares have Wilson's interval. Rows of one patient are not
    independent, so of several the bootstrap says how sure a share is.
    """
    rows = question.answered
    undetermined = np.isnan(question.probability)
    measured: dict[str, Any] = {
        "num": len(rows.truth),
        "num_positive": int(rows.truth.sum()),
        "num_negative": int((~rows.truth).sum()),
        "num_undetermined_positive": int((undetermined & question.truth).sum()),
        "num_undetermined_negative": int((undetermined & ~question.truth).sum()),
        "operating_point": _one_value(question.operating_point),
    }
    if len(rows.truth) == 0:
        nothing = dict.fromkeys((*_MEASURES, *(f"{name}_ci" for name in _MEASURES), "ece"))
        reasons = {"all": "there is no answer to measure"}
        return measured | dict.fromkeys(_COUNTS, 0) | nothing | {"reliability": [], "reasons": reasons}
    once = {name: float(values[0]) for name, values in _statistics(rows)(np.ones((1, len(rows.truth)))).items()}
    resampled = over_resamples(resamples, rows.study, _statistics(rows))
    scarce = {"auc": min(measured["num_positive"], measured["num_negative"]), "pr_auc": measured["num_positive"]}
    reasons = {}
    measured |= {name: int(once[name]) for name in _COUNTS}
    for name in _MEASURES:
        value = once[name]
        measured[name] = value if np.isfinite(value) else None
        if name in SHARES and one_row_per_patient:
            interval = wilson_interval(*_for_and_all(name, once))
        elif scarce.get(name, MIN_OF_A_CLASS) < MIN_OF_A_CLASS:
            interval = None
        else:
            interval = percentile_interval(resampled[name])
        measured[f"{name}_ci"] = interval if np.isfinite(value) else None
        if not np.isfinite(value):
            reasons[name] = _reason(name, once)
        elif interval is None:
            reasons[f"{name}_ci"] = (
                f"too few: under {MIN_OF_A_CLASS} of a class, or bootstrap resamples of which more than 5 % have no "
                "value, or all the same"
            )
    return measured | {"ece": expected_calibration_error(rows), "reliability": reliability(rows), "reasons": reasons}


def _reason(name: str, values: dict[str, float]) -> str:
    """Why a measure has no value."""
    if name in _REASONS:
        return _REASONS[name]
    if not np.isfinite([values["sensitivity"], values["specificity"]]).all():
        return "its sensitivity or specificity cannot be computed"
    return _REASONS["precision" if name.startswith("ppv") else "npv"]


def _statistics(rows: Question) -> Callable[[Array], dict[str, Array]]:
    """What is computed of each resample; see `over_resamples`."""
    ranking = Ranking.of(rows.truth, rows.probability)
    called = rows.probability >= rows.operating_point
    truth = rows.truth
    # Columns: the four counts, squared error, log loss, probability, positives, all. One product with the counts.
    columns = np.column_stack(
        [
            called & truth,
            called & ~truth,
            ~called & ~truth,
            ~called & truth,
            (rows.probability - truth) ** 2,
            log_losses(truth, rows.probability),
            rows.probability,
            truth,
            np.ones(len(truth)),
        ]
    ).astype(float)

    def statistics(counts: Array) -> dict[str, Array]:
        sums = (counts @ columns).T
        values: dict[str, Array] = dict(zip(_COUNTS, sums[:4], strict=True))
        positives, negatives = ranking.counted(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            values |= {"auc": roc_areas(positives, negatives), "pr_auc": average_precisions(positives, negatives)}
            for name in SHARES:
                successes, trials = _for_and_all(name, values)
                values[name] = successes / trials
            tp, fp, _, fn = sums[:4]
            values["f1"] = 2 * tp / (2 * tp + fp + fn)
            values |= _predictive_values(values["sensitivity"], values["specificity"])
            names = ("brier", "log_loss", "mean_probability", "prevalence")
            values |= {name: total / sums[8] for name, total in zip(names, sums[4:8], strict=True)}
        return values

    return statistics


def _for_and_all(name: str, counts: dict[str, Any]) -> tuple[Any, Any]:
    """Successes and trials of a share."""
    successes, failures = (sum(counts[count] for count in side.split()) for side in SHARES[name])
    return successes, successes + failures


def _predictive_values(sensitivity: Array, specificity: Array) -> dict[str, Array]:
    """PPV and NPV where a share of patients is fractured, by Bayes' rule."""
    values = {}
    for prevalence in PREVALENCES:
        found, missed = prevalence * sensitivity, prevalence * (1 - sensitivity)
        passed, alarmed = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
        percent = round(100 * prevalence)
        values[f"ppv_at_{percent}_percent"] = found / (found + alarmed)
        values[f"npv_at_{percent}_percent"] = passed / (passed + missed)
    return values


def reliability(rows: Question) -> list[dict[str, Any]]:
    """Bins of equal width over 0..1 that are not empty: mean probability, share of positives and its interval."""
    bins = np.minimum((rows.probability * NUM_BINS).astype(int), NUM_BINS - 1)
    found = []
    for index in np.unique(bins):
        inside = bins == index
        num, positives = int(inside.sum()), int(rows.truth[inside].sum())
        found.append(
            {
                "lower": index / NUM_BINS,
                "upper": (index + 1) / NUM_BINS,
                "num": num,
                "mean_probability": float(rows.probability[inside].mean()),
                "share_positive": positives / num,
                "share_positive_ci": wilson_interval(positives, num),
            }
        )
    return found


def expected_calibration_error(rows: Question) -> float:
    """Mean distance between probability and share of positives over the bins, by their size (Naeini et al. 2015)."""
    distances = [part["num"] * abs(part["mean_probability"] - part["share_positive"]) for part in reliability(rows)]
    return float(sum(distances) / len(rows.truth))


def _one_value(operating_points: Array) -> float | None:
    """None when levels have different ones."""
    first = float(operating_points[0])
    return first if (operating_points == first).all() else None
