"""`cspine-train`: the commands that make and measure a model."""

import logging

import click

from training.commands.cut import cut
from training.commands.evaluate import evaluate
from training.commands.measure import measure
from training.commands.phantom import phantom
from training.commands.prepare import prepare
from training.commands.rsna_demo import rsna_demo
from training.commands.show_fractures import show_fractures
from training.commands.submission import submission


@click.group()
def main() -> None:
    """Train the networks of the C-Spine Node and measure them.

    What comes out is a model bundle: a folder that `analyse.bundle` in the node's config.yaml names.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


main.add_command(cut)
main.add_command(evaluate)
main.add_command(measure)
main.add_command(phantom)
main.add_command(prepare)
main.add_command(rsna_demo)
main.add_command(show_fractures)
main.add_command(submission)
