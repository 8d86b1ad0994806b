"""The challenge's submission file: one row for each row of test.csv."""

import csv
from pathlib import Path

import numpy as np

from model.levels import OUTPUTS
from training.evaluation.loss import RSNA_PREVALENCE
from training.evaluation.tables import STUDY, InputError, read_predictions, read_rows
from training.files import replacing_file

_MAX_NAMED = 10


def write_submission(predictions: Path, test: Path, out: Path) -> tuple[int, int]:
    """Writes `row_id,fractured` for every row of test.csv, in its order; counts of rows, and of undetermined ones.

    An undetermined output is answered with the prevalence in the challenge's public data.

    Raises:
        InputError: a file is not as it should be, or a row has no answer; then nothing is written.
    """
    table = read_predictions(predictions)
    row_of = {study: row for row, study in enumerate(table.studies)}
    answers: dict[str, float] = {}
    unanswered, num_undetermined = [], 0
    for line, row in read_rows(test, ("row_id", STUDY, "prediction_type")):
        row_id, study, output = row["row_id"], row[STUDY], row["prediction_type"]
        if output not in OUTPUTS:
            raise InputError(
                f"{test}, line {line}: prediction_type is {output!r}, which is none of {', '.join(OUTPUTS)}. "
                "Is this test.csv?"
            )
        if row_id != f"{study}_{output}":
            raise InputError(f"{test}, line {line}: row_id is {row_id!r}, not {study}_{output}. Is this test.csv?")
        if row_id in answers:
            raise InputError(f"{test}, line {line}: row_id {row_id} stands there already. Keep one line of each.")
        if study not in row_of:
            unanswered.append(row_id)
            continue
        column = OUTPUTS.index(output)
        value = table.values[row_of[study], column]
        num_undetermined += int(np.isnan(value))
        answers[row_id] = float(RSNA_PREVALENCE[column] if np.isnan(value) else value)
    if unanswered:
        num_more = len(unanswered) - _MAX_NAMED
        named = unanswered[:_MAX_NAMED] + ([f"and {num_more} more"] if num_more > 0 else [])
        raise InputError(
            f"{predictions} has no answer for {len(unanswered)} of {len(unanswered) + len(answers)} rows of {test}, "
            "and the challenge takes no partial submission. Predict these, too:\n  " + "\n  ".join(named)
        )
    with replacing_file(out) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row_id", "fractured"))
        writer.writerows(answers.items())
    return len(answers), num_undetermined
