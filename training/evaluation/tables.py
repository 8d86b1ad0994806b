"""The CSV files of an evaluation: predictions, truth, subgroups; read strictly, and matched by StudyInstanceUID.

A fault in a file is an `InputError` that names file, line, value and remedy. Nothing here computes a metric.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.levels import OUTPUTS

STUDY = "StudyInstanceUID"
OVERALL = OUTPUTS[0]
"""The eight outputs are in the order of `model.levels.OUTPUTS` in every array here."""

UNDETERMINED = "undetermined"
"""Optional column of predictions: the outputs without an answer, separated by blanks; their cells are empty."""

PATIENT = "PatientID"
"""Optional column of subgroups: no subgroup, but says which Studies are of one patient."""

_MAX_FAULTS_SHOWN = 5


class InputError(Exception):
    """A file that cannot be used for an evaluation; the message says what is wrong, the value, what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Eight numbers a Study: `values` is float64 `(N, 8)` in the order of OUTPUTS, NaN where undetermined."""

    studies: tuple[str, ...]
    values: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Matched:
    """The Studies that both files have, in the order of the truth.

    truth: bool `(N, 8)`. predicted: float64 `(N, 8)`, NaN where undetermined. The two lists name all other Studies.
    """

    studies: tuple[str, ...]
    truth: NDArray[np.bool_]
    predicted: NDArray[np.float64]
    only_in_predictions: tuple[str, ...]
    only_in_truth: tuple[str, ...]


def read_predictions(path: Path) -> Table:
    """Probabilities 0..1.

    Raises:
        InputError: not a CSV, a column is missing, a Study twice, a cell that is no probability.
    """
    return _read_table(path, _probability, may_be_undetermined=True)


def read_truth(path: Path) -> Table:
    """Labels, 0 or 1, as in the challenge's train.csv.

    Raises:
        InputError: as for `read_predictions`.
    """
    return _read_table(path, _label, may_be_undetermined=False)


def match(predictions: Table, truth: Table) -> Matched:
    """Both tables by Study.

    Raises:
        InputError: they have no Study in common.
    """
    row_of = {study: row for row, study in enumerate(predictions.studies)}
    rows = [(row_of[study], row) for row, study in enumerate(truth.studies) if study in row_of]
    if not rows:
        raise InputError(
            f"Predictions ({len(predictions.studies)} Studies, the first {predictions.studies[0]}) and truth "
            f"({len(truth.studies)}, the first {truth.studies[0]}) have no StudyInstanceUID in common. "
            "Check that the two files belong together."
        )
    known = set(truth.studies)
    predicted_rows, truth_rows = (list(side) for side in zip(*rows, strict=True))
    return Matched(
        studies=tuple(truth.studies[row] for row in truth_rows),
        truth=truth.values[truth_rows] > 0.5,
        predicted=predictions.values[predicted_rows],
        only_in_predictions=tuple(study for study in predictions.studies if study not in known),
        only_in_truth=tuple(study for study in truth.studies if study not in row_of),
    )


def read_subgroups(path: Path) -> dict[str, dict[str, str]]:
    """Column name to (StudyInstanceUID to category); an empty cell is left out.

    Raises:
        InputError: not a CSV, no StudyInstanceUID, a Study twice, no further column.
    """
    columns: dict[str, dict[str, str]] = {}
    seen: dict[str, int] = {}
    faults = []
    for line, row in read_rows(path, (STUDY,)):
        study = row.pop(STUDY)
        faults += _fault_of_study(study, line, seen)
        row.pop("", None)  # spreadsheets write columns without a name
        for name, value in row.items():
            column = columns.setdefault(PATIENT if name.lower() == PATIENT.lower() else name, {})
            if value:
                column[study] = value
    _refuse(path, faults)
    if not columns:
        raise InputError(f"{path} has no column beside {STUDY}. Add one for each kind of subgroup, e.g. scanner.")
    return columns


def read_rows(path: Path, needed: Iterable[str], *, may_be_empty: bool = False) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells, stripped, of each row of a CSV with a header; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, is no CSV, lacks a needed column, has a row of another length, or no rows
            where it may not be empty.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, needed)
            num_rows = 0
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, and the header has {len(header)} "
                        "columns. Check the separators and quotes of this line."
                    )
                num_rows += 1
                yield reader.line_num, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8 ({error}). Save it as comma-separated text.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Name a CSV file.") from error
    if num_rows == 0 and not may_be_empty:
        raise InputError(f"{path} has a header and no rows. It needs at least one.")


def _check_header(path: Path, header: list[str], needed: Iterable[str]) -> None:
    needed = list(needed)
    if not any(header):
        raise InputError(f"{path} is empty. It needs the columns {', '.join(needed)}.")
    missing = [name for name in needed if name not in header]
    if missing:
        separator = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
        remedy = f"Separate columns by commas, not by {separator!r}." if separator else "Add it, spelled like that."
        if {"row_id", "fractured"} <= set(header):
            remedy = "This is a submission to the challenge: name the predictions that it was made of, one row a Study."
        raise InputError(
            f"{path} has no column {', '.join(missing)}; its header is {_short(', '.join(header))!r}, and "
            f"{', '.join(needed)} are needed. {remedy}"
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {', '.join(twice)} more than once. Keep one of each.")


def _read_table(path: Path, value_of: Callable[[str], float], *, may_be_undetermined: bool) -> Table:
    studies: dict[str, int] = {}
    values: list[list[float]] = []
    faults: list[str] = []
    for line, row in read_rows(path, (STUDY, *OUTPUTS)):
        study = row[STUDY]
        faults += _fault_of_study(study, line, studies)
        undetermined = set(row.get(UNDETERMINED, "").split()) if may_be_undetermined else set()
        if unknown := sorted(undetermined - set(OUTPUTS)):
            faults.append(
                f"line {line}, column {UNDETERMINED}: there is no output {unknown[0]!r}. Name some of "
                f"{' '.join(OUTPUTS)}."
            )
        numbers = []
        for name in OUTPUTS:
            try:
                numbers.append(_nothing(row[name]) if name in undetermined else value_of(row[name]))
            except ValueError as error:
                faults.append(f"line {line}, Study {study}, column {name}: {error}")
        values.append(numbers)
    _refuse(path, faults)
    return Table(studies=tuple(studies), values=np.array(values))


def _nothing(text: str) -> float:
    if text:
        raise ValueError(f"{_short(text)!r} stands here, and {UNDETERMINED} names this output. Empty one of the two.")
    return math.nan


def _probability(text: str) -> float:
    value = _number(text, f"If the model gave no answer, name the output in a column {UNDETERMINED}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is no probability. Give numbers from 0 to 1 (not logits, not per cent).")
    return value


def _label(text: str) -> float:
    value = _number(text, "Leave a Study without a label out of the truth.")
    if value not in (0, 1):
        raise ValueError(f"{text} is neither 0 (not fractured) nor 1 (fractured). Correct the label.")
    return value


def _number(text: str, remedy: str) -> float:
    if not text:
        raise ValueError(f"the cell is empty. {remedy}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{_short(text)!r} is no number. {remedy}") from None
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number. {remedy}")
    return value


def _fault_of_study(study: str, line: int, seen: dict[str, int]) -> list[str]:
    """What is wrong with a row's UID; notes it as seen at this line."""
    if not study:
        return [f"line {line}: {STUDY} is empty. Fill it in or remove the line."]
    if study in seen:
        return [f"line {line}: Study {study} stands in line {seen[study]} already. Keep one line for each Study."]
    seen[study] = line
    return []


def _refuse(path: Path, faults: list[str]) -> None:
    if not faults:
        return
    shown = faults[:_MAX_FAULTS_SHOWN]
    more = [f"and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
    raise InputError("\n  ".join([f"{path} cannot be used:", *shown, *more]))


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]}…"
