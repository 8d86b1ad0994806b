"""Intervals: bootstrap over patients, and Wilson's for a share.

The bootstrap draws patients with replacement and never splits one; a resample is a row of counts, how often each Study
is in it, so that every statistic of a thousand resamples is a few operations on arrays.

Reference: Efron and Tibshirani 1993 (percentile interval); Field and Welsh 2007 (resampling clusters); Wilson 1927.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
_Z = 1.959963984540054
"""Of the normal distribution, for CONFIDENCE."""

_CHUNK_BYTES = 64 * 2**20


def draw_resamples(patients: Sequence[Hashable], num_resamples: int, seed: int) -> NDArray[np.float32]:
    """How often each Study is in each resample, `(num_resamples, N)`; Studies of one patient come and go together."""
    if not patients:
        return np.zeros((num_resamples, 0), np.float32)
    index_of: dict[Hashable, int] = {}
    index = np.array([index_of.setdefault(patient, len(index_of)) for patient in patients])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(index_of), size=(num_resamples, len(index_of)))
    counts = np.zeros((num_resamples, len(index_of)), np.float32)
    for resample, chosen in enumerate(drawn):
        counts[resample] = np.bincount(chosen, minlength=len(index_of))
    return counts[:, index]


def over_resamples(
    resamples: NDArray[np.float32], studies: NDArray[np.int64], statistics: Callable[[Array], dict[str, Array]]
) -> dict[str, Array]:
    """Each statistic of each resample, `(R,)`.

    studies: `(M,)`, the Study of each row that the statistics are of. statistics: of counts `(r, M)`, arrays `(r,)`.
    """
    step = max(1, _CHUNK_BYTES // (8 * max(1, len(studies))))
    parts = [
        statistics(resamples[first : first + step, studies].astype(np.float64))
        for first in range(0, len(resamples), step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def percentile_interval(values: Array) -> list[float] | None:
    """The middle 95 % of a statistic over resamples; None if more than 5 % of them lack it, or it is the same in all.

    Either means that too few Studies decide it: a sensitivity of five out of five is not sure to be 1.
    """
    exists = np.isfinite(values)
    if exists.mean() < CONFIDENCE:
        return None
    lower, upper = np.quantile(values[exists], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return None if math.isclose(lower, upper, rel_tol=1e-9) else [float(lower), float(upper)]


def share_interval(
    scores: Array, studies: NDArray[np.int64], resamples: NDArray[np.float32], *, one_row_per_patient: bool
) -> list[float] | None:
    """Interval of the mean of scores 0..1 of some Studies: Wilson's, or the bootstrap's where patients have several.

    scores, studies: `(M,)`, the latter indices into the resamples. one_row_per_patient: none has two.
    """
    if one_row_per_patient or not len(scores):
        return wilson_interval(float(scores.sum()), len(scores))
    return mean_interval(scores, studies, resamples)


def mean_interval(values: Array, rows: NDArray[np.int64], resamples: NDArray[np.float32]) -> list[float] | None:
    """The bootstrap's interval of a mean of values `(M,)`; rows: `(M,)`, which of the resamples' each is."""

    def mean(counts: Array) -> dict[str, Array]:
        with np.errstate(invalid="ignore"):
            return {"mean": counts @ values / counts.sum(axis=1)}

    return percentile_interval(over_resamples(resamples, rows, mean)["mean"])


def wilson_interval(num_successes: float, num_trials: float) -> list[float] | None:
    """Interval of a share; None of no trials."""
    if num_trials == 0:
        return None
    share, shrink = num_successes / num_trials, 1 + _Z**2 / num_trials
    middle = (share + _Z**2 / (2 * num_trials)) / shrink
    half = _Z / shrink * np.sqrt(share * (1 - share) / num_trials + _Z**2 / (4 * num_trials**2))
    # The formula gives 0 and 1 at the ends but for rounding.
    lower = 0.0 if num_successes == 0 else float(middle - half)
    upper = 1.0 if num_successes == num_trials else float(middle + half)
    return [lower, upper]
