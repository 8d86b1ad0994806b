"""Calibration: what is fitted is what was put in, and the challenge's numbers lower its loss."""

import numpy as np
import pytest

from model.levels import OUTPUTS
from training.calibration import fit_platt
from training.evaluation.loss import weighted_log_loss
from training.steps.calibrate import HeldOut, calibrated_probabilities, fit_all, reported


def draw(num: int, scale: float, offset: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and truths that are as probable as those logits scaled and shifted say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 3, num)
    return logits, rng.random(num) < 1 / (1 + np.exp(-(scale * logits + offset)))


def test_scale_and_offset_are_found() -> None:
    logits, truths = draw(50_000, scale=0.4, offset=-1.5)

    platt = fit_platt(logits, truths)

    assert platt.scale == pytest.approx(0.4, abs=0.02)
    assert platt.offset == pytest.approx(-1.5, abs=0.05)


def test_few_studies_that_are_told_apart_make_no_certainty() -> None:
    logits = np.array([-3.0, -2, -1, 1, 2, 3])

    platt = fit_platt(logits, logits > 0)

    assert 0.7 < platt.probability(3) < 0.9
    assert 0.1 < platt.probability(-3) < 0.3


def test_what_is_more_suspicious_stays_so_even_where_the_truth_runs_against_it() -> None:
    logits = np.linspace(-3, 3, 20)

    assert fit_platt(logits, logits < 0).scale > 0


def test_one_kind_alone_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="0 fractured and 5 intact"):
        fit_platt(np.zeros(5), np.zeros(5, bool))


def test_challenge_numbers_have_a_lower_challenge_loss_than_probabilities() -> None:
    num = 4000
    columns = [draw(num, scale=0.7, offset=-0.5, seed=seed) for seed in range(8)]
    logits, truths = (np.stack(parts, axis=1) for parts in zip(*columns, strict=True))
    truths[:, 0] = truths[:, 1:].any(axis=1)
    logits[:, 0] = logits[:, 1:].max(axis=1)
    logits[::10, 7] = np.nan

    held_out = HeldOut(
        study_instance_uids=[str(i) for i in range(num)],
        logits=logits,
        opinions=logits[:, 1:],
        truths=truths,
        folds=[0],
    )
    challenge = fit_all(held_out, level_specificity=0.95, patient_specificity=0.9).challenge

    said = [
        {name: value for name, value in zip(OUTPUTS, row, strict=True) if np.isfinite(value)} for row in logits.tolist()
    ]
    submitted = np.array([list(challenge.row(row).values()) for row in said])
    platt = {}
    for i, name in enumerate(OUTPUTS):
        judged = np.isfinite(logits[:, i])
        platt[name] = fit_platt(logits[judged, i], truths[judged, i])
    probabilities = np.array(
        [
            [
                platt[name].probability(row[name]) if name in row else truths[:, i].mean()
                for i, name in enumerate(OUTPUTS)
            ]
            for row in said
        ]
    )
    best_constants = np.tile(list(challenge.undetermined.values()), (num, 1))
    assert weighted_log_loss(truths, submitted) < weighted_log_loss(truths, probabilities)
    assert weighted_log_loss(truths, submitted) < weighted_log_loss(truths, best_constants)


def test_both_specificities_hold_though_a_called_level_calls_the_patient() -> None:
    rng = np.random.default_rng(0)
    levels = rng.random((2000, 7)) < 0.1
    truths = np.concatenate([levels.any(axis=1, keepdims=True), levels], axis=1)
    logits = rng.normal(-3, 1.2, truths.shape) + 2.4 * truths
    logits[:, 0] = logits[:, 1:].max(axis=1) + rng.normal(0, 0.5, len(truths))
    held_out = HeldOut(
        study_instance_uids=[""] * len(truths), logits=logits, opinions=logits[:, 1:], truths=truths, folds=[0]
    )

    fitted = fit_all(held_out, level_specificity=0.95, patient_specificity=0.85)

    probability = reported(calibrated_probabilities(fitted.platt, logits))
    called = probability >= [fitted.patient_operating_point, *[fitted.level_operating_point] * 7]
    assert (~called[:, 1:][~levels]).mean() >= 0.95
    specificity = (~called.any(axis=1)[~truths[:, 0]]).mean()
    assert 0.85 <= specificity < 0.87
