"""Probabilities that mean what they say: from the logits of held-out folds, which nothing else was fitted to.

Three things are fitted, and kept apart: Platt's scale and offset for each output (the probabilities that are shown),
the operating points (from where on "fractured" is said), and the numbers that do best in the challenge's score, which
are no probabilities. They are measured crosswise: fitted on one half of the patients, measured on the other.
"""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.calibrate import Challenge, Platt
from model.levels import LEVELS, OUTPUTS
from training.calibration import fit_platt
from training.evaluation import weighted_log_loss
from training.evaluation.loss import best_constants
from training.files import replacing_file, write_json
from training.phantom_measures import choose_operating_point
from training.rsna import Cache
from training.steps.regions import read_opinions
from training.steps.run import StepError, fingerprint, fold_folder, folds_of, mean, read_options, rounded
from training.steps.study import challenge_weights

MIN_OF_EACH = 5
"""An output with fewer fractured or intact ones is calibrated with all levels together."""


REGION_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Of the second opinion, to choose from; the first of equals."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What networks said of studies they had not seen, in the order of OUTPUTS.

    logits: of the study network, `(N, 8)`, NaN where not judged. opinions: of the region network, `(N, 7)`.
    truths: `(N, 8)`.
    """

    study_instance_uids: list[str]
    logits: NDArray[np.float64]
    opinions: NDArray[np.float64]
    truths: NDArray[np.bool_]
    folds: list[int]

    def part(self, chosen: NDArray[np.bool_]) -> "HeldOut":
        """Some of the studies."""
        uids = [uid for uid, is_in in zip(self.study_instance_uids, chosen, strict=True) if is_in]
        return HeldOut(
            study_instance_uids=uids,
            logits=self.logits[chosen],
            opinions=self.opinions[chosen],
            truths=self.truths[chosen],
            folds=self.folds,
        )

    def weighed(self, region_weight: float) -> NDArray[np.float64]:
        """Logits `(N, 8)` as the pipeline has them: in each level's, the second opinion with this weight."""
        logits = self.logits.copy()
        logits[:, 1:] += region_weight * (self.opinions - logits[:, 1:])
        return logits


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Calibration by output, operating points as calibrated probabilities, and the challenge's own numbers.

    region_weight: of the second opinion, with which all of them are fitted.
    """

    region_weight: float
    platt: dict[str, Platt]
    patient_operating_point: float
    level_operating_point: float
    challenge: Challenge


def calibrate(
    cache_folder: Path, work: Path, *, level_specificity: float, patient_specificity: float
) -> dict[str, Any]:
    """Fits on all finished folds' held-out studies; writes `calibration.json` and crosswise predictions."""
    made_from = answers_fingerprints(cache_folder, work)
    held_out = read_held_out(work)
    cache = Cache.open(cache_folder)
    first = halve([cache.study(uid).patient for uid in held_out.study_instance_uids], held_out.truths[:, 0])
    specificity = (level_specificity, patient_specificity)

    # Crosswise, to measure.
    calibrated = np.full(held_out.logits.shape, np.nan)
    challenge = np.empty(held_out.logits.shape)
    present = np.zeros(held_out.logits.shape, bool)
    constant, rate = np.empty(held_out.logits.shape), np.empty(held_out.logits.shape)
    for half in (first, ~first):
        fitted = fit_all(held_out.part(~half), *specificity)
        logits = held_out.weighed(fitted.region_weight)[half]
        calibrated[half] = reported(calibrated_probabilities(fitted.platt, logits))
        points = np.array([fitted.patient_operating_point, *[fitted.level_operating_point] * len(LEVELS)])
        present[half] = calibrated[half] >= points
        present[half, 0] |= present[half, 1:].any(axis=1)
        challenge[half] = challenge_probabilities(fitted.challenge, logits)
        constant[half], rate[half] = constants(held_out.truths[~half]), base_rates(held_out.truths[~half])
    write_predictions(work / "calibrate" / "predictions.csv", held_out.study_instance_uids, calibrated)
    write_predictions(work / "calibrate" / "predictions_challenge.csv", held_out.study_instance_uids, challenge)
    result = {
        "num_studies": len(first),
        "folds": held_out.folds,
        "raw": measure(held_out, 1 / (1 + np.exp(-held_out.logits))),
        "calibrated": measure(held_out, calibrated),
        "at_operating_points": sensitivity_and_specificity(held_out, present),
        "weighted_log_loss": rounded(weighted_log_loss(held_out.truths, challenge)),
        "constants": {
            "weighted_log_loss": rounded(weighted_log_loss(held_out.truths, constant)),
            **measure(held_out, rate),
        },
    }

    # On all, to use.
    fitted = fit_all(held_out, *specificity)
    result["region_weight"] = fitted.region_weight
    write_json(work / "calibrate" / "calibration.json", {**asdict(fitted), "made_from": made_from})
    write_json(work / "calibrate" / "result.json", result)
    return result


