"""`cspine-train export`: one bundle of everything that was trained."""

from pathlib import Path
from typing import Any

import click

from training.commands.run_options import CACHE_AND_WORK, FOLDER, echo

RSNA = "RSNA 2022 Cervical Spine Fracture Detection"


@click.command()
@CACHE_AND_WORK[0]
@CACHE_AND_WORK[1]
@click.option("--out", type=FOLDER, required=True, help="Folder for the bundle.")
@click.option("--name", default="cspine-rsna", show_default=True, help="Of the model.")
@click.option("--model-version", "version", default="0.1.0", show_default=True)
@click.option("--data", "data_name", default=RSNA, show_default=True, help="What it was trained on.")
@click.option(
    "--licence", default="non-commercial research", show_default=True, help="Of that data, and so of the model."
)
@click.option(
    "--trained-on",
    default=f"Trained on {RSNA}; for non-commercial research only.",
    show_default=True,
    help="A sentence that is shown wherever the model's numbers are.",
)
def export(cache: Path, work: Path, out: Path, **plan: Any) -> None:
    """Write one bundle: all finished folds together, calibrated, with their metrics."""
    from training.steps.export import ExportPlan
    from training.steps.export import export as write

    def metrics() -> dict[str, Any]:
        held_out: dict[str, Any] = write(cache, work, out, ExportPlan(**plan)).metrics["held_out"]
        return held_out

    echo(metrics)
