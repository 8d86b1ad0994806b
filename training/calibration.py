"""Finds what `model/calibrate.py` applies: scale and offset of logits, by output, on data that trained nothing else.

`cspine-train calibrate` calls it. Probabilities and the challenge's numbers are fitted apart: they differ.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from model.calibrate import Challenge, Platt
from model.levels import OUTPUTS
from training.evaluation import loss

Array = NDArray[np.float64]

SCALES = (0.01, 100.0)
"""Bounds of a scale: above 0, so that what is more suspicious stays so; and finite where logits tell all apart."""


def fit_platt(logits: Array, truths: NDArray[np.bool_], weights: Array | None = None) -> Platt:
    """The scale and offset with the lowest (weighted) cross-entropy.

    logits, truths, weights: `(N,)`. Targets are a little inside 0 and 1, so that few studies make no certainty.

    Raises:
        ValueError: all are fractured, or none is.

    Reference: Platt, Probabilistic Outputs for Support Vector Machines, 1999.
    """
    num_fractured, num_intact = int(truths.sum()), int((~truths).sum())
    if not num_fractured or not num_intact:
        raise ValueError(f"{num_fractured} fractured and {num_intact} intact: to calibrate, both are needed.")
    weights = np.ones(len(logits)) if weights is None else weights
    targets = np.where(truths, (num_fractured + 1) / (num_fractured + 2), 1 / (num_intact + 2))

    def cross_entropy(parameters: Array) -> tuple[float, Array]:
        calibrated = parameters[0] * logits + parameters[1]
        slope = weights * (1 / (1 + np.exp(-np.clip(calibrated, -500, 500))) - targets)
        value = weights @ (np.logaddexp(0, calibrated) - targets * calibrated)
        return value / weights.sum(), np.array([slope @ logits, slope.sum()]) / weights.sum()

    found = minimize(cross_entropy, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[SCALES, (None, None)])
    return Platt(scale=float(found.x[0]), offset=float(found.x[1]))


def fit_challenge(logits: Array, truths: NDArray[np.bool_]) -> Challenge:
    """The numbers with the lowest challenge loss, of each output by itself.

    logits: `(N, 8)` in the order of OUTPUTS, NaN where an output was not judged. truths: `(N, 8)`.

    Raises:
        ValueError: an output is fractured in all studies where it was judged, or in none.
    """
    weights = loss.weights(truths)
    weights = weights / weights.sum(axis=1, keepdims=True)
    constants = loss.best_constants(truths)
    platt, undetermined = {}, {}
    for column, name in enumerate(OUTPUTS):
        judged = np.isfinite(logits[:, column])
        try:
            platt[name] = fit_platt(logits[judged, column], truths[judged, column], weights[judged, column])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        undetermined[name] = float(constants[column])
    return Challenge(platt=platt, undetermined=undetermined)
