"""How well scores put positives above negatives: ROC, precision and recall, with ties, and for many resamples at once.

Studies of equal score come under the threshold together, so a tie is half a win in the AUC, and no order of the file
changes a number.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Scores in groups of equal value, highest first.

    scores: `(G,)`, strictly falling. order: `(N,)`, rows by falling score. starts: `(G,)`, first place of each group
    in `order`. truth: bool `(N,)`, in that order.
    """

    scores: Array
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    truth: NDArray[np.bool_]

    @classmethod
    def of(cls, truth: NDArray[np.bool_], scores: Array) -> "Ranking":
        """The ranking of `(N,)` scores.

        Raises:
            ValueError: a score is NaN, which no order has a place for.
        """
        if np.isnan(scores).any():
            raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN. Leave these rows out.")
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        starts = np.flatnonzero(np.concatenate([[True], falling[1:] != falling[:-1]])[: len(falling)])
        return cls(scores=falling[starts], order=order, starts=starts, truth=np.asarray(truth, bool)[order])

    def counted(self, counts: Array) -> tuple[Array, Array]:
        """Positives and negatives of each group `(r, G)`, of rows that occur `counts` times, `(r, N)`."""
        ordered = counts[:, self.order]
        both = np.add.reduceat(ordered, self.starts, axis=1)
        positives = np.add.reduceat(ordered * self.truth, self.starts, axis=1)
        return positives, both - positives


def roc_areas(positives: Array, negatives: Array) -> Array:
    """AUC `(r,)` from `Ranking.counted`: how often a positive scores above a negative, ties half; NaN of one class."""
    above = np.cumsum(positives, axis=1) - positives / 2
    num_pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return _divide((above * negatives).sum(axis=1), num_pairs)


def average_precisions(positives: Array, negatives: Array) -> Array:
    """PR-AUC `(r,)` as average precision: the precision at each threshold, weighted by the recall it adds.

    No interpolation, which would flatter (Davis and Goadrich 2006). NaN without positives.
    """
    true_positives = np.cumsum(positives, axis=1)
    precision = _divide(true_positives, true_positives + np.cumsum(negatives, axis=1))
    return _divide((positives * np.nan_to_num(precision)).sum(axis=1), positives.sum(axis=1))


def roc_auc(truth: NDArray[np.bool_], scores: Array) -> float:
    """Area under the ROC curve; NaN if only one class occurs, or none."""
    return float(roc_areas(*_once(truth, scores))[0])


def average_precision(truth: NDArray[np.bool_], scores: Array) -> float:
    """Average precision; NaN without positives."""
    return float(average_precisions(*_once(truth, scores))[0])


def roc_curve(truth: NDArray[np.bool_], scores: Array) -> tuple[Array, Array]:
    """False and true positive rates from (0, 0) to (1, 1), one point a distinct score."""
    positives, negatives = (np.concatenate([[0.0], np.cumsum(side[0])]) for side in _once(truth, scores))
    return negatives / negatives[-1], positives / positives[-1]


def pr_curve(truth: NDArray[np.bool_], scores: Array) -> tuple[Array, Array]:
    """Recall and precision, one point a distinct score, the highest score first."""
    positives, negatives = (np.cumsum(side[0]) for side in _once(truth, scores))
    return positives / positives[-1], positives / (positives + negatives)


def _once(truth: NDArray[np.bool_], scores: Array) -> tuple[Array, Array]:
    return Ranking.of(truth, scores).counted(np.ones((1, len(scores))))


def _divide(numerator: Array, denominator: Array) -> Array:
    """Quotients, NaN where the denominator is 0."""
    quotients = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, denominator, out=quotients, where=denominator != 0)
    return quotients
