"""Analysis of one Series: files in, result folder out. The straight line that `cspine analyze` and the worker share."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model import Analysis, DecodePool, Findings, ModelInfo, SeriesRules, Volume, read_series
from node.encode import NodeIdentity, ResultObject, encode_results
from node.process import sync
from node.profiles import Profile

if TYPE_CHECKING:
    from model.pipeline import Pipeline

FINDINGS_FILE = "findings.json"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was written for a Series: the folder, the findings, and the DICOM objects in it."""

    folder: Path
    findings: Findings
    objects: tuple[ResultObject, ...]


def analyse_series(
    paths: Sequence[Path],
    folder: Path,
    pipeline: "Pipeline",
    rules: SeriesRules,
    node: NodeIdentity,
    profiles: Collection[Profile] = (Profile(),),
    decode_pool: DecodePool | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Results:
    """Reads the Series, runs the model, and writes findings.json and the DICOM objects into `folder`.

    The folder appears whole or not at all: it is written under another name beside its place, synced and renamed. One
    that is there already is replaced. profiles: what the destinations want between them. decode_pool: for
    `read_series`. on_stage: called with "read", "segment", "classify" and "encode" as each begins.

    Raises:
        SeriesError: the Series cannot be analysed.
        OSError: the folder cannot be written.
    """
    begin = on_stage or (lambda stage: None)
    started = time.perf_counter()
    begin("read")
    volume = read_series(paths, rules, decode_pool)
    read_s = time.perf_counter() - started
    analysis = pipeline.analyse(volume, on_stage=on_stage)

    begin("encode")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    encode_started = time.perf_counter()
    objects = encode_results(analysis, volume, draft, node=node, profiles=profiles)
    ended = time.perf_counter()
    timings_s = {"read": read_s, **analysis.findings.timings_s, "encode": ended - encode_started}
    findings = _complete(analysis, volume, timings_s | {"total": ended - started})
    (draft / FINDINGS_FILE).write_text(json.dumps(findings.to_dict(), indent=2) + "\n", encoding="utf-8")
    _publish(draft, folder)
    return Results(
        folder=folder,
        findings=findings,
        objects=tuple(replace(made, path=folder / made.path.name) for made in objects),
    )


def result_folder_name(sop_instance_uids: Sequence[str], model: ModelInfo) -> str:
    """A name that is the same for the same set of Instances and the same model, and for nothing else."""
    text = "\n".join([model.name, model.version, *sorted(set(sop_instance_uids))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _complete(analysis: Analysis, volume: Volume, timings_s: dict[str, float]) -> Findings:
    rounded = {stage: round(seconds, 3) for stage, seconds in timings_s.items()}
    return replace(analysis.findings, timings_s=rounded)


def _publish(draft: Path, folder: Path) -> None:
    """Gives the draft its name, safely on disk."""
    for path in (*draft.iterdir(), draft):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    sync(folder.parent)
