"""Runs a model over a folder shaped like the challenge's data, and keeps what it said, Study by Study.

What a Study gave is a file of its own, written at once, so that a run that was stopped goes on where it was. Measures
single Studies only: overlap of masks, alignment of attention, seconds. `training.rsna` reads the folder.
"""

import json
import logging
import resource
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import LEVELS, PARSE_ERRORS, Analysis, SeriesError, Volume, load_pipeline, read_bundle
from model.pipeline import Pipeline
from training.evaluation.masks import attention_alignment, measure_masks
from training.evaluation.tables import OVERALL, InputError
from training.files import replacing_file
from training.rsna import MaskError, Source, SourceStudy, dicom_files, read_mask, read_volume, source_fingerprint

logger = logging.getLogger(__name__)

_REASONS = (SeriesError, OSError, RuntimeError, *PARSE_ERRORS)
"""What one Study may fail with, so that the others go on."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a model said of a folder. answers: by Study, see `_answer`; failures: by Study, why it has none."""

    model: dict[str, str]
    answers: dict[str, dict[str, Any]]
    failures: dict[str, str]


def run_model(
    bundle: Path | None, source: Source, out: Path, *, only: Collection[str] | None = None, device: str = "auto"
) -> Run:
    """What the model says of every Study of the folder; a Study whose answer lies in `out` is not run again, unless its
    files, mask, boxes or labels have changed since.

    bundle: None takes the one that comes with the package. only: these Studies; None all. A Study that cannot be
    analysed is logged and named with its reason, and tried again the next time.

    Raises:
        InputError: `out` holds answers of another model, no Study is there or answered, or there is no such device.
        BundleError: the bundle is missing, damaged or of another architecture.
    """
    description = describe(bundle)
    studies = [study for uid, study in source.studies.items() if only is None or uid in only]
    if not studies:
        raise InputError(
            f"None of the {len(only or ())} Studies asked for is among the {len(source.studies)} of {source.folder}. "
            "Check that the two belong together."
        )
    kept, failures = dict(_kept(out, description)), {}
    answers = {
        study.study_instance_uid: answer
        for study in studies
        if (answer := kept.get(study.study_instance_uid)) and answer.get("made_from") == _made_from(study)
    }
    waiting = [study for study in studies if study.study_instance_uid not in answers]
    if waiting:
        try:
            pipeline = load_pipeline(bundle, device)
        except ValueError as error:
            raise InputError(str(error)) from error
    for number, study in enumerate(waiting, start=1):
        uid = study.study_instance_uid
        try:
            answers[uid] = _answer(pipeline, study)
        except _REASONS as error:
            failures[uid] = str(error) or type(error).__name__
            logger.warning("%d of %d: Study %s has no answer: %s", number, len(waiting), uid, failures[uid])
            continue
        with replacing_file(_path(out, uid)) as path:
            path.write_text(json.dumps({"model": description, **answers[uid]}), encoding="utf-8")
        logger.info("%d of %d: Study %s, %.1f s", number, len(waiting), uid, answers[uid]["seconds"]["all"])
    if not answers:
        reasons = "".join(f"\n  {uid}: {reason}" for uid, reason in list(failures.items())[:5])
        raise InputError(f"None of the {len(studies)} Studies of {source.folder} has an answer.{reasons}")
    return Run(model=description, answers=answers, failures=failures)


def describe(bundle: Path | None) -> dict[str, str]:
    """Which model it is: name, version, what it was trained on, and the sha256 of its bundle.json, which names all."""
    read = read_bundle(bundle)
    return {
        "name": read.info.name,
        "version": read.info.version,
        "trained_on": read.info.trained_on,
        "sha256": read.digest(),
    }


def _name(model: dict[str, str]) -> str:
    return f"{model['name']} {model['version']} (bundle.json {model['sha256'][:12]}…)"


def _path(out: Path, uid: str) -> Path:
    return out / "studies" / f"{uid}.json"


def _kept(out: Path, description: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Studies answered before, by this model."""
    for path in sorted((out / "studies").glob("*.json")):
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))
            model = answer.pop("model")
        except (ValueError, KeyError, AttributeError, TypeError):
            logger.warning("%s is damaged: Study %s is analysed again", path, path.stem)
            continue
        if model != description:
            raise InputError(
                f"{path} holds an answer of {_name(model)}, and the model to run is {_name(description)}. Choose "
                "another --out, or remove that folder."
            )
        yield path.stem, answer


def _made_from(study: SourceStudy) -> str:
    """Of all that an answer and what is measured of it rest on, beside the model."""
    return source_fingerprint(study, dicom_files(study.files), {})


def _answer(pipeline: Pipeline, study: SourceStudy) -> dict[str, Any]:
    """What the model says of one Study, beside what its mask and boxes say, ready for JSON."""
    started = time.perf_counter()
    files = dicom_files(study.files)
    if not files:
        raise SeriesError(f"There are no files in {study.files}.")
    volume = read_volume(files)
    read = time.perf_counter()
    analysis = pipeline.analyse(volume)
    done = time.perf_counter()
    number_of = {each.sop_instance_uid: int(each.path.stem) for each in volume.slices if each.path.stem.isdigit()}
    levels, challenge = analysis.findings.levels, pipeline.bundle.challenge
    regions = [
        [region.x, region.y, region.width, region.height, number_of[region.sop_instance_uid], level.probability]
        for level in levels.values()
        for region in level.regions
        if region.sop_instance_uid in number_of
    ]
    return {
        "made_from": _made_from(study),
        "probabilities": {
            OVERALL: analysis.findings.patient_overall.probability,
            **{name: levels[name].probability for name in LEVELS},
        },
        "challenge": challenge.row(analysis.logits) if challenge else None,
        "regions": regions,
        "alignment": _alignment(analysis, study, number_of),
        "masks": _masks(analysis, study, volume),
        "warnings": list(analysis.findings.warnings),
        "num_slices": len(volume.slices),
        "seconds": {"read": read - started, "analyse": done - read, "all": done - started},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": str(pipeline.device),
    }


def _alignment(analysis: Analysis, study: SourceStudy, number_of: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Of each truly fractured level with boxes in its slices: share of attention there, and of even attention."""
    boxed = {box.slice_number for box in study.boxes}
    found = {}
    for name, level in analysis.findings.levels.items():
        weights: dict[int, float] = {}
        for each in level.attention if study.labels.get(name) else ():
            number = number_of.get(each.sop_instance_uid)
            if number is not None:
                weights[number] = weights.get(number, 0.0) + each.weight
        aligned = attention_alignment(weights, boxed)
        if aligned:
            found[name] = aligned
    return found


def _masks(analysis: Analysis, study: SourceStudy, volume: Volume) -> dict[str, Any] | None:
    """The vertebrae drawn against the Study's mask; None without one, `problem` where it cannot be used."""
    if study.mask is None:
        return None
    try:
        true = read_mask(study.mask, volume).labels
    except MaskError as error:
        return {"problem": str(error)}
    true[true > len(LEVELS)] = 0
    return measure_masks(true, analysis.vertebrae, volume.grid)
