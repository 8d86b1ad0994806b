"""Measures a bundle on necks that no training has seen: real ones without labels, and drawn ones with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.levels import LEVELS
from model.pipeline import Pipeline
from model.volume import SliceSource, Volume
from training.necks.openkbp import RealNeck, read_contours, weak_labels
from training.necks.pseudo import Cut, Profile, canal_coordinates, cut_profile, profile
from training.necks.rounds import coarse_scores, is_believed

TOLERANCE_MM = 3.0
"""How far outside the anchored borders of its level the middle of a body may lie and still carry the right number."""


def real_volume(path: Path) -> Volume:
    """A patient of OpenKBP as the pipeline takes it."""
    patient = read_contours(path)
    return Volume(
        study_instance_uid=patient.name,
        series_instance_uid=patient.name,
        voxels_hu=patient.hu,
        grid=patient.grid,
        slices=tuple(
            SliceSource(sop_instance_uid=f"{patient.name}.{index}", path=path) for index in range(patient.hu.shape[0])
        ),
    )


def numbering(pipeline: Pipeline, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """For each real neck, which levels were found, and which of C2..C7 lie where the contours say.

    The contours' borders (`pseudo.cut_profile` without trust in the network's numbers) are evidence of their own, but
    not truth: `believed` says whether they are likely. `agrees`: level to bool.
    """
    unet = pipeline.networks.unet
    for path in paths:
        volume = real_volume(path)
        labels, vertebrae = pipeline.segment(volume)
        neck = weak_labels(read_contours(path), pipeline.bundle.segment.spacing_mm, unet.stride)
        found = profile(neck, *coarse_scores(unet, neck.hu))  # type: ignore[arg-type]
        cut = cut_profile(found, trust=0.0) if found is not None else None
        case: dict[str, Any] = {"name": neck.name, "found": [LEVELS[vertebra.label - 1] for vertebra in vertebrae]}
        if found is not None and cut is not None:
            case |= {"believed": is_believed(cut, found), "agrees": _agreement(labels, volume, neck, found, cut)}
        yield case


def _agreement(labels: Any, volume: Volume, neck: RealNeck, found: Profile, cut: Cut) -> dict[str, bool]:
    """Whether the body of each of C2..C7, as drawn, lies between the borders of its level."""
    along, forward, side = canal_coordinates(volume.grid, found)
    agrees = {}
    for number in range(2, len(LEVELS) + 1):
        body = (labels == number) & (forward > 5) & (forward < 20) & (np.abs(side) < 8)
        if number - 2 >= len(cut.off):
            continue
        first, last = cut.borders_mm[number - 2 : number]
        middle = float(np.median(along[body])) if body.any() else np.nan
        agrees[LEVELS[number - 1]] = bool(first - TOLERANCE_MM <= middle <= last + TOLERANCE_MM)
    return agrees
