"""`cspine-train evaluate`: how good are these predictions?"""

from pathlib import Path
from typing import Any

import click

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_MAX_NAMED = 20


@click.command()
@click.option("--predictions", type=_FILE, help="CSV: StudyInstanceUID, patient_overall, C1..C7, probabilities 0..1.")
@click.option("--truth", type=_FILE, help="CSV of the same columns, labels 0 or 1, such as the challenge's train.csv.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the result.")
@click.option(
    "--operating-point",
    "given_points",
    multiple=True,
    metavar="[OUTPUT=]P",
    help="Probability from which an output is called fractured, fixed beforehand. Repeatable: 0.4, C2=0.3. "
    "[default: of --bundle, else 0.5]",
)
@click.option("--subgroups", type=_FILE, help="CSV: StudyInstanceUID and a column for each kind of subgroup.")
@click.option("--predicted-regions", type=_FILE, help="CSV of boxes as in --true-boxes, and a column score.")
@click.option("--true-boxes", type=_FILE, help="CSV of readers' boxes, as the challenge's train_bounding_boxes.csv.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Instead of --predictions: run the model on this folder, which is as the challenge's.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Model to run, and whose operating points count. [default with --data: the one that comes with the package]",
)
@click.option("--device", default="auto", show_default=True, help="To run the model on: auto, cpu, cuda or cuda:N.")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(1), help="Of the bootstrap.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap.")
def evaluate(
    predictions: Path | None,
    truth: Path | None,
    out: Path,
    given_points: tuple[str, ...],
    subgroups: Path | None,
    predicted_regions: Path | None,
    true_boxes: Path | None,
    data: Path | None,
    bundle: Path | None,
    device: str,
    resamples: int,
    seed: int,
) -> None:
    """Measure predictions against the truth; write metrics.json and report.html.

    Give --predictions and --truth; or --data, and the model is run. Then --truth, if given, says on which Studies. Each
    Study's answer is kept in --out, so that a run that was stopped goes on where it was.

    Studies in only one of the two files are counted and named. What every key of metrics.json means stands in
    training/evaluation/README.md.
    """
    from model import BundleError
    from model.levels import OUTPUTS
    from training.evaluation.evaluate import Inputs, operating_points, points_of
    from training.evaluation.evaluate import evaluate as measure
    from training.evaluation.metrics import Settings
    from training.evaluation.tables import InputError

    if (predicted_regions is None) != (true_boxes is None):
        raise click.UsageError("--predicted-regions and --true-boxes belong together: give both, or neither.")
    if (predictions is None) == (data is None) or (data is None and truth is None):
        raise click.UsageError("Give either --predictions and --truth, or --data to run a model on.")
    if data is not None and true_boxes is not None:
        raise click.UsageError(
            "With --data, regions and boxes are the model's and the folder's. Leave the options out."
        )
    try:
        default = points_of(bundle) if bundle or data else dict.fromkeys(OUTPUTS, 0.5)
        settings = Settings(
            operating_points=operating_points(given_points, default), num_resamples=resamples, seed=seed
        )
        if data is not None:
            from training.evaluation.evaluate_model import evaluate_model

            metrics = evaluate_model(bundle, data, out, settings, truth=truth, subgroups=subgroups, device=device)
        else:
            assert predictions is not None
            assert truth is not None
            inputs = Inputs(
                predictions=predictions,
                truth=truth,
                subgroups=subgroups,
                predicted_regions=predicted_regions,
                true_boxes=true_boxes,
            )
            metrics = measure(inputs, settings, out)
    except (InputError, BundleError) as error:
        raise click.ClickException(str(error)) from error
    _show(metrics, out)


def _show(metrics: dict[str, Any], out: Path) -> None:
    """What stands in the files, in a few lines."""
    rates, best = (metrics["baselines"][name]["weighted_log_loss"] for name in ("base_rates", "best_constants"))
    click.echo(f"Studies measured        {metrics['num_studies']}")
    click.echo(
        f"weighted log loss       {metrics['weighted_log_loss']:.4f}"
        f"  (constants: base rates {rates:.4f}, best {best:.4f})"
    )
    for name, answers in (("patient_overall", metrics["patient_overall"]), ("all levels", metrics["all_levels"])):
        auc, interval = answers.get("auc"), answers.get("auc_ci")
        between = f"  ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        click.echo(f"AUC {name:<19} {'none' if auc is None else f'{auc:.4f}'}{between}")
    for where in ("predictions", "truth"):
        studies = metrics[f"only_in_{where}"]
        click.echo(f"only in the {where:<11} {len(studies)}")
        _list(studies)
    if run := metrics.get("run"):
        click.echo(f"without an answer       {run['num_failed']}")
        _list([f"{study}: {reason}" for study, reason in run["failures"].items()])
    for warning in metrics["warnings"]:
        click.echo(f"Note: {warning}")
    click.echo(f"Written: {out / 'metrics.json'}, {out / 'report.html'}")


def _list(lines: list[str]) -> None:
    for line in lines[:_MAX_NAMED]:
        click.echo(f"  {line}")
    if len(lines) > _MAX_NAMED:
        click.echo(f"  and {len(lines) - _MAX_NAMED} more, named in metrics.json")
