"""`cspine-train`: the commands that make and measure a model."""

import logging
from pathlib import Path
from typing import Any

import click

from training.commands.calibrate import calibrate
from training.commands.classify import classify
from training.commands.config_file import read_config
from training.commands.cut import cut
from training.commands.evaluate import evaluate
from training.commands.everything import everything
from training.commands.export import export
from training.commands.measure import measure
from training.commands.necks import necks
from training.commands.phantom import phantom
from training.commands.predict import predict
from training.commands.prepare import prepare
from training.commands.regions import regions
from training.commands.rsna_demo import rsna_demo
from training.commands.segment import segment
from training.commands.show_fractures import show_fractures
from training.commands.study import study
from training.commands.submission import submission


class _Commands(click.Group):
    """Says in a sentence which file is in the way of a command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.filename is None:  # as of a disk that is full
                raise click.ClickException(
                    f"A file cannot be written or read ({error.strerror or error}). Is the disk full? Make room, and "
                    "give the command again."
                ) from error
            raise click.ClickException(f"{error.filename} cannot be written or read ({error.strerror}).") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), help="YAML: other defaults for the commands' options.")
@click.pass_context
def main(context: click.Context, config: Path | None) -> None:
    """Train the networks of the C-Spine Node and measure them.

    What comes out is a model bundle: a folder that `analyse.bundle` in the node's config.yaml names.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if config is not None:
        context.default_map = read_config(config, main)


for _command in (
    *(prepare, segment, cut, regions, classify, study, calibrate, export, everything),
    *(evaluate, predict, submission, measure, phantom, necks, rsna_demo, show_fractures),
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