def answers_fingerprints(cache: Path, work: Path) -> dict[str, str]:
    """Of what calibration is fitted to: each finished fold's `study` and `regions`.

    Raises:
        StepError, CacheError: one of them, or what it was made from, is not finished or has changed since; or they read
            different cuts.
    """
    require_one_cut(work)
    return {
        f"{step} fold{fold}": fingerprint(cache, work, fold, step)
        for fold in folds_of(work, "study")
        for step in ("study", "regions")
    }


def require_one_cut(work: Path) -> None:
    """Refuses networks that learned from stacks of different cuts: in a bundle all are asked about the same.

    Raises:
        StepError: they did.
    """
    steps = [(step, fold) for fold in folds_of(work, "study") for step in ("regions", "classify")]
    cuts = {f"{step} fold{fold}": read_options(work, step, fold)["cut"] for step, fold in steps}
    if len(set(cuts.values())) > 1:
        listed = ", ".join(f"{name} {cut!r}" for name, cut in cuts.items())
        raise StepError(
            f"The networks of {work} learned from different cuts: {listed}. In a bundle all are asked about the same "
            "stacks. Train them on one, with --fresh or in another --work."
        )


def read_held_out(work: Path) -> HeldOut:
    """The held-out answers of all folds for which `study` is finished."""
    folds = folds_of(work, "study")
    uids: list[str] = []
    logits, truths, opinions = [], [], []
    for fold in folds:
        with np.load(fold_folder(work, "study", fold) / "held_out.npz") as arrays:
            uids += arrays["study_instance_uids"].tolist()
            opinions.append(read_opinions(work, fold, arrays["study_instance_uids"].tolist()))
            logits.append(arrays["logits"])
            truths.append(arrays["truths"])
    return HeldOut(
        study_instance_uids=uids,
        logits=np.concatenate(logits),
        opinions=np.concatenate(opinions),
        truths=np.concatenate(truths),
        folds=folds,
    )


