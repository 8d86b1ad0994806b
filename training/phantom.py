"""How the shipped model is made, from nothing but the phantom: the story, start to end.

`cspine-train phantom` calls it. Every number that shapes the model is here or in `vertebrae.py`, `fractures.py`
and `stack_changes.py`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bundle import Bundle, ClassifySettings, Networks, SegmentSettings, TrainingData, write_bundle
from model.findings import ModelInfo
from model.networks import FractureNet, VertebraUNet
from model.pipeline import load_pipeline
from training.fractures import train_fracture_net
from training.phantom_measures import auc, choose_operating_point, evaluate, stack_logits, summarise
from training.samples import write_all, write_neck, write_stacks
from training.vertebrae import train_unet

logger = logging.getLogger(__name__)

SEGMENT = SegmentSettings(channels=(8, 24, 48, 80, 96), spacing_mm=2.5)
CLASSIFY = ClassifySettings(
    encoder="residual-24-48-96-128", num_hidden=64, num_slices=15, num_pixels=96, pixel_mm=0.9, region_threshold=0.5
)
TRAINED_ON = (
    "Trained only on procedurally generated phantoms, never on patients: probabilities are not valid for real necks."
)
TRAINING_DATA = TrainingData(
    name="phantoms of model/phantom, drawn by seed",
    licence="MIT, as this repository",
    use="training, operating point and measurement, of different seeds",
)
VERSION = "0.1.0"

FIRST_SEED, FIRST_UNSEEN_SEED = 1_000, 900_000
"""Training patients are drawn from the first on; those that judge the finished model from the second on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of everything. num_held_out: patients drawn but not trained on; they set the operating point."""

    num_patients: int
    num_held_out: int
    num_segment_steps: int
    num_patch_steps: int
    num_stack_steps: int
    batch_size: int
    num_evaluated: int
    num_workers: int


def train_phantom_bundle(out: Path, work: Path, plan: Plan) -> Bundle:
    """Draws patients, trains both networks, chooses the operating point, exports to `out` and measures the result.

    work: folder for the drawn patients; a later run uses them again. Empty its `stacks` after a change to the U-Net.
    """
    # 1. Draw imaginary necks, once.
    seeds = range(FIRST_SEED, FIRST_SEED + plan.num_patients + plan.num_held_out)
    necks = []
    for path in write_all(write_neck, work / "necks", seeds[: plan.num_patients], plan.num_workers, SEGMENT):
        necks.append(path)
        _say("drew necks", len(necks), plan.num_patients)

    # 2. The vertebra U-Net learns where vertebrae are and which is which.
    torch.set_num_threads(plan.num_workers)
    torch.manual_seed(0)
    unet = VertebraUNet(SEGMENT.channels)
    for step, loss in train_unet(unet, necks, num_steps=plan.num_segment_steps, seed=1):
        _say("vertebra U-Net", step, plan.num_segment_steps, loss)

    # 3. Cut each patient's vertebrae as that U-Net finds them: its mistakes are what the fracture network must bear.
    stacks = []
    for path in write_all(write_stacks, work / "stacks", seeds, plan.num_workers, SEGMENT, CLASSIFY, unet):
        stacks.append(path)
        _say("cut vertebrae of patients", len(stacks), len(seeds))
    seen, held_out = stacks[: plan.num_patients], stacks[plan.num_patients :]

    # 4. The fracture network learns what is broken, and where.
    fracture_net = FractureNet(CLASSIFY.encoder, CLASSIFY.num_hidden)
    steps = train_fracture_net(
        fracture_net,
        seen,
        num_patch_steps=plan.num_patch_steps,
        num_stack_steps=plan.num_stack_steps,
        batch_size=plan.batch_size,
        seed=2,
    )
    for step, loss in steps:
        _say("fracture network", step, plan.num_patch_steps + plan.num_stack_steps, loss)

    # 5. Patients it was not trained on say where "present" begins.
    logits, truths = stack_logits(fracture_net, held_out)
    operating_point = choose_operating_point(logits, truths)
    metrics: dict[str, Any] = {
        "held_out_stacks": {
            "num_vertebrae": len(truths),
            "num_fractured": int(truths.sum()),
            "vertebra_auc": round(auc(logits, truths), 4),
        }
    }

    # 6. Export, then measure the exported thing itself, whole necks in and findings out.
    bundle = Bundle(
        folder=out,
        info=ModelInfo(
            name="cspine-phantom",
            version=VERSION,
            trained_on=TRAINED_ON,
            operating_point=round(operating_point, 3),
        ),
        segment=SEGMENT,
        classify=CLASSIFY,
        training_data=(TRAINING_DATA,),
        metrics=metrics,
    )
    networks = Networks(unet=unet, fracture_nets=(fracture_net,))
    write_bundle(bundle, networks)
    if plan.num_evaluated:
        metrics["unseen_phantoms"] = measure(out, work / "evaluation.json", plan.num_evaluated)
        write_bundle(bundle, networks)
    return bundle


def measure(folder: Path, report: Path, num_phantoms: int) -> dict[str, object]:
    """The bundle in `folder` on phantoms nobody trained on; every case goes into `report` (JSON)."""
    pipeline = load_pipeline(folder, device="cpu")
    cases = []
    for case in evaluate(pipeline, range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + num_phantoms)):
        cases.append(case)
        logger.info("phantom %d: mean Dice %.3f", case["seed"], float(np.mean(case["dice"])))
    summary = summarise(cases)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps({"summary": summary, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    return summary


def _say(what: str, done: int, of: int, loss: float | None = None) -> None:
    """A line of progress, every 25 steps."""
    if done % 25 == 0:
        logger.info("%s: %d of %d%s", what, done, of, "" if loss is None else f", loss {loss:.3f}")
