"""`cspine-train calibrate`: probabilities, operating points and the challenge's numbers."""

from pathlib import Path

import click

from training.commands.run_options import CACHE_AND_WORK, SHARE, echo


@click.command()
@CACHE_AND_WORK[0]
@CACHE_AND_WORK[1]
@click.option(
    "--level-specificity", type=SHARE, default=0.95, show_default=True, help="At least, of a vertebra; 0 to 1."
)
@click.option(
    "--patient-specificity",
    type=SHARE,
    default=0.85,
    show_default=True,
    help="At least, of a patient, called by any level too; 0 to 1.",
)
def calibrate(cache: Path, work: Path, level_specificity: float, patient_specificity: float) -> None:
    """Calibrate on the held-out studies of all finished folds, and write their predictions.

    `WORK/calibrate/predictions.csv` are probabilities, `predictions_challenge.csv` what to submit.
    """
    from training.steps.calibrate import calibrate as fit

    echo(lambda: fit(cache, work, level_specificity=level_specificity, patient_specificity=patient_specificity))
