"""Measures a model on phantoms it has never seen: the networks on cached stacks, the whole pipeline on whole necks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.classify import network_input
from model.findings import Finding
from model.levels import LEVELS
from model.networks import FractureNet
from model.phantom import Anatomy, default_grid, render
from model.pipeline import Pipeline
from training.samples import phantom_volume, random_fractures
from training.vertebra_stacks import collate, read_stack

MIN_SPECIFICITY = 0.95
"""Of a single vertebra. A neck has seven, and each false alarm is one too many."""


@torch.inference_mode()
def stack_logits(network: FractureNet, paths: list[Path]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Logit and truth of every vertebra of cached patients."""
    logits, truths = [], []
    for path in paths:
        batch = collate([read_stack(path, index) for index in range(len(LEVELS))])
        logits.append(network(network_input(batch.planes_hu, batch.masks))[0].double().numpy())
        truths.append(batch.fractured.numpy() > 0.5)
    return np.concatenate(logits), np.concatenate(truths)


def auc(scores: NDArray[np.float64], truths: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a fractured vertebra scores above an intact one, ties half."""
    above = scores[truths][:, None] - scores[~truths][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def choose_operating_point(
    logits: NDArray[np.float64], truths: NDArray[np.bool_], min_specificity: float = MIN_SPECIFICITY
) -> float:
    """The probability with the greatest sensitivity at a specificity of at least this; in the middle of several.

    Where none of 0.7 to 99.3 % is specific enough, the greatest.
    """
    candidates = np.linspace(-5, 5, 201)
    calls = logits[None] >= candidates[:, None]
    sensitivity, specificity = calls[:, truths].mean(axis=1), (~calls[:, ~truths]).mean(axis=1)
    benefit = np.where(specificity >= min_specificity, sensitivity, -1.0)
    best = candidates[benefit == benefit.max()] if benefit.max() >= 0 else candidates[-1:]
    return float(1 / (1 + np.exp(-np.median(best))))


def evaluate(pipeline: Pipeline, seeds: range) -> Iterator[dict[str, Any]]:
    """What the whole pipeline says of the phantom of each seed, beside the truth.

    Each has `dice` (7 numbers), `numbered` (7 bools: more than half of the level carries its own number),
    `fractured` and `present` (7 bools), `probability` (7 numbers or None), `patient`.
    """
    for seed in seeds:
        rng = np.random.default_rng([seed, 23])
        anatomy = Anatomy.random(seed, random_fractures(rng))
        in_plane = rng.uniform(0.45, 0.8)
        grid = default_grid(anatomy, (float(rng.choice([0.8, 1.0, 1.25, 1.5])), in_plane, in_plane))
        phantom = render(anatomy, grid, noise_hu=rng.uniform(8, 25), blur_mm=rng.uniform(0.4, 0.9), seed=seed)
        analysis = pipeline.analyse(phantom_volume(phantom, str(seed)))
        found = analysis.findings.levels
        dice, numbered = [], []
        for label in range(1, len(LEVELS) + 1):
            truth, drawn = phantom.vertebrae == label, analysis.vertebrae == label
            both = int((truth & drawn).sum())
            dice.append(2 * both / int(truth.sum() + drawn.sum()))
            numbered.append(both > 0.5 * int(truth.sum()))
        yield {
            "seed": seed,
            "dice": dice,
            "numbered": numbered,
            "fractures": [(fracture.level, fracture.kind, fracture.width_mm) for fracture in anatomy.fractures],
            "fractured": [name in {fracture.level for fracture in anatomy.fractures} for name in LEVELS],
            "present": [found[name].finding is Finding.PRESENT for name in LEVELS],
            "probability": [found[name].probability for name in LEVELS],
            "patient": analysis.findings.patient_overall.probability,
        }


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The cases of `evaluate` in a dozen numbers, as they go into the bundle."""
    dice = np.array([case["dice"] for case in cases])
    fractured = np.array([case["fractured"] for case in cases])
    present = np.array([case["present"] for case in cases])
    probability = np.array([[np.nan if p is None else p for p in case["probability"]] for case in cases])
    judged = ~np.isnan(probability)
    summary: dict[str, Any] = {
        "num_phantoms": len(cases),
        "mean_dice": round(float(dice.mean()), 4),
        "dice": {name: round(float(value), 4) for name, value in zip(LEVELS, dice.mean(axis=0), strict=True)},
        "levels_numbered_rightly": round(float(np.mean([case["numbered"] for case in cases])), 4),
        "levels_judged": round(float(judged.mean()), 4),
        "num_fractured": int(fractured.sum()),
    }
    if (fractured & judged).any() and (~fractured & judged).any():
        summary |= {
            "vertebra_auc": round(auc(probability[judged], fractured[judged]), 4),
            "vertebra_sensitivity": round(float(present[fractured].mean()), 4),
            "vertebra_specificity": round(float((~present[~fractured]).mean()), 4),
        }
    return summary
