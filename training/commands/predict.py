"""`cspine-train predict`: what a model says of studies whose truth nobody knows, such as the challenge's test set."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with a folder for each study, named by its StudyInstanceUID, such as test_images.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the result.")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Model to run. [default: the one that comes with the package]"
)
@click.option("--device", default="auto", show_default=True, help="To run the model on: auto, cpu, cuda or cuda:N.")
def predict(data: Path, out: Path, bundle: Path | None, device: str) -> None:
    """Run a model on all studies of a folder; write predictions.csv and regions.csv.

    Of a bundle with numbers made for the challenge's metric, predictions_metric.csv, too. `submission` takes either.
    Each study's answer is kept in --out, so that a run that was stopped goes on where it was.
    """
    from model import BundleError
    from training.evaluation.evaluate_model import write_tables
    from training.evaluation.run import run_model
    from training.evaluation.tables import InputError
    from training.rsna import SourceError, read_images

    try:
        run = run_model(bundle, read_images(data), out, device=device)
    except (BundleError, InputError, SourceError) as error:
        raise click.ClickException(str(error)) from error
    write_tables(run, out)
    click.echo(f"{len(run.answers)} studies predicted, {len(run.failures)} without an answer. Written: {out}")
    for uid, reason in run.failures.items():
        click.echo(f"{uid}  {reason}")
