"""`cspine-train submission`: predictions as the challenge wants them."""

from pathlib import Path

import click

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--predictions", type=_FILE, required=True, help="CSV: StudyInstanceUID, patient_overall, C1..C7.")
@click.option("--test", type=_FILE, required=True, help="test.csv: row_id, StudyInstanceUID, prediction_type.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
def submission(predictions: Path, test: Path, out: Path) -> None:
    """Write the challenge's submission file, row_id and fractured.

    Every row of test.csv must have an answer; those without are named, and then nothing is written.
    """
    from training.evaluation.submission import write_submission
    from training.evaluation.tables import InputError

    try:
        num_rows, num_undetermined = write_submission(predictions, test, out)
    except InputError as error:
        raise click.ClickException(str(error)) from error
    if num_undetermined:
        click.echo(
            f"{num_undetermined} undetermined answers: the prevalence in the challenge's public data stands there."
        )
    click.echo(f"{num_rows} rows written to {out}.")
