"""`cspine-train measure`: a bundle on unseen phantoms."""

import json
from pathlib import Path

import click

from model import BundleError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--phantoms", type=click.IntRange(1), default=20, show_default=True, help="How many unseen phantoms.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default=Path("runs/evaluation.json"),
    show_default=True,
    help="File for every case and the summary.",
)
def measure(bundle: Path, phantoms: int, report: Path) -> None:
    """Measure a bundle on phantoms that no training has seen."""
    from training.phantom import measure as measure_bundle

    try:
        summary = measure_bundle(bundle, report, phantoms)
    except BundleError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(summary, indent=2))
