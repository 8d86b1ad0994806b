"""CSV files of an evaluation, for the tests of `training.evaluation`."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HEADER = ("StudyInstanceUID", "patient_overall", "C1", "C2", "C3", "C4", "C5", "C6", "C7")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_table(path: Path, rows: Mapping[str, Iterable[object]], header: Iterable[str] = HEADER) -> Path:
    """A table of predictions or truth. rows: StudyInstanceUID to its cells."""
    return write_csv(path, header, ((study, *cells) for study, cells in rows.items()))


def draw_patients(num: int, seed: int = 0) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Truth and good, not perfect, probabilities `(num, 8)` of made-up patients; a patient is the OR of the levels."""
    rng = np.random.default_rng(seed)
    levels = rng.random((num, 7)) < np.array([0.072, 0.141, 0.036, 0.053, 0.080, 0.137, 0.195])
    truth = np.column_stack([levels.any(axis=1), levels])
    return truth, 1 / (1 + np.exp(-(rng.normal(size=(num, 8)) + 3 * truth - 2)))
