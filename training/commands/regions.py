"""`cspine-train regions`: the fracture-region U-Net."""

from typing import Any

import click

from training.commands.run_options import SHARE, trains
from training.steps.run import Run


@click.command()
@trains(epochs=30, draws=4000, batch_size=16, learning_rate=1e-3)
@click.option("--cut", required=True, help="Name of the stacks that `cut` made.")
@click.option("--encoder", default="efficientnet-b2", show_default=True, help="Or residual-N-N..., or timm:NAME.")
@click.option("--patch", default=64, show_default=True, help="Side of a sample, in pixels of the cut; four a vertebra.")
@click.option(
    "--pseudo-label-rounds",
    "num_rounds",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="With fractured vertebrae without a box.",
)
@click.option(
    "--threshold", type=SHARE, default=0.5, show_default=True, help="Probability from which a pixel is drawn."
)
def regions(run: Run, **plan: Any) -> dict[str, Any]:
    """Train the fracture-region U-Net of one fold: from boxes at the bone, and from intact vertebrae."""
    from training.steps.regions import RegionsPlan
    from training.steps.regions import regions as train

    return train(run, RegionsPlan(**plan))
