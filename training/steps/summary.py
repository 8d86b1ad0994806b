"""What each step measured on studies it had not seen, beside constants: the last word of `all`."""

import json
from pathlib import Path
from typing import Any

from training.files import replacing_file
from training.steps.run import mean

FIGURES = (
    ("segment", "cross-entropy of bone", "crops.cross_entropy", "constants.cross_entropy", "lower"),
    ("segment", "error of the level", "crops.level_error", "constants.level_error", "lower"),
    (
        "regions",
        "average precision of pixels",
        "pixel_average_precision",
        "constants.pixel_average_precision",
        "higher",
    ),
    ("regions", "Dice", "dice", "constants.dice", "higher"),
    ("regions", "AUC of vertebrae", "vertebra_auc", "constants.vertebra_auc", "higher"),
    ("classify", "cross-entropy", "cross_entropy", "constants.cross_entropy", "lower"),
    ("classify", "AUC of vertebrae", "auc", "constants.auc", "higher"),
    ("study", "weighted log loss", "weighted_log_loss", "constants.best_constants", "lower"),
    ("calibrate", "weighted log loss", "weighted_log_loss", "constants.weighted_log_loss", "lower"),
    (
        "calibrate",
        "cross-entropy of levels",
        "calibrated.levels.cross_entropy",
        "constants.levels.cross_entropy",
        "lower",
    ),
)
"""Step, name, where the figure and its constant stand in `result.json`, and which way is better."""


def summarise(work: Path) -> str:
    """A line for each figure, means over the finished folds; also written to `WORK/summary.txt`."""
    lines = []
    for step, name, figure, constant, better in FIGURES:
        paths = sorted((work / step).glob("result.json")) or sorted((work / step).glob("fold*/result.json"))
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        pairs = [(_at(result, figure), _at(result, constant)) for result in results]
        known = [(value, limit) for value, limit in pairs if value is not None and limit is not None]
        if not known:
            lines.append(f"{step:<10} {name:<28} not measured")
            continue
        value, limit = (mean(side) for side in zip(*known, strict=True))
        is_better = value < limit if better == "lower" else value > limit
        lines.append(
            f"{step:<10} {name:<28} {value:7.4f}  constants {limit:7.4f}  "
            f"{'better' if is_better else 'NO BETTER'}, {better} is; of {len(known)}"
        )
    text = "\n".join(lines) + "\n"
    with replacing_file(work / "summary.txt") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return text


def _at(result: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        result = result[key]
    return result
