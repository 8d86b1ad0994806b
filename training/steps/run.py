"""How a training step is run, and where its files lie. No torch here: the command line reads it too."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsFloat

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

    def begin(self, step: str, *sources: str, **settings: Any) -> Path:
        """The folder of this step and fold; what it was begun with and made from must be what there is now.

        sources: what it reads beside the cache, see `fingerprint`.

        Raises:
            StepError: it was begun with other options or made from something else, or a source is not finished.
            CacheError: there is no cache, or no such cut.
        """
        folder = fold_folder(self.work, step, self.fold)
        if self.fresh and folder.exists() and is_started_with_others():
            raise StepError(
                "--fresh cannot be given to processes that start together (torchrun, srun): one would remove what "
                f"another is reading. Remove {folder} and give the command without it."
            )
        kept = {name: value for name, value in asdict(self).items() if name not in WHERE_ONLY}
        if not is_first_process():
            return folder
        made_from = {source: fingerprint(self.cache, self.work, self.fold, source) for source in ("cache", *sources)}
        # Through JSON, so that tuples are lists on both sides.
        options = json.loads(json.dumps(kept | settings | {"made_from": made_from}))
        path = folder / "options.json"
        if self.fresh and folder.exists():
            shutil.rmtree(folder)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if stale := changed_sources(before, made_from):
                raise StepError(f"{folder} {stale} Give --fresh to train it again, or another --work.")
            changed = sorted(name for name in before.keys() | options.keys() if before.get(name) != options.get(name))
            if changed:
                listed = ", ".join(f"{name} {before.get(name)!r}, now {options.get(name)!r}" for name in changed)
                raise StepError(
                    f"{folder} was begun with other options: {listed}. Give the same to go on, --fresh to begin again, "
                    "or another --work."
                )
        write_json(path, options)
        return folder


def fingerprint(cache: Path, work: Path, fold: int, source: str) -> str:
    """Of what a step reads, as it is now: "cache", "cut NAME", or the name of a finished step of the same fold.

    Raises:
        StepError: the step is not finished, or what it was made from has changed since.
        CacheError: there is no finished cache or cut, or the cut is older than its labels.
    """
    from training.rsna import Cache, cut_fingerprint  # here, so that --help does not wait for torch

    if source == "cache":
        return Cache.open(cache).fingerprint
    if source.startswith("cut "):
        return cut_fingerprint(Cache.open(cache), source.removeprefix("cut "))
    require_current(cache, work, fold, source)
    folder = fold_folder(work, source, fold)
    found = hashlib.sha256()
    for path in (folder / "options.json", folder / "result.json", *sorted(folder.rglob("*.safetensors"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def require_current(cache: Path, work: Path, fold: int, step: str) -> None:
    """Refuses a finished step whose sources, or theirs, are no longer what it was made from.

    Raises:
        StepError, CacheError: see `fingerprint`.
    """
    before = read_options(work, step, fold)
    made_from = {source: fingerprint(cache, work, fold, source) for source in before.get("made_from", ["cache"])}
    if stale := changed_sources(before, made_from):
        raise StepError(
            f"{fold_folder(work, step, fold)} {stale} Run `cspine-train {step} --fold {fold}` as before, with --fresh."
        )


def changed_sources(options: dict[str, Any], made_from: dict[str, str]) -> str | None:
    """What has changed since a step was begun with these options, as the end of a sentence; None if nothing has."""
    before = options.get("made_from", {})
    changed = [source for source, now in made_from.items() if before.get(source) != now]
    return f"was made from another {' and another '.join(changed)} than there is now." if changed else None


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of many: the one that writes what all share.

    Lightning, torchrun and SLURM each tell the others so before anything is trained.
    """
    names = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def is_started_with_others() -> bool:
    """Whether torchrun or SLURM started several of this process at the same time; Lightning starts the others later."""
    launchers = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
    return any(int(os.environ.get(count, "1")) > 1 for launcher, count in launchers.items() if launcher in os.environ)


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
    options: dict[str, Any] = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    return options


def read_result(work: Path, step: str, fold: int) -> dict[str, Any]:
    """The `result.json` of a finished step."""
    read_options(work, step, fold)
    result: dict[str, Any] = json.loads((fold_folder(work, step, fold) / "result.json").read_text(encoding="utf-8"))
    return result


def mean(values: Any) -> float:
    """Of an array or list; NaN of nothing."""
    return float(sum(values) / len(values)) if len(values) else math.nan


def rounded(value: SupportsFloat) -> float | None:
    """A measure as results have it, four decimals; None where there was nothing to measure."""
    return None if math.isnan(value) else round(float(value), 4)
