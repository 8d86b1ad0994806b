"""What the commands that train have in common: options, and how a refusal is said."""

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from training.files import BusyError, locked
from training.steps.run import Run, StepError, fold_folder, is_first_process

Command = Callable[..., dict[str, Any]]

FOLDER = click.Path(file_okay=False, path_type=Path)


class FiniteRange(click.FloatRange):
    """A range without infinity, and without "nan", which click finds in every one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is no finite number.", param, ctx)


COUNT = click.IntRange(1)
SHARE = FiniteRange(0, 1)
SEED = click.IntRange(0, 2**32 - 1)
ABOVE_0 = FiniteRange(0, min_open=True)

PRECISIONS = ("auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
"""Lightning's names, and "auto"."""

CACHE_AND_WORK = (
    click.option("--cache", type=FOLDER, required=True, help="Folder that `prepare` made."),
    click.option(
        "--work",
        type=click.Path(file_okay=False, path_type=Path, resolve_path=True),  # "." has no name
        required=True,
        help="Folder of this training; all its steps and folds share it. Its name names label sets in the cache.",
    ),
)


def trains(*, epochs: int, draws: int, batch_size: int, learning_rate: float) -> Callable[[Command], Command]:
    """Makes a function of `run` and its own options a command that has all the options of a `Run`.

    The numbers are its defaults. What the function returns is printed.
    """
    options = [
        *CACHE_AND_WORK,
        click.option("--fold", type=click.IntRange(0, 4), required=True, help="Held out, 0 to 4."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Of first weights and draws."),
        click.option("--epochs", "num_epochs", type=COUNT, default=epochs, show_default=True, help="In each fit."),
        click.option(
            "--draws",
            "num_draws",
            type=COUNT,
            default=draws,
            show_default=True,
            help="Samples an epoch, on all devices.",
        ),
        click.option("--batch-size", type=COUNT, default=batch_size, show_default=True, help="On each device."),
        click.option("--learning-rate", type=ABOVE_0, default=learning_rate, show_default=True, help="At its highest."),
        click.option(
            "--workers",
            "num_workers",
            type=click.IntRange(0),
            default=lambda: min(8, os.cpu_count() or 1),
            show_default="8, or all cores",
            help="Processes that read and change samples, for each device.",
        ),
        click.option("--devices", default="auto", show_default=True, help="How many GPUs, or which: 2, or 0,3."),
        click.option(
            "--num-nodes", type=COUNT, default=1, show_default=True, help="Machines; they share cache and work folder."
        ),
        click.option("--strategy", default="auto", show_default=True, help="Lightning's: ddp, for one."),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="auto",
            show_default=True,
            help="Lightning's; auto is bf16-mixed or 16-mixed on a GPU, 32-true on a CPU.",
        ),
        click.option("--fresh", is_flag=True, help="Begin again, though there is a checkpoint or a result."),
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run_it(**values: Any) -> None:
            run = Run(**{field.name: values.pop(field.name) for field in fields(Run)})
            echo(lambda: _alone(command, run, values))

        for option in reversed(options):
            run_it = option(run_it)
        return run_it  # type: ignore[return-value]

    return decorate


def _alone(command: Command, run: Run, values: dict[str, Any]) -> dict[str, Any]:
    """Runs a step while no other run trains the same fold, and none prepares the cache."""
    if not is_first_process():
        return command(run, **values)
    with (
        locked(run.cache / "studies", shared=True),
        locked(fold_folder(run.work, command.__name__, run.fold)),
    ):
        return command(run, **values)


def echo(step: Callable[[], dict[str, Any]]) -> None:
    """Runs a step and prints its result; what it refuses becomes one sentence."""
    from training.rsna import CacheError

    try:
        result = step()
    except (BusyError, CacheError, StepError) as error:
        raise click.ClickException(str(error)) from error
    if is_first_process():
        click.echo(json.dumps(result, indent=2))


def numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """ "16,32,64" as numbers."""
    try:
        return tuple(int(number) for number in str(value).split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 16,32,64") from error


def counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """The same, each at least 1, and two at least: of a single one neither a network nor a crop is made."""
    found = numbers(context, parameter, value)
    if len(found) < 2 or min(found) < 1:
        raise click.BadParameter(f"{value!r} must be two or more numbers from 1 on, such as 16,32,64")
    return found
