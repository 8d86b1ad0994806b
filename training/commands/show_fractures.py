"""`cspine-train show-fractures`: what training inserts, to be looked at."""

from pathlib import Path

import click

from model import BundleError, SeriesError


@click.command("show-fractures")
@click.option(
    "--series",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with one CT Series. Without it a phantom is drawn.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write. It shows the patient.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Model that finds the vertebrae of the Series.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another one draws other fractures.")
def show_fractures(series: Path | None, out: Path, bundle: Path | None, seed: int) -> None:
    """Draw every kind of inserted fracture and hard negative at every level, before and after."""
    import numpy as np

    from model import load_pipeline, read_series
    from model.phantom import Anatomy, default_grid, render
    from training.inserted.show import contact_sheet

    try:
        if series is None:
            anatomy = Anatomy.random(seed, ())
            phantom = render(anatomy, default_grid(anatomy), seed=seed)
            voxels_hu, labels, grid = phantom.voxels_hu, phantom.vertebrae, phantom.grid
        else:
            volume = read_series([path for path in sorted(series.rglob("*")) if path.is_file()])
            labels = load_pipeline(bundle).analyse(volume).vertebrae
            voxels_hu, grid = volume.voxels_hu, volume.grid
    except (BundleError, SeriesError) as error:
        raise click.ClickException(str(error)) from error
    try:
        num_rows = contact_sheet(voxels_hu, labels, grid, np.random.default_rng(seed), out)
    except OSError as error:
        raise click.ClickException(
            f"{out} cannot be written ({error}). Name a file in a folder that is there."
        ) from error
    click.echo(f"{num_rows} rows in {out}" if num_rows else "No whole vertebra was found: nothing to draw.")
