"""`cspine-train classify`: the fracture network."""

from typing import Any

import click

from training.commands.run_options import COUNT, SHARE, FiniteRange, trains
from training.steps.run import Run


@click.command()
@trains(epochs=30, draws=7000, batch_size=8, learning_rate=5e-4)
@click.option("--cut", required=True, help="Name of the stacks that `cut` made.")
@click.option("--encoder", default="efficientnet-b2", show_default=True, help="Or residual-N-N..., or timm:NAME.")
@click.option("--hidden", "num_hidden", type=COUNT, default=256, show_default=True, help="GRU units per direction.")
@click.option("--layers", "num_layers", type=COUNT, default=2, show_default=True, help="Of the GRU.")
@click.option(
    "--heads", "num_heads", type=click.Choice(["1", "7"]), default="7", show_default=True, help="7: one a level."
)
@click.option(
    "--dropout",
    type=FiniteRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Of what the GRU says.",
)
@click.option(
    "--mixup",
    type=SHARE,
    default=0.3,
    show_default=True,
    help="Share of samples that are mixtures of two vertebrae.",
)
@click.option(
    "--start",
    type=click.Choice(["regions", "random"]),
    default="regions",
    show_default=True,
    help="Begin with the encoder of `regions`, which must be the same, or with none.",
)
@click.option(
    "--mirrored/--not-mirrored",
    default=True,
    show_default=True,
    help="Ask about each vertebra and its mirror image, here and in the bundle.",
)
def classify(run: Run, num_heads: str, **plan: Any) -> dict[str, Any]:
    """Train the fracture network of one fold: CNN, BiGRU and attention over each vertebra's slices."""
    from training.steps.classify import ClassifyPlan
    from training.steps.classify import classify as train

    return train(run, ClassifyPlan(num_heads=int(num_heads), **plan))
