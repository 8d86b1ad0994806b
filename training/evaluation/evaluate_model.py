"""The straight line of `evaluate --data`: run the model, write what it said as CSV files, measure those and the run."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from model.levels import LEVELS, OUTPUTS
from training.drawn_boxes import BOX_COLUMNS
from training.evaluation.bootstrap import draw_resamples, mean_interval, share_interval
from training.evaluation.evaluate import Inputs, evaluate
from training.evaluation.froc import read_boxes
from training.evaluation.loss import weighted_log_loss
from training.evaluation.metrics import Settings
from training.evaluation.run import Run, run_model
from training.evaluation.tables import (
    PATIENT,
    STUDY,
    UNDETERMINED,
    InputError,
    match,
    read_predictions,
    read_subgroups,
    read_truth,
)
from training.files import replacing_file
from training.rsna import SourceError, read_source

METRIC_TABLE = "predictions_metric.csv"


def evaluate_model(
    bundle: Path | None,
    data: Path,
    out: Path,
    settings: Settings,
    *,
    truth: Path | None = None,
    subgroups: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Runs the model over a folder as the challenge's, and evaluates what it says; returns what metrics.json holds.

    Beside what `evaluate` writes, `out` gets `studies/`, an answer a Study, and what `write_tables` writes.
    truth: only its Studies are run; None: all of the folder's train.csv.

    Raises:
        InputError: see `run_model` and `evaluate`; or the folder is not as it should be.
        BundleError: the bundle is missing, damaged or of another architecture.
    """
    try:
        source = read_source(data)
    except SourceError as error:
        raise InputError(str(error)) from error
    # All are read before the model runs: a fault in one must not show after hours.
    patient_of = read_subgroups(subgroups).get(PATIENT, {}) if subgroups else {}
    only = None if truth is None else read_truth(truth).studies
    boxes = source.folder / "train_bounding_boxes.csv"
    if boxes.exists():
        read_boxes(boxes, scored=False)
    run = run_model(bundle, source, out, only=only, device=device)
    write_tables(run, out)
    inputs = Inputs(
        predictions=out / "predictions.csv",
        truth=truth or source.folder / "train.csv",
        subgroups=subgroups,
        predicted_regions=out / "regions.csv" if boxes.exists() else None,
        true_boxes=boxes if boxes.exists() else None,
    )
    more = measure_run(run, settings, patient_of)
    if (out / METRIC_TABLE).exists():
        submitted = match(read_predictions(out / METRIC_TABLE), read_truth(inputs.truth))
        more["challenge"] = {"weighted_log_loss": weighted_log_loss(submitted.truth, submitted.predicted)}
    return evaluate(inputs, settings, out, more)


def write_tables(run: Run, out: Path) -> None:
    """Writes what the model said to a folder, as CSV files that `evaluate` and `submission` take.

    `predictions.csv`, `regions.csv`, and `predictions_metric.csv` if the bundle has numbers made for the challenge's
    metric, which are no probabilities.
    """
    answers = run.answers.items()
    rows: dict[str, list[Sequence[object]]] = {
        "predictions.csv": [
            (STUDY, *OUTPUTS, UNDETERMINED),
            *(_row(uid, each["probabilities"]) for uid, each in answers),
        ],
        "regions.csv": [
            (STUDY, *BOX_COLUMNS, "score"),
            *((uid, *region) for uid, each in answers for region in each["regions"]),
        ],
    }
    if all(each["challenge"] for _, each in answers):
        rows[METRIC_TABLE] = [(STUDY, *OUTPUTS, UNDETERMINED), *(_row(uid, each["challenge"]) for uid, each in answers)]
    with ExitStack() as stack:  # they change places together, once all are written
        for name, lines in rows.items():
            with stack.enter_context(replacing_file(out / name)).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(lines)


def _row(uid: str, values: Mapping[str, float | None]) -> list[str]:
    """A Study's line of a table of predictions."""
    cells = ["" if values[name] is None else f"{values[name]:.6f}" for name in OUTPUTS]
    return [uid, *cells, " ".join(name for name in OUTPUTS if values[name] is None)]


