"""How a training step is run, and where its files lie. No torch here: the command line reads it too."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.files import write_json

WHERE_ONLY = ("cache", "work", "num_workers", "devices", "num_nodes", "strategy", "fresh")
"""Options that say where and how fast, not what comes out: a run may go on with others."""


class StepError(Exception):
    """A step that cannot be run as asked; one sentence that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Options that every training step has; what it trains is in options of its own.

    fold: held out. num_draws: training samples in an epoch, over all devices. batch_size: on each device.
    devices, num_nodes, strategy, precision: as `lightning.Trainer` takes them; precision "auto" is bf16 or fp16 on a
    GPU and 32 bits on a CPU. fresh: begin again, though there is a checkpoint.
    """

    cache: Path
    work: Path
    fold: int
    seed: int
    num_epochs: int
    num_draws: int
    batch_size: int
    learning_rate: float
    num_workers: int
    devices: str
    num_nodes: int
    strategy: str
    precision: str
    fresh: bool

    def begin(self, step: str, **settings: Any) -> Path:
        """The folder of this step and fold; what it was begun with must be what it is called with.

        Raises:
            StepError: it was begun with other options.
        """
        folder = fold_folder(self.work, step, self.fold)
        kept = {name: value for name, value in asdict(self).items() if name not in WHERE_ONLY}
        kept["patients_of_folds"] = folds_digest(self.cache)
        # Through JSON, so that tuples are lists on both sides.
        options = json.loads(json.dumps(kept | settings))
        path = folder / "options.json"
        if not is_first_process():
            return folder
        if self.fresh and folder.exists():
            shutil.rmtree(folder)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(name for name in before.keys() | options.keys() if before.get(name) != options.get(name))
            if changed:
                listed = ", ".join(f"{name} {before.get(name)!r}, now {options.get(name)!r}" for name in changed)
                raise StepError(
                    f"{folder} was begun with other options: {listed}. Give the same to go on, --fresh to begin again, "
                    "or another --work."
                )
        write_json(path, options)
        return folder


def folds_digest(cache: Path) -> str | None:
    """Which study is in which fold, in a few letters: one more study deals many patients to other folds.

    None where there is no finished cache, which the step will say itself.
    """
    try:
        folds = json.loads((cache / "cache.json").read_text(encoding="utf-8"))["folds"]
    except (OSError, ValueError, KeyError):
        return None
    return hashlib.sha256(json.dumps(folds, sort_keys=True).encode()).hexdigest()[:12]


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of many: the one that writes what all share.

    Lightning, torchrun and SLURM each tell the others so before anything is trained.
    """
    names = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def fold_folder(work: Path, step: str, fold: int) -> Path:
    """Where a step keeps a fold's checkpoints, curves, weights and result."""
    return work / step / f"fold{fold}"


def folds_of(work: Path, step: str) -> list[int]:
    """The folds for which a step has come to its end, in order.

    Raises:
        StepError: there is none.
    """
    done = sorted(int(path.parent.name.removeprefix("fold")) for path in (work / step).glob("fold*/result.json"))
    if not done:
        raise StepError(f"No finished fold in {work / step}. Run `cspine-train {step}` first, with the same --work.")
    return done


def read_options(work: Path, step: str, fold: int) -> dict[str, Any]:
    """What a finished step was trained with.

    Raises:
        StepError: it is not finished.
    """
    folder = fold_folder(work, step, fold)
    if not (folder / "result.json").exists():
        raise StepError(
            f"{folder} holds no result. Run `cspine-train {step} --fold {fold}` first, with the same --work."
        )
    return json.loads((folder / "options.json").read_text(encoding="utf-8"))


def read_result(work: Path, step: str, fold: int) -> dict[str, Any]:
    """The `result.json` of a finished step."""
    read_options(work, step, fold)
    return json.loads((fold_folder(work, step, fold) / "result.json").read_text(encoding="utf-8"))


def mean(values: Any) -> float:
    """Of an array or list; NaN of nothing."""
    return float(sum(values) / len(values)) if len(values) else math.nan


def rounded(value: float) -> float | None:
    """A measure as results have it, four decimals; None where there was nothing to measure."""
    return None if math.isnan(value) else round(float(value), 4)
