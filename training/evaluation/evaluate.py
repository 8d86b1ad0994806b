"""The straight line of `cspine-train evaluate`: read the files, measure, write metrics.json and report.html."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model import read_bundle
from model.levels import OUTPUTS
from training.evaluation.bootstrap import draw_resamples
from training.evaluation.froc import MIN_IOU, Boxes, Events, compare, measure_froc, read_boxes
from training.evaluation.metrics import Settings, measure_all
from training.evaluation.report import Report, write_report
from training.evaluation.tables import (
    OVERALL,
    PATIENT,
    InputError,
    Matched,
    match,
    read_predictions,
    read_subgroups,
    read_truth,
)
from training.files import replacing_file


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files to evaluate. predicted_regions and true_boxes come together or not at all."""

    predictions: Path
    truth: Path
    subgroups: Path | None = None
    predicted_regions: Path | None = None
    true_boxes: Path | None = None


def operating_points(given: Iterable[str], default: Mapping[str, float]) -> dict[str, float]:
    """The operating point of each output.

    given: "0.3" for all, "C2=0.3" for one; what is given later, and for one, wins.

    Raises:
        InputError: no such output, or no probability.
    """
    points = {name: default[name] for name in OUTPUTS}
    for text in sorted(given, key=lambda text: "=" in text):
        name, sign, value = text.rpartition("=")
        try:
            point = float(value)
        except ValueError:
            point = -1.0
        if (sign and name not in OUTPUTS) or not 0 <= point <= 1:
            raise InputError(
                f"Operating point {text!r} is not understood. Give a probability for all (0.4), or for one output of "
                f"{', '.join(OUTPUTS)} (C2=0.4)."
            )
        points |= dict.fromkeys(OUTPUTS if not sign else (name,), point)
    return points


def points_of(bundle: Path | None) -> dict[str, float]:
    """Each output's operating point of a model; None: of the one that comes with the package.

    Raises:
        BundleError: the bundle is missing or damaged.
    """
    info = read_bundle(bundle).info
    return {OVERALL: info.operating_point, **info.level_operating_points}


def evaluate(inputs: Inputs, settings: Settings, out: Path, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes `metrics.json` and `report.html` to the folder `out`, and returns what the former holds.

    more: further sections of metrics.json, such as `run` and `masks` of a model that was run.

    Raises:
        InputError: a file cannot be used; nothing is written then.
    """
    matched = match(read_predictions(inputs.predictions), read_truth(inputs.truth))
    subgroups = read_subgroups(inputs.subgroups) if inputs.subgroups else {}
    metrics: dict[str, Any] = {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": {
            name: {"file": path.name, "sha256": _sha256(path)}
            for name, path in vars(inputs).items()
            if path is not None
        },
        "settings": {
            "operating_points": dict(settings.operating_points),
            "num_resamples": settings.num_resamples,
            "seed": settings.seed,
        },
        **measure_all(matched, settings, subgroups),
        "num_only_in_predictions": len(matched.only_in_predictions),
        "num_only_in_truth": len(matched.only_in_truth),
        "only_in_predictions": list(matched.only_in_predictions),
        "only_in_truth": list(matched.only_in_truth),
        "warnings": _warnings(matched, subgroups),
    }
    curves: dict[str, Events] = {}
    if inputs.predicted_regions and inputs.true_boxes:
        predicted = read_boxes(inputs.predicted_regions, scored=True)
        true = read_boxes(inputs.true_boxes, scored=False)
        metrics["froc"], curves = measure_regions(matched, predicted, true, settings, subgroups.get(PATIENT, {}))
    metrics |= more or {}
    report = write_report(Report(metrics=metrics, matched=matched, froc=curves))
    with replacing_file(out / "metrics.json") as json_path, replacing_file(out / "report.html") as html_path:
        # NaN is no JSON: whatever cannot be computed is null.
        json_path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        html_path.write_text(report, encoding="utf-8")
    return metrics


def measure_regions(
    matched: Matched, predicted: Boxes, true: Boxes, settings: Settings, patient_of: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Events]]:
    """FROC of the Studies whose fractures are known: those with boxes, and those without a fracture.

    patient_of: by Study, where it is known; the bootstrap draws patients.
    """
    fractured = {study: truth.any() for study, truth in zip(matched.studies, matched.truth, strict=True)}
    studies = [study for study in matched.studies if study in true or not fractured[study]]
    patients = [patient_of.get(study, study) for study in studies]
    resamples = draw_resamples(patients, settings.num_resamples, settings.seed)
    curves = {
        "boxes": compare(studies, predicted, true, as_chains=False),
        "fractures": compare(studies, predicted, true, as_chains=True),
    }
    return {
        "min_iou": MIN_IOU,
        "num_studies": len(studies),
        "num_with_boxes": sum(study in true for study in studies),
        "num_fractured_without_boxes": len(matched.studies) - len(studies),
        "boxes_of_other_studies": sorted(true.keys() - fractured.keys()),
        "regions_of_other_studies": sorted(predicted.keys() - fractured.keys()),
        **measure_froc(curves["boxes"], resamples),
        "fractures": measure_froc(curves["fractures"], resamples),
    }, curves


def _warnings(matched: Matched, subgroups: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Sentences on what is odd about the input and does not keep it from being measured."""
    sentences = []
    contradicting = matched.truth[:, 0] != matched.truth[:, 1:].any(axis=1)
    if contradicting.any():
        sentences.append(
            f"In {int(contradicting.sum())} Studies of the truth patient_overall is not the OR of C1..C7, the first is "
            f"{matched.studies[int(contradicting.argmax())]}."
        )
    for column, values in subgroups.items():
        num_missing = sum(study not in values for study in matched.studies)
        if num_missing:
            so = "each counts as a patient of its own" if column == PATIENT else "they are 'not stated'"
            sentences.append(f"Subgroup column {column} says nothing of {num_missing} Studies: {so}.")
    return sentences


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
