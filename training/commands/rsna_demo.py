"""`cspine-train rsna-demo`: a data set with the shape, and the traps, of RSNA 2022, from the phantom."""

import os
from pathlib import Path

import click


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the data set.")
@click.option("--studies", type=click.IntRange(1), default=60, show_default=True, help="Rows of train.csv.")
@click.option("--test-studies", type=click.IntRange(0), default=2, show_default=True, help="Studies of test.csv.")
@click.option(
    "--scanner",
    type=click.Choice(["fine", "coarse", "small"]),
    default="fine",
    show_default=True,
    help="Slices and pixels: as RSNA's; a quarter as many voxels, from which little networks still learn something; "
    "or so few that only the steps can be tried.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count, show_default="all cores", help="Studies at a time."
)
def rsna_demo(out: Path, studies: int, test_studies: int, scanner: str, seed: int, workers: int) -> None:
    """Write a data set as RSNA 2022 is downloaded: everything in it is generated, no patient is in it.

    One study cannot be used, one mask is upside down, some files are JPEG Lossless, some lack Modality: on purpose.
    """
    from rich.console import Console
    from rich.progress import track

    from training.rsna.demo import SCANNERS, generate

    if (out / "train_images").exists():
        raise click.ClickException(f"{out} has a data set already. Name another folder, or remove it.")
    done = generate(out, studies, num_test=test_studies, scanner=SCANNERS[scanner], seed=seed, num_workers=workers)
    for _ in track(done, "studies", studies + test_studies, console=Console(stderr=True)):
        pass
    click.echo(f"{studies} studies in {out}; next: cspine-train prepare --rsna {out} --cache FOLDER")
