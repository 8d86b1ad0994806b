"""Analysis of one Series: files in, result folder out. The straight line that `cspine analyze` and the worker share."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model import DecodePool, Findings, ModelInfo, SeriesRules, read_series
from node.encode import NodeIdentity, ResultObject, encode_refusal, encode_results
from node.process import sync
from node.profiles import FINDINGS_FILE, Profile

if TYPE_CHECKING:
    from model.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was written for a Series: the folder, the findings, and the DICOM objects in it.

    incomplete: why Instances are, or may be, missing; "" if nothing tells so. It is among the warnings of the findings.
    """

    folder: Path
    findings: Findings
    objects: tuple[ResultObject, ...]
    incomplete: str


def analyse_series(
    paths: Sequence[Path],
    folder: Path,
    pipeline: "Pipeline",
    rules: SeriesRules,
    node: NodeIdentity,
    profiles: Collection[Profile] = (Profile(),),
    decode_pool: DecodePool | None = None,
    on_stage: Callable[[str], None] | None = None,
    previous_dir: Path | None = None,
    num_at_source: int | None = None,
    is_interrupted: bool = False,
) -> Results:
    """Reads the Series, runs the model, and writes findings.json and the DICOM objects into `folder`.

    The folder appears whole or not at all: it is written under another name beside its place, synced and renamed. One
    that is there already is replaced. profiles: what the destinations want between them. decode_pool: for
    `read_series`. on_stage: called with "read", "segment", "classify" and "encode" as each begins. previous_dir: folder
    of earlier results of the Series, which these supersede. num_at_source, is_interrupted: for
    `read_series`.

    Raises:
        SeriesError: the Series cannot be analysed.
        OSError: the folder cannot be written.
    """
    begin = on_stage or (lambda stage: None)
    started = time.perf_counter()
    begin("read")
    volume = read_series(paths, rules, decode_pool, num_at_source, is_interrupted=is_interrupted)
    read_s = time.perf_counter() - started
    analysis = pipeline.analyse(volume, on_stage=on_stage)

    begin("encode")
    draft = _draft(folder)
    encode_started = time.perf_counter()
    objects = encode_results(analysis, volume, draft, node=node, profiles=profiles, previous_dir=previous_dir)
    ended = time.perf_counter()
    timings_s = {"read": read_s, **analysis.findings.timings_s, "encode": ended - encode_started}
    rounded_s = {stage: round(seconds, 3) for stage, seconds in (timings_s | {"total": ended - started}).items()}
    findings = replace(analysis.findings, timings_s=rounded_s)
    (draft / FINDINGS_FILE).write_text(json.dumps(findings.to_dict(), indent=2) + "\n", encoding="utf-8")
    _publish(draft, folder)
    return Results(folder=folder, findings=findings, objects=_in_folder(objects, folder), incomplete=volume.incomplete)


def report_refusal(
    paths: Sequence[Path],
    folder: Path,
    reason: str,
    model: ModelInfo,
    node: NodeIdentity,
    profiles: Collection[Profile] = (Profile(),),
    previous_dir: Path | None = None,
) -> tuple[ResultObject, ...]:
    """Writes the reports that a Series was not analysed, and why, into `folder`, which appears whole or not at all.

    Raises:
        OSError: a file cannot be read, or the folder cannot be written.
    """
    draft = _draft(folder)
    objects = encode_refusal(reason, paths, draft, model=model, node=node, profiles=profiles, previous_dir=previous_dir)
    _publish(draft, folder)
    return _in_folder(objects, folder)


def result_folder_name(sop_instance_uids: Sequence[str], model: ModelInfo, refusal: str = "") -> str:
    """A name that is the same for the same set of Instances, model and reason to refuse them, and for nothing else."""
    text = "\n".join([model.name, model.version, *sorted(set(sop_instance_uids)), *([refusal] if refusal else [])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _draft(folder: Path) -> Path:
    """An empty folder beside its place."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _in_folder(objects: Sequence[ResultObject], folder: Path) -> tuple[ResultObject, ...]:
    return tuple(replace(made, path=folder / made.path.name) for made in objects)


def _publish(draft: Path, folder: Path) -> None:
    """Gives the draft its name, safely on disk."""
    for path in (*draft.iterdir(), draft):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    sync(folder.parent)
