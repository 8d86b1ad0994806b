"""`cspine-train necks`: the shipped model, from an atlas and unlabelled CT."""

import logging
from pathlib import Path

import click


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with atlas/HN-Atlas-labels.nrrd and openkbp/*.npz.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the finished bundle.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("runs/necks"),
    show_default=True,
    help="Folder for drawn necks and weights of each step (19 GB); a later run uses the necks again.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes that draw, and threads that train.",
)
@click.option("--quick", is_flag=True, help="A few steps of everything: to see that it runs, not to use the result.")
def necks(data: Path, out: Path, work: Path, workers: int, quick: bool) -> None:
    """Train the shipped model without one labelled patient, and export a bundle.

    About twelve hours on two idle cores, reckoned from its steps.
    """
    # Imported here, so that --help does not wait for torch.
    from training.necks.recipe import Plan, train_necks_bundle

    plan = Plan.quick(workers) if quick else Plan(num_workers=workers)
    try:
        bundle = train_necks_bundle(data, out, work, plan)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    logging.getLogger(__name__).info("%s: %s", bundle.folder, bundle.metrics)
