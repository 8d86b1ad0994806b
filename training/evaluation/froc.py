"""Fracture regions against the boxes that readers drew: FROC, sensitivity against false positives per Study.

A box is a rectangle in one slice, as in the challenge's train_bounding_boxes.csv. Two units are measured: the single
box, and the fracture, which is a chain of boxes that overlap from one slice to the next.

A true one is found if a predicted one overlaps it with an IoU above 0.2; a predicted one that overlaps no true one so
is a false positive. So several predictions on one fracture are one find, and none of them is false.

Reference: Chakraborty and Winter 1990.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.drawn_boxes import BOX_COLUMNS, DrawnBox, parse_box, parse_number
from training.evaluation.bootstrap import percentile_interval
from training.evaluation.tables import STUDY, InputError, read_rows

Array = NDArray[np.float64]

MIN_IOU = 0.2
FALSE_POSITIVES_PER_STUDY = (0.5, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Box(DrawnBox):
    """A drawn box, or a predicted one. score: 1 for a true box."""

    score: float = 1.0


Chain = tuple[Box, ...]
"""Boxes of one fracture, through one or more consecutive slices."""

Boxes = dict[str, list[Box]]
"""The boxes of each Study."""


def read_boxes(path: Path, *, scored: bool) -> Boxes:
    """Boxes by Study. scored: predicted ones, which may be none, with a column `score`, whatever ranks them.

    Raises:
        InputError: not a CSV, a column is missing, a cell is no number, a box without an area.
    """
    found: Boxes = {}
    names = (*BOX_COLUMNS, "score") if scored else BOX_COLUMNS
    for line, row in read_rows(path, (STUDY, *names), may_be_empty=scored):
        try:
            box = Box(**vars(parse_box(row)), score=parse_number(row, "score") if scored else 1.0)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
        found.setdefault(row[STUDY], []).append(box)
    return found


def chains(boxes: Sequence[Box]) -> list[Chain]:
    """Boxes joined with those of the same or the next slice that they overlap."""
    by_slice: dict[int, list[int]] = {}
    for index, box in enumerate(boxes):
        by_slice.setdefault(box.slice_number, []).append(index)
    chain_of = list(range(len(boxes)))

    def root(index: int) -> int:
        while chain_of[index] != index:
            index = chain_of[index]
        return index

    for index, box in enumerate(boxes):
        for other in (*by_slice[box.slice_number], *by_slice.get(box.slice_number + 1, ())):
            if intersection(box, boxes[other]) > 0:
                chain_of[root(other)] = root(index)
    found: dict[int, list[Box]] = {}
    for index, box in enumerate(boxes):
        found.setdefault(root(index), []).append(box)
    return [tuple(chain) for chain in found.values()]


def intersection(first: Box, second: Box) -> float:
    """Area that two boxes share, regardless of their slices."""
    width = min(first.x + first.width, second.x + second.width) - max(first.x, second.x)
    height = min(first.y + first.height, second.y + second.height) - max(first.y, second.y)
    return max(width, 0.0) * max(height, 0.0)


def iou(first: Chain, second: Chain) -> float:
    """Intersection over union of two chains over all their slices; where boxes of one chain overlap counts once."""
    if not any(a.slice_number == b.slice_number and intersection(a, b) > 0 for a in first for b in second):
        return 0.0
    slices = {box.slice_number for box in (*first, *second)}
    areas = [_areas(*([b for b in chain if b.slice_number == n] for chain in (first, second))) for n in slices]
    shared, union = np.sum(areas, axis=0)
    return float(shared / union)


def _areas(first: Sequence[Box], second: Sequence[Box]) -> tuple[float, float]:
    """Of the boxes of one slice: the area in both sides, and that in either."""
    both = (*first, *second)
    xs = np.unique([edge for box in both for edge in (box.x, box.x + box.width)])
    ys = np.unique([edge for box in both for edge in (box.y, box.y + box.height)])
    inside = np.zeros((2, len(ys) - 1, len(xs) - 1), bool)
    for side, boxes in zip(inside, (first, second), strict=True):
        for box in boxes:
            x0, x1 = np.searchsorted(xs, (box.x, box.x + box.width))
            y0, y1 = np.searchsorted(ys, (box.y, box.y + box.height))
            side[y0:y1, x0:x1] = True
    area = np.outer(np.diff(ys), np.diff(xs))
    return float(area[inside.all(axis=0)].sum()), float(area[inside.any(axis=0)].sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """What an FROC curve is made of, sorted by falling score; `study` are indices into the Studies measured.

    A true positive is a true region, at the highest score that finds it. num_true: regions of each Study.
    """

    score: Array
    is_found: NDArray[np.bool_]
    study: NDArray[np.int64]
    num_true: NDArray[np.int64]


def compare(studies: Sequence[str], predicted: Boxes, true: Boxes, *, as_chains: bool) -> Events:
    """Finds and false positives in these Studies. as_chains: the unit is the fracture, else the box."""
    scores, found, where, num_true = [], [], [], []
    for index, study in enumerate(studies):
        guesses, truths = (_units(boxes.get(study, []), as_chains) for boxes in (predicted, true))
        best = [-math.inf] * len(truths)
        for guess in guesses:
            score = max(box.score for box in guess)
            hits = [number for number, truth in enumerate(truths) if iou(guess, truth) > MIN_IOU]
            for number in hits:
                best[number] = max(best[number], score)
            if not hits:
                scores.append(score)
                found.append(False)
                where.append(index)
        for score in best:
            if score > -math.inf:
                scores.append(score)
                found.append(True)
                where.append(index)
        num_true.append(len(truths))
    order = np.argsort(-np.array(scores, float), kind="stable")
    return Events(
        score=np.array(scores, float)[order],
        is_found=np.array(found, bool)[order],
        study=np.array(where, np.int64)[order],
        num_true=np.array(num_true, np.int64),
    )


def _units(boxes: list[Box], as_chains: bool) -> list[Chain]:
    return chains(boxes) if as_chains else [(box,) for box in boxes]


def froc_curves(events: Events, counts: Array) -> tuple[Array, Array]:
    """False positives per Study and sensitivity `(r, G + 1)`, from (0, 0), a point a distinct score.

    counts: how often each Study occurs, `(r, N)`.
    """
    ends = np.flatnonzero(np.diff(events.score, append=np.nan) != 0)
    weights = counts[:, events.study]
    num_found = np.cumsum(weights * events.is_found, axis=1)[:, ends]
    num_false = np.cumsum(weights * ~events.is_found, axis=1)[:, ends]
    zero = np.zeros((len(counts), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity = np.concatenate([zero, num_found], axis=1) / (counts @ events.num_true)[:, None]
    return np.concatenate([zero, num_false], axis=1) / counts.sum(axis=1, keepdims=True), sensitivity


def sensitivity_at(false_positives: Array, sensitivity: Array, limit: float) -> Array:
    """The best sensitivity `(r,)` with at most `limit` false positives per Study."""
    best: Array = np.where(false_positives <= limit, sensitivity, 0.0).max(axis=1)
    return best


def measure_froc(events: Events, resamples: NDArray[np.float32]) -> dict[str, Any]:
    """Sensitivity at each of FALSE_POSITIVES_PER_STUDY, with bootstrap intervals over Studies."""
    num_true = int(events.num_true.sum())
    reasons: dict[str, str] = {}
    measured: dict[str, Any] = {"num_true": num_true, "num_found_at_any_score": int(events.is_found.sum())}
    if num_true == 0:
        return measured | {"reasons": {"all": "there is no true box in the Studies measured"}}
    once = froc_curves(events, np.ones((1, len(events.num_true))))
    measured["false_positives_per_study_at_any_score"] = float(once[0][0, -1])
    resampled = [
        froc_curves(events, chunk.astype(np.float64))
        for chunk in np.array_split(resamples, max(1, len(resamples) // 50))
    ]
    for limit in FALSE_POSITIVES_PER_STUDY:
        name = f"sensitivity_at_{limit:g}_fp".replace(".", "_")
        measured[name] = float(sensitivity_at(*once, limit)[0])
        measured[f"{name}_ci"] = percentile_interval(
            np.concatenate([sensitivity_at(*curves, limit) for curves in resampled])
        )
        if measured[f"{name}_ci"] is None:
            reasons[f"{name}_ci"] = (
                "too few Studies with a true box: more than 5 % of the bootstrap resamples have none, or all agree"
            )
    return measured | {"reasons": reasons}