def measure_run(run: Run, settings: Settings, patient_of: Mapping[str, str]) -> dict[str, Any]:
    """The sections `run`, `masks` and `attention`; keys as in README.md. patient_of: by Study, where it is known."""
    answers = list(run.answers.values())
    seconds = np.array([answer["seconds"]["all"] for answer in answers])
    return {
        "run": {
            "model": run.model,
            "num_answered": len(answers),
            "num_failed": len(run.failures),
            "failures": run.failures,
            "devices": sorted({answer["device"] for answer in answers}),
            "latency_s": {
                "p50": float(np.percentile(seconds, 50)),
                "p95": float(np.percentile(seconds, 95)),
                "read_p50": float(np.median([answer["seconds"]["read"] for answer in answers])),
                "analyse_p50": float(np.median([answer["seconds"]["analyse"] for answer in answers])),
            },
            "num_slices_p50": float(np.median([answer["num_slices"] for answer in answers])),
            "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in answers),
        },
        "masks": _masks(run, settings, patient_of),
        "attention": _attention(run, settings, patient_of),
    }


def _masks(run: Run, settings: Settings, patient_of: Mapping[str, str]) -> dict[str, Any] | None:
    """Over the Studies with a mask; None if there is none."""
    with_mask = {uid: answer["masks"] for uid, answer in run.answers.items() if answer["masks"] is not None}
    with_dice = {uid: masks for uid, masks in with_mask.items() if masks.get("dice")}
    compared = list(with_dice.values())
    problems = {uid: masks["problem"] for uid, masks in with_mask.items() if "problem" in masks}
    if not compared:
        return {"num_studies": 0, "problems": problems} if problems else None
    mean_dice = [float(np.mean(list(masks["dice"].values()))) for masks in compared]
    patients = [patient_of.get(uid, uid) for uid in with_dice]

    def of(levels: Sequence[str]) -> dict[str, Any]:
        rows = [
            (masks, name, patient)
            for masks, patient in zip(compared, patients, strict=True)
            for name in levels
            if name in masks["dice"]
        ]
        return _of_levels(rows, settings)

    return {
        "num_studies": len(compared),
        "problems": problems,
        "mean_dice": float(np.mean(mean_dice)),
        "mean_dice_ci": _interval_of_mean(mean_dice, patients, settings),
        **of(LEVELS),
        "num_invented": sum(len(masks["invented"]) for masks in compared),
        "levels": {name: of([name]) for name in LEVELS},
    }


def _of_levels(rows: Sequence[tuple[Mapping[str, Any], str, str]], settings: Settings) -> dict[str, Any]:
    """Means over some levels of some Studies; distances over those that were drawn.

    rows: what was measured of a Study's masks, a level, and the patient.
    """
    num, patients = len(rows), [patient for _, _, patient in rows]
    dice, hd95_mm, surface_mm, identified = (
        np.array([masks[key][name] for masks, name, _ in rows], np.float64)  # None: nan
        for key in ("dice", "hd95_mm", "surface_distance_mm", "identified")
    )
    is_drawn = np.isfinite(hd95_mm)
    resamples = draw_resamples(patients, settings.num_resamples, settings.seed)
    return {
        "num_levels": num,
        "num_not_drawn": num - int(is_drawn.sum()),
        "dice": float(dice.mean()) if num else None,
        "hd95_mm_median": float(np.median(hd95_mm[is_drawn])) if is_drawn.any() else None,
        "surface_distance_mm": float(surface_mm[is_drawn].mean()) if is_drawn.any() else None,
        "identification_rate": float(identified.mean()) if num else None,
        "identification_rate_ci": share_interval(
            identified, np.arange(num), resamples, one_row_per_patient=len(set(patients)) == num
        ),
    }


def _attention(run: Run, settings: Settings, patient_of: Mapping[str, str]) -> dict[str, Any] | None:
    """Mean share of a fractured level's attention on slices with a fracture, beside even attention; None of none."""
    shares = [pair for answer in run.answers.values() for pair in answer["alignment"].values()]
    patients = [patient_of.get(uid, uid) for uid, answer in run.answers.items() for _ in answer["alignment"]]
    if not shares:
        return None
    alignment, even = (list(side) for side in zip(*shares, strict=True))
    return {
        "num_levels": len(shares),
        "alignment": float(np.mean(alignment)),
        "alignment_ci": _interval_of_mean(alignment, patients, settings),
        "even": float(np.mean(even)),
    }


def _interval_of_mean(values: Sequence[float], patients: Sequence[str], settings: Settings) -> list[float] | None:
    resamples = draw_resamples(patients, settings.num_resamples, settings.seed)
    return mean_interval(np.array(values), np.arange(len(values)), resamples)
