"""Finds what `model/calibrate.py` applies: scale and offset of logits, on data that trained nothing else.

`cspine-train calibrate` calls it. Probabilities and the challenge's numbers are fitted apart: they differ.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from model.calibrate import Platt

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
