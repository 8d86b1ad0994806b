"""`cspine-train all`: every step, from the data set as downloaded to a bundle and its report."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from training.commands.cut import plain_name
from training.commands.run_options import CACHE_AND_WORK, FOLDER, numbers
from training.steps.summary import summarise

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def fold_numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """ "0,1" as folds, each once: what is none must not show after days."""
    found = tuple(dict.fromkeys(numbers(context, parameter, value)))
    if not set(found) <= set(range(5)):
        raise click.BadParameter(f"{value!r} names a fold that is none; they are 0 to 4", context, parameter)
    return found


@click.command("all")
@click.option("--rsna", type=FOLDER, required=True, help="The data set's folder, as downloaded.")
@CACHE_AND_WORK[0]
@CACHE_AND_WORK[1]
@click.option("--out", type=FOLDER, required=True, help="Folder for the bundle.")
@click.option("--folds", default="0,1,2,3,4", show_default=True, callback=fold_numbers, help="Which to train.")
@click.pass_context
def everything(context: click.Context, rsna: Path, cache: Path, work: Path, out: Path, folds: tuple[int, ...]) -> None:
    """Run prepare, segment, cut, regions, classify, study, calibrate, export and evaluate.

    Options of the steps come from --config, which stands before `all`. Each step is a process of its own; after a
    failure or a kill the same command goes on where it stopped. At the end WORK/summary.txt has each step's figures
    beside constants.
    """
    plain_name(context, None, work.name)  # of the cut, too, which comes after days
    config = context.find_root().params["config"]
    program = [sys.executable, "-m", "training.cli", *(["--config", str(config)] if config else [])]
    for arguments in steps(rsna, cache, work, out, folds):
        click.secho(f"cspine-train {' '.join(arguments)}", bold=True, err=True)
        done = subprocess.run([*program, *arguments], check=False, preexec_fn=_end_with(os.getpid()))
        if done.returncode:
            raise click.ClickException(
                f"`{arguments[0]}` ended with {done.returncode}. What is done is kept: mend the cause and give the "
                "same command."
            )
    click.echo(summarise(work), nl=False)


def _end_with(parent: int) -> Callable[[], None] | None:
    """For a child to call first: Linux then ends it when its parent ends, however that comes about. Else a step would
    go on for days beside the next run."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def set_up() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before that
            os.kill(os.getpid(), signal.SIGTERM)

    return set_up


def steps(rsna: Path, cache: Path, work: Path, out: Path, folds: tuple[int, ...]) -> Iterator[list[str]]:
    """The command line of each step, in order; a step may look at what those before it have written."""
    from training.rsna import NUM_FOLDS  # here, so that --help does not wait for torch

    where = ["--cache", str(cache), "--work", str(work)]
    # Every study is labelled by a network that has not seen it, as soon as all folds are trained.
    alone = ["--label-all"] if len(folds) < NUM_FOLDS else []
    yield ["prepare", "--rsna", str(rsna), "--cache", str(cache)]
    for fold in folds:
        yield ["segment", *where, "--fold", str(fold), *alone]
    yield ["cut", "--cache", str(cache), "--name", work.name, "--masks", f"oof-{work.name}"]
    for fold in folds:
        yield ["regions", *where, "--fold", str(fold), "--cut", work.name]
        yield ["classify", *where, "--fold", str(fold), "--cut", work.name]
        yield ["study", *where, "--fold", str(fold)]
    yield ["calibrate", *where]
    yield ["export", *where, "--out", str(out)]
    fitted = json.loads((work / "calibrate" / "calibration.json").read_text(encoding="utf-8"))
    points = {f"C{number}": fitted["level_operating_point"] for number in range(1, 8)}
    points["patient_overall"] = fitted["patient_operating_point"]
    yield [
        "evaluate",
        *("--predictions", str(work / "calibrate" / "predictions.csv")),
        *("--truth", str(Path(json.loads((cache / "cache.json").read_text(encoding="utf-8"))["source"]) / "train.csv")),
        *("--subgroups", str(cache / "subgroups.csv")),
        *("--out", str(work / "evaluate")),
        *(part for output, point in points.items() for part in ("--operating-point", f"{output}={point:.6f}")),
    ]
