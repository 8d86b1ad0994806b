"""`cspine-train phantom`: a model from nothing but the phantom."""

import json
from pathlib import Path

import click

from training.commands.run_options import COUNT


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the finished bundle.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("runs/phantom"),
    show_default=True,
    help="Folder for drawn patients (11 MB each) and the evaluation; a later run uses them again.",
)
@click.option("--patients", type=COUNT, default=200, show_default=True, help="Imaginary patients to train on.")
@click.option(
    "--held-out", type=COUNT, default=30, show_default=True, help="Further patients, to set the operating point."
)
@click.option(
    "--segment-steps", type=COUNT, default=1200, show_default=True, help="Training steps of the vertebra U-Net."
)
@click.option(
    "--patch-steps", type=COUNT, default=1500, show_default=True, help="Steps of the fracture network on patches."
)
@click.option(
    "--stack-steps", type=COUNT, default=800, show_default=True, help="Steps of it on whole vertebrae, after that."
)
@click.option(
    "--batch-size", type=COUNT, default=4, show_default=True, help="Vertebrae in a step of the fracture network."
)
@click.option(
    "--evaluate",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Unseen phantoms to measure the result on.",
)
@click.option(
    "--workers", type=COUNT, default=2, show_default=True, help="Processes that draw patients, and threads that train."
)
def phantom(
    out: Path,
    work: Path,
    patients: int,
    held_out: int,
    segment_steps: int,
    patch_steps: int,
    stack_steps: int,
    batch_size: int,
    evaluate: int,
    workers: int,
) -> None:
    """Train everything on procedural phantoms and export a bundle.

    Needs no data. With the defaults it takes about an hour on two idle cores.
    """
    from training.phantom import Plan, train_phantom_bundle

    plan = Plan(
        num_patients=patients,
        num_held_out=held_out,
        num_segment_steps=segment_steps,
        num_patch_steps=patch_steps,
        num_stack_steps=stack_steps,
        batch_size=batch_size,
        num_evaluated=evaluate,
        num_workers=workers,
    )
    bundle = train_phantom_bundle(out, work, plan)
    click.echo(json.dumps(bundle.metrics, indent=2))
