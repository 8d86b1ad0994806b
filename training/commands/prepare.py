"""`cspine-train prepare`: the RSNA 2022 data, as downloaded, into a cache that training reads."""

import os
from pathlib import Path

import click

from training.commands.run_options import FOLDER, FiniteRange


@click.command()
@click.option(
    "--rsna",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder of the data set as downloaded, with train.csv.",
)
@click.option("--cache", type=FOLDER, required=True, help="Folder for the cache; made if needed.")
@click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count, show_default="all cores", help="Studies at a time."
)
@click.option("--spacing", type=FiniteRange(0.5, 4), default=1.0, show_default=True, help="Of the neck's grid, mm.")
def prepare(rsna: Path, cache: Path, workers: int, spacing: float) -> None:
    """Read every study once: sort its slices, put its mask and boxes in place, and say what is wrong with it.

    A run that is interrupted goes on where it stopped; a study is read again only if its files or settings changed.
    report.txt in the cache names what was left out and what was changed, and why.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from training.files import BusyError
    from training.rsna import NoStudiesError, ProcessDiedError, Settings, SourceError, read_source
    from training.rsna import prepare as prepare_cache

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left_out]} left out"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        source = read_source(rsna)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("studies", total=len(source.studies), left_out=0)
            left_out = 0
            for record in prepare_cache(source, cache, Settings(spacing_mm=spacing), num_workers=workers):
                left_out += record["left_out"] is not None
                progress.update(task, advance=1, left_out=left_out)
    except (BusyError, NoStudiesError, ProcessDiedError, SourceError) as error:
        raise click.ClickException(str(error)) from error
    click.echo((cache / "report.txt").read_text(encoding="utf-8"), nl=False)
