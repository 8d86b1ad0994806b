"""The challenge's metric, the weighted multi-label log loss, and what constants reach on the same Studies.

Reference: RSNA 2022 Cervical Spine Fracture Detection, evaluation page; the row-normalised form, in which each Study
counts the same whatever is fractured in it.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_EPSILON = 1e-15

RSNA_PREVALENCE = np.array([0.476, 0.072, 0.141, 0.036, 0.053, 0.080, 0.137, 0.195])
"""Of patient_overall, C1..C7 in the 2,019 public Studies of the challenge, whose publisher says so."""

LEVEL_PREVALENCE = RSNA_PREVALENCE[1:]
"""Of C1..C7."""


def weights(truth: NDArray[np.bool_]) -> Array:
    """Weight of each label, `(N, 8)`: 14 and 7 for a positive and a negative patient, 2 and 1 for a level."""
    scale = np.array([7.0, *[1.0] * 7])
    return np.asarray(np.where(truth, 2.0, 1.0) * scale)


def log_losses(truth: NDArray[np.bool_], probability: Array) -> Array:
    """Binary cross-entropy of each label, natural logarithm, probabilities clipped to 1e-15."""
    clipped = np.clip(probability, _EPSILON, 1 - _EPSILON)
    return -np.log(np.where(truth, clipped, 1 - clipped))


def study_losses(truth: NDArray[np.bool_], probability: Array) -> Array:
    """Loss of each Study, `(N,)`: the weighted mean over its eight labels."""
    weight = weights(truth)
    return np.asarray((weight * log_losses(truth, probability)).sum(axis=1) / weight.sum(axis=1))


def weighted_log_loss(truth: NDArray[np.bool_], probability: Array) -> float:
    """The challenge's score: the mean of `study_losses`. truth: bool `(N, 8)`; probability: `(N, 8)`, no NaN."""
    return float(study_losses(truth, probability).mean())


def best_constants(truth: NDArray[np.bool_]) -> Array:
    """The eight constants with the lowest weighted log loss on this truth: weighted shares of positives."""
    weight = weights(truth)
    share = weight / weight.sum(axis=1, keepdims=True)
    best: Array = (share * truth).sum(axis=0) / share.sum(axis=0)
    return best


def constant_baselines(truth: NDArray[np.bool_]) -> dict[str, Array]:
    """Eight constants each: what a model must beat."""
    return {
        "all_half": np.full(8, 0.5),
        "base_rates": truth.mean(axis=0),
        "best_constants": best_constants(truth),
    }
