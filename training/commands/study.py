"""`cspine-train study`: the network over the seven levels."""

from typing import Any

import click

from training.commands.run_options import COUNT, trains
from training.steps.run import Run


@click.command()
@trains(epochs=30, draws=1600, batch_size=64, learning_rate=1e-3)
@click.option("--hidden", "num_hidden", type=COUNT, default=64, show_default=True, help="GRU units per direction.")
def study(run: Run, num_hidden: int) -> dict[str, Any]:
    """Train the study network of one fold on what its fracture network says, with the challenge's weighted log loss."""
    from training.steps.study import StudyPlan
    from training.steps.study import study as train

    return train(run, StudyPlan(num_hidden=num_hidden))
