"""`cspine-train cut`: the stacks of slices that the fracture networks read, once for each set of vertebra labels."""

import os
from pathlib import Path

import click

from training.commands.run_options import FOLDER, FiniteRange


def plain_name(context: click.Context, parameter: click.Parameter | None, value: str) -> str:
    """A name of a folder in the cache, and of none elsewhere."""
    if not value or value != Path(value).name or value.startswith("."):
        raise click.BadParameter(f"{value!r} is no name of a folder. Give one without slashes that begins with no dot.")
    return value


@click.command()
@click.option("--cache", type=FOLDER, required=True, help="Folder that `prepare` made.")
@click.option("--name", required=True, callback=plain_name, help="Of the cut; a training names it.")
@click.option(
    "--masks",
    required=True,
    help="Where the vertebrae are: truth (the masks of the data set), a label set of the cache, or the folder of a "
    "model bundle, which then finds them.",
)
@click.option("--slices", type=click.IntRange(3), default=15, show_default=True, help="Slices of a vertebra.")
@click.option("--pixels", type=click.IntRange(32), default=96, show_default=True, help="Side of a slice.")
@click.option("--pixel-mm", type=FiniteRange(0.2, 3), default=0.9, show_default=True, help="Of a slice.")
@click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count, show_default="all cores", help="Studies at a time."
)
def cut(cache: Path, name: str, masks: str, slices: int, pixels: int, pixel_mm: float, workers: int) -> None:
    """Cut every vertebra's stack of slices at full resolution, with its mask and the region of its fracture.

    A run that is interrupted goes on where it stopped; what did not change is not cut again.
    """
    from rich.console import Console
    from rich.progress import track

    from model import BundleError
    from training.files import BusyError
    from training.rsna import Cache, CacheError, CutSettings, ProcessDiedError
    from training.rsna import cut as cut_studies

    settings = CutSettings(num_slices=slices, num_pixels=pixels, pixel_mm=pixel_mm)
    try:
        opened = Cache.open(cache)
        source = Path(masks) if (Path(masks) / "bundle.json").is_file() else masks
        done = cut_studies(opened, name, settings, source, num_workers=workers)
        tracked = track(done, "studies", len(opened.folds), console=Console(stderr=True))
        reasons = {study.study_instance_uid: reason for study, reason in tracked}
    except (BusyError, BundleError, CacheError, ProcessDiedError) as error:
        raise click.ClickException(str(error)) from error
    left_out = {uid: reason for uid, reason in reasons.items() if reason is not None}
    if len(left_out) == len(reasons):
        raise click.ClickException(
            f"No study got labels from {masks!r}. Name truth, a set in {cache / 'labels'}, or the folder of a model "
            f"bundle. The first reason: {next(iter(left_out.values()))}"
        )
    click.echo(f"{len(reasons) - len(left_out)} studies cut, {len(left_out)} left out.")
    for uid, reason in left_out.items():
        click.echo(f"{uid}  {reason}")