def halve(patients: list[str], fractured: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which studies are in the first of two halves that share no patient and have equally many fractured ones."""
    broken = {patient for patient, is_fractured in zip(patients, fractured, strict=True) if is_fractured}
    ordered = sorted(set(patients), key=lambda patient: (patient in broken, patient))
    first = set(ordered[::2])
    return np.array([patient in first for patient in patients])


def fit_all(held_out: HeldOut, level_specificity: float, patient_specificity: float) -> Fitted:
    """Everything, from these studies."""
    truth = held_out.truths
    judged = ~np.isnan(held_out.logits)
    pooled = judged[:, 1:]
    for name, kinds in (("studies", truth[:, 0]), ("levels", truth[:, 1:][pooled])):
        if kinds.all() or not kinds.any():
            raise StepError(
                f"{kinds.sum()} of {len(kinds)} held-out {name} are fractured; both kinds are needed to calibrate. "
                "Finish more folds, or prepare more studies."
            )
    region_weight = min(REGION_WEIGHTS, key=lambda weight: levels_loss(held_out.weighed(weight)[:, 1:], truth[:, 1:]))
    logits = held_out.weighed(region_weight)
    platt = by_output(logits, truth, np.ones(truth.shape))
    probability = reported(calibrated_probabilities(platt, logits))
    patient_point, level_point = operating_points(
        np.log(probability / (1 - probability)), truth, level_specificity, patient_specificity
    )
    return Fitted(
        region_weight=region_weight,
        platt=platt,
        patient_operating_point=patient_point,
        level_operating_point=level_point,
        challenge=Challenge(
            platt=by_output(logits, truth, challenge_weights(truth)),
            undetermined=dict(zip(OUTPUTS, constants(truth).tolist(), strict=True)),
        ),
    )


def operating_points(
    logits: NDArray[np.float64], truth: NDArray[np.bool_], level_specificity: float, patient_specificity: float
) -> tuple[float, float]:
    """The probabilities from which a patient and a level are called: as sensitive as both specificities allow.

    A level that is called makes the patient called. So the level's point is as high as the patient's specificity needs
    it, and the patient's own probability has what levels leave of it.

    logits: calibrated, as reported, `(N, 8)`, NaN where not judged.
    """
    judged = ~np.isnan(logits[:, 1:])
    highest = np.nanmax(logits[:, 1:], axis=1)
    level_point = max(
        choose_operating_point(logits[:, 1:][judged], truth[:, 1:][judged], level_specificity),
        choose_operating_point(highest, truth[:, 0], patient_specificity),
    )
    called_anyway = highest >= np.log(level_point / (1 - level_point))
    patient = np.where(called_anyway, np.inf, logits[:, 0])
    return choose_operating_point(patient, truth[:, 0], patient_specificity), level_point


def levels_loss(logits: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Cross-entropy of all judged levels, calibrated together."""
    judged = ~np.isnan(logits)
    platt = fit_platt(logits[judged], truth[judged])
    calibrated = platt.scale * logits[judged] + platt.offset
    return float(np.mean(np.logaddexp(0, calibrated) - truth[judged] * calibrated))


def by_output(logits: NDArray[np.float64], truth: NDArray[np.bool_], weights: NDArray[np.float64]) -> dict[str, Platt]:
    """Scale and offset of each output; those of all levels together for a level with too few of a kind."""
    judged = ~np.isnan(logits)
    platt = {}
    for column, output in enumerate(OUTPUTS):
        chosen = np.zeros(truth.shape, bool)
        chosen[:, column] = judged[:, column]
        num_fractured, num_judged = truth[chosen].sum(), chosen.sum()
        if column > 0 and min(num_fractured, num_judged - num_fractured) < MIN_OF_EACH:
            chosen[:, 1:] = judged[:, 1:]
        platt[output] = fit_platt(logits[chosen], truth[chosen], weights[chosen])
    return platt


def constants(truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The best answers in the challenge that look at no image, `(8,)`, short of certainty."""
    return np.clip(best_constants(truth), 1e-3, 1 - 1e-3)


def base_rates(truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The best probabilities that look at no image, `(8,)`, short of certainty."""
    return np.asarray(np.clip(truth.mean(axis=0), 1e-3, 1 - 1e-3))


def calibrated_probabilities(platt: dict[str, Platt], logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities `(N, 8)`, NaN where not judged."""
    scale = np.array([platt[output].scale for output in OUTPUTS])
    offset = np.array([platt[output].offset for output in OUTPUTS])
    return np.asarray(np.clip(1 / (1 + np.exp(-(scale * logits + offset))), 1e-6, 1 - 1e-6))


def reported(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """As the pipeline reports them: the patient is at least as probably fractured as any level."""
    return np.concatenate([np.nanmax(probability, axis=1, keepdims=True), probability[:, 1:]], axis=1)


def challenge_probabilities(challenge: Challenge, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """The numbers `(N, 8)` to submit, also for what was not judged."""
    instead = np.array([challenge.undetermined[output] for output in OUTPUTS])
    return np.where(np.isnan(logits), instead, calibrated_probabilities(challenge.platt, logits))


def measure(held_out: HeldOut, probability: NDArray[np.float64]) -> dict[str, Any]:
    """Cross-entropy and Brier score of the patient and of all judged levels together."""
    measures = {}
    for name, columns in (("patient", slice(0, 1)), ("levels", slice(1, None))):
        judged = ~np.isnan(held_out.logits[:, columns])
        p = np.clip(probability[:, columns][judged], 1e-6, 1 - 1e-6)
        y = held_out.truths[:, columns][judged]
        measures[name] = {
            "cross_entropy": rounded(-np.mean(np.where(y, np.log(p), np.log(1 - p)))),
            "brier": rounded(np.mean((p - y) ** 2)),
        }
    return measures


def sensitivity_and_specificity(held_out: HeldOut, present: NDArray[np.bool_]) -> dict[str, Any]:
    """Of the patient and of all judged levels together."""
    measures = {}
    for name, columns in (("patient", slice(0, 1)), ("levels", slice(1, None))):
        judged = ~np.isnan(held_out.logits[:, columns])
        said, truth = present[:, columns][judged], held_out.truths[:, columns][judged]
        measures[name] = {
            "sensitivity": rounded(mean(said[truth])),
            "specificity": rounded(mean(~said[~truth])),
        }
    return measures


def write_predictions(path: Path, study_instance_uids: list[str], probability: NDArray[np.float64]) -> None:
    """A CSV as `cspine-train evaluate` reads it; what was not judged is empty, and named."""
    with replacing_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["StudyInstanceUID", *OUTPUTS, "undetermined"])
        for uid, row in zip(study_instance_uids, probability, strict=True):
            missing = " ".join(name for name, value in zip(OUTPUTS, row, strict=True) if np.isnan(value))
            writer.writerow([uid, *("" if np.isnan(value) else f"{value:.6f}" for value in row), missing])
