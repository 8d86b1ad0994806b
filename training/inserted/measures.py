"""Measures a whole pipeline on a real volume: as it is, and with fractures put in that nobody but us knows of."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.findings import Analysis, Finding, LevelFinding
from model.levels import LEVELS
from model.pipeline import Pipeline
from model.volume import Volume
from training.evaluation import roc_auc
from training.evaluation.masks import attention_alignment
from training.inserted.insertion import Inserted, InsertedFracture, insert

HIT_MM = 2.0
"""A region that is shown this near to the fracture has hit it."""

_HOW_MANY = (0.5, 0.35, 0.15)
"""How often one, two or three levels are broken at a time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the pipeline said of one vertebra in one volume.

    fractures: what was put in; () for an intact one. is_untouched: of the volume as it came. attention: share of the
    attention on slices with the fracture in them; attention_by_chance: what even attention would give; None where none
    of the slices looked at has a fracture. hit: a region is shown at the fracture; None where none was called.
    """

    level: str
    probability: float
    called: bool
    fractures: tuple[InsertedFracture, ...]
    is_untouched: bool
    attention: float | None = None
    attention_by_chance: float | None = None
    hit: bool | None = None


def measure_on_inserted(
    pipeline: Pipeline,
    volume: Volume,
    rng: np.random.Generator,
    num: int,
    *,
    negatives: float = 0.0,
    reuse_masks: bool = False,
) -> list[Outcome]:
    """Outcomes of the untouched volume, and of `num` copies of it with one to three levels broken.

    Vertebrae that the pipeline leaves undetermined, or that are not whole in its masks, are left out: count them
    elsewhere. negatives: see `insert`. reuse_masks: judge on the masks of the untouched volume, which is faster but
    leaves out what fractures do to the masks.
    """
    labels, vertebrae = pipeline.segment(volume)
    untouched = pipeline.judge(volume, labels, vertebrae)
    outcomes = [
        outcome
        for name, level in untouched.findings.levels.items()
        if (outcome := _outcome(name, level, (), is_untouched=True)) is not None
    ]
    present = sorted({LEVELS.index(outcome.level) + 1 for outcome in outcomes})
    for _ in range(num if present else 0):
        count = min(1 + int(rng.choice(3, p=_HOW_MANY)), len(present))
        levels = [int(label) for label in rng.choice(present, count, replace=False)]
        inserted = insert(volume.voxels_hu, labels, volume.grid, rng, levels=levels, negatives=negatives)
        changed = replace(volume, voxels_hu=inserted.voxels_hu)
        analysis = pipeline.judge(changed, labels, vertebrae) if reuse_masks else pipeline.analyse(changed)
        outcomes += _outcomes(analysis, inserted, volume)
    return outcomes


def _outcomes(analysis: Analysis, inserted: Inserted, volume: Volume) -> list[Outcome]:
    # From the end, so that an Instance that also stands for an interpolated slice means its own.
    numbered = reversed(list(enumerate(volume.slices)))
    index = {(source.sop_instance_uid, source.frame_number): z for z, source in numbered}
    outcomes = []
    for label in inserted.eligible:
        name = LEVELS[label - 1]
        level = analysis.findings.levels[name]
        fractures = tuple(fracture for fracture in inserted.fractures if fracture.level == name)
        outcome = _outcome(name, level, fractures, is_untouched=False)
        if outcome is not None and fractures:
            slices = np.flatnonzero((inserted.regions == label).any(axis=(1, 2)))
            weights = {index[weight.sop_instance_uid, weight.frame_number]: weight.weight for weight in level.attention}
            alignment = attention_alignment(weights, set(slices.tolist()))
            outcome = replace(
                outcome,
                attention=alignment and alignment[0],
                attention_by_chance=alignment and alignment[1],
                hit=_hit(analysis.fractures, inserted.regions, label, volume) if outcome.called else None,
            )
        if outcome is not None:
            outcomes.append(outcome)
    return outcomes


def _outcome(
    name: str, level: LevelFinding, fractures: tuple[InsertedFracture, ...], *, is_untouched: bool
) -> Outcome | None:
    if level.probability is None or level.finding is Finding.UNDETERMINED:
        return None
    return Outcome(
        level=name,
        probability=level.probability,
        called=level.finding is Finding.PRESENT,
        fractures=fractures,
        is_untouched=is_untouched,
    )


def _hit(shown: NDArray[np.uint8], regions: NDArray[np.uint8], label: int, volume: Volume) -> bool:
    """Whether a shown region of this level comes within HIT_MM of the inserted one."""
    (box,) = ndimage.find_objects((regions == label).astype(np.uint8))
    reach = [int(np.ceil(HIT_MM / spacing)) for spacing in volume.grid.spacing_mm]
    wide = tuple(slice(max(0, side.start - n), side.stop + n) for side, n in zip(box, reach, strict=True))
    away_mm = ndimage.distance_transform_edt(regions[wide] != label, sampling=volume.grid.spacing_mm)
    return bool(((shown[wide] == label) & (away_mm <= HIT_MM)).any())


def summarise_inserted(outcomes: list[Outcome]) -> dict[str, Any]:
    """The outcomes of any number of volumes in a dozen numbers.

    Inserted fractures against the untouched vertebrae; specificity on these, and on the intact ones (with their hard
    negatives, if any) of the changed volumes. `by_kind`: sensitivity.
    """
    untouched = [outcome for outcome in outcomes if outcome.is_untouched]
    broken = [outcome for outcome in outcomes if outcome.fractures]
    beside = [outcome for outcome in outcomes if not outcome.is_untouched and not outcome.fractures]
    summary: dict[str, Any] = {"num_untouched": len(untouched), "num_broken": len(broken)}
    if not untouched or not broken:
        return summary
    scores = np.array([outcome.probability for outcome in (*broken, *untouched)])
    truths = np.arange(len(scores)) < len(broken)
    kinds = sorted({fracture.kind for outcome in broken for fracture in outcome.fractures})
    summary |= {
        "vertebra_auc": round(roc_auc(truths, scores), 4),
        "vertebra_sensitivity": _share(outcome.called for outcome in broken),
        "vertebra_specificity": _share(not outcome.called for outcome in untouched),
        "specificity_beside_fractures": _share(not outcome.called for outcome in beside),
        "attention_on_fracture": _share(outcome.attention for outcome in broken),
        "attention_by_chance": _share(outcome.attention_by_chance for outcome in broken),
        "region_hits": _share(outcome.hit for outcome in broken),
        "by_kind": {
            kind: _share(o.called for o in broken if kind in {fracture.kind for fracture in o.fractures})
            for kind in kinds
        },
    }
    return summary


def _share(values: Iterable[float | None]) -> float | None:
    """The mean; None of nothing."""
    known = [float(value) for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None
