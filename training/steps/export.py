"""Everything that was trained as one bundle: the folds' fracture and study networks answer together in it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bundle import (
    Bundle,
    ClassifySettings,
    Networks,
    RegionSettings,
    StudySettings,
    TrainingData,
    write_bundle,
)
from model.calibrate import Challenge, Platt
from model.findings import ModelInfo
from model.levels import LEVELS
from training.rsna import Cache, cut_settings
from training.steps import classify, regions, segment, study
from training.steps.calibrate import answers_fingerprints
from training.steps.run import StepError, folds_of, read_options, read_result


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """name, version: of the model. data_name, licence: of what it was trained on; trained_on: a sentence on it, shown
    wherever the model's numbers are shown."""

    name: str
    version: str
    data_name: str
    licence: str
    trained_on: str


def export(cache_folder: Path, work: Path, out: Path, plan: ExportPlan) -> Bundle:
    """Writes the bundle of all finished folds to `out`, with what they measured on studies they had not seen.

    Vertebra and region network are those of the first fold: an ensemble of them costs more than it gains.
    """
    folds = folds_of(work, "study")
    fitted = read_calibration(work)
    if fitted.get("made_from") != answers_fingerprints(cache_folder, work):
        raise StepError(
            f"{work / 'calibrate'} was fitted to other networks than there are now. Run `cspine-train calibrate` again."
        )
    unet, segment_plan = segment.trained_network(work, folds_of(work, "segment")[0])
    classified = [classify.trained_network(work, fold) for fold in folds]
    fracture_nets, classify_plan = tuple(network for network, _ in classified), classified[0][1]
    num_features = 2 * classify_plan.num_hidden
    studied = [study.trained_network(work, fold, num_features) for fold in folds]
    region_fold = folds_of(work, "regions")[0]
    region_options = read_options(work, "regions", region_fold)
    cut = cut_settings(Cache.open(cache_folder), classify_plan.cut)
    level_point = fitted["level_operating_point"]
    bundle = Bundle(
        folder=out,
        info=ModelInfo(
            name=plan.name,
            version=plan.version,
            trained_on=plan.trained_on,
            operating_point=fitted["patient_operating_point"],
            level_operating_points=dict.fromkeys(LEVELS, level_point),
        ),
        segment=segment_plan.settings(),
        classify=ClassifySettings(
            encoder=classify_plan.encoder,
            num_hidden=classify_plan.num_hidden,
            num_heads=classify_plan.num_heads,
            num_layers=classify_plan.num_layers,
            num_slices=cut.num_slices,
            num_pixels=cut.num_pixels,
            pixel_mm=cut.pixel_mm,
            region_threshold=region_options["threshold"],
            mirrored=classify_plan.mirrored,
        ),
        num_folds=len(folds),
        study=StudySettings(num_hidden=studied[0][1].num_hidden),
        regions=RegionSettings(encoder=region_options["encoder"], weight=fitted["region_weight"]),
        calibration={output: Platt(**numbers) for output, numbers in fitted["platt"].items()},
        challenge=Challenge(
            platt={output: Platt(**numbers) for output, numbers in fitted["challenge"]["platt"].items()},
            undetermined=fitted["challenge"]["undetermined"],
        ),
        training_data=(
            TrainingData(name=plan.data_name, licence=plan.licence, use="training, and by folds calibration"),
        ),
        metrics=metrics(work, folds),
    )
    networks = Networks(
        unet=unet,
        fracture_nets=fracture_nets,
        study_nets=tuple(network for network, _ in studied),
        region_net=regions.trained_network(work, region_fold),
    )
    write_bundle(bundle, networks)
    return bundle


def read_calibration(work: Path) -> dict[str, Any]:
    """What `calibrate` fitted.

    Raises:
        StepError: it has not been run.
    """
    path = work / "calibrate" / "calibration.json"
    if not path.exists():
        raise StepError(f"{path} is missing. Run `cspine-train calibrate` first, with the same --work.")
    fitted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fitted


def metrics(work: Path, folds: list[int]) -> dict[str, Any]:
    """The results of all steps, each beside its constants."""
    steps = {
        step: {f"fold{fold}": read_result(work, step, fold) for fold in folds_of(work, step)}
        for step in ("segment", "regions", "classify", "study")
    }
    calibrated = json.loads((work / "calibrate" / "result.json").read_text(encoding="utf-8"))
    of_one = "calibration and held_out are of one fold's network at a time; this bundle averages"
    return {"held_out": calibrated, "folds": folds, "note": f"{of_one} {len(folds)}.", **steps}
