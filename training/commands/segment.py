"""`cspine-train segment`: the vertebra U-Net."""

from typing import Any

import click

from training.commands.run_options import FiniteRange, counts, trains
from training.steps.run import Run, StepError


@click.command()
@trains(epochs=40, draws=1000, batch_size=8, learning_rate=2e-3)
@click.option(
    "--network",
    type=click.Choice(["unet3d", "unet2d"]),
    default="unet3d",
    show_default=True,
    help="unet2d is the reference: slices with their neighbours through an EfficientNet.",
)
@click.option("--channels", default="16,32,64,128,160", show_default=True, callback=counts, help="Of unet3d.")
@click.option(
    "--spacing-mm",
    type=FiniteRange(0.1, 10),
    default=2.0,
    show_default=True,
    help="Of unet3d's grid; unet2d has the cache's.",
)
@click.option(
    "--crop", default="96,80,80", show_default=True, callback=counts, help="Voxels of unet3d's samples, Z,Y,X."
)
@click.option("--encoder", default="efficientnet-b0", show_default=True, help="Of unet2d.")
@click.option("--pixels", "num_pixels", default=256, show_default=True, help="Side of unet2d's samples.")
@click.option(
    "--pseudo-label-rounds",
    "num_rounds",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="With studies that have no mask.",
)
@click.option("--label-all", is_flag=True, help="Label all studies, not the held-out fold only: for a single fold.")
def segment(run: Run, channels: tuple[int, ...], crop: tuple[int, ...], label_all: bool, **plan: Any) -> dict[str, Any]:
    """Train the vertebra U-Net of one fold and label the studies held out.

    A run that was killed goes on when the same command is given again.
    """
    from training.steps.segment import SegmentPlan
    from training.steps.segment import segment as train

    stride = 2 ** (len(channels) - 1)
    if len(crop) != 3 or any(side % stride for side in crop):
        raise StepError(f"--crop is {crop}; with {len(channels)} channels it must be three multiples of {stride}.")
    return train(run, SegmentPlan(channels=channels, crop=crop, **plan), label_all=label_all)
