"""Vertebrae as a trained network sees them, and whether they can be believed: labels for studies without a mask."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from model.geometry import Grid
from model.levels import LEVELS
from model.memory import answer
from model.networks import SliceVertebraUNet, VertebraUNet
from model.resample import body_volume, sample
from model.segment import LAST_LEVEL, network_input, one_chain
from training.evaluation.masks import dice
from training.rsna import Study

VertebraNetwork = VertebraUNet | SliceVertebraUNet

VOLUME_MM3 = (3_000.0, 45_000.0)
"""Of one vertebra C1..C7, from a child's C1 to a large C7."""

RELATIVE_VOLUME = (0.4, 2.5)
"""Of one vertebra, compared with the median of its neck."""

DISTANCE_MM = (7.0, 40.0)
"""Between the centroids of neighbours."""

MIN_AGREEMENT = 0.85
"""Dice, of each level, of the answers for the neck and for its mirror image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PseudoLabel:
    """labels: uint8 on the study's `neck_grid`, 1..7 = C1..C7, then thoracic ones. doubt: why not to learn from it."""

    labels: NDArray[np.uint8]
    doubt: str | None


def pseudo_label(study: Study, network: VertebraNetwork, spacing_mm: float, device: torch.device) -> PseudoLabel:
    """What the network says of a study, and of its mirror image, and whether that is plausible."""
    voxels_hu = np.array(study.neck_hu())
    labels = predicted_labels(voxels_hu, study.neck_grid, network, spacing_mm, device)
    mirrored = predicted_labels(
        np.ascontiguousarray(voxels_hu[..., ::-1]), study.neck_grid, network, spacing_mm, device
    )
    return PseudoLabel(labels=labels, doubt=doubt(labels, mirrored[..., ::-1], study.neck_grid))


def predicted_labels(
    voxels_hu: NDArray[np.int16], grid: Grid, network: VertebraNetwork, spacing_mm: float, device: torch.device
) -> NDArray[np.uint8]:
    """One chain of labels `(Z, Y, X)` on an LPS grid, thoracic ones with it; 0 where nothing was found.

    spacing_mm: of the network's own grid.
    """
    coarse_hu, on = body_volume(voxels_hu, grid, spacing_mm, network.stride)
    scores = answer(network, network_input(coarse_hu)[None], device)[-1][0].float()
    scores, found = one_chain(scores, on)
    labels = torch.from_numpy(np.where(found, scores[1].round().clamp(1, LAST_LEVEL).numpy(), 0)).float()
    return sample(labels[None], on, grid, nearest=True)[0].byte().numpy()


def doubt(labels: NDArray[np.uint8], mirrored: NDArray[np.uint8], grid: Grid) -> str | None:
    """Why these labels of a whole neck cannot be believed, in a few words; None if they can.

    mirrored: the answer for the mirror image, mirrored back.
    """
    numbers = np.arange(1, len(LEVELS) + 1)
    volumes = ndimage.sum_labels(labels > 0, labels, numbers) * grid.voxel_volume_mm3
    if (volumes == 0).any():
        return "levels missing"
    if volumes.min() < VOLUME_MM3[0] or volumes.max() > VOLUME_MM3[1]:
        return "implausible volume"
    relative = volumes / np.median(volumes)
    if relative.min() < RELATIVE_VOLUME[0] or relative.max() > RELATIVE_VOLUME[1]:
        return "uneven volumes"
    centroids = grid.to_lps_mm(np.array(ndimage.center_of_mass(labels > 0, labels, numbers)))
    steps = np.diff(centroids, axis=0)
    distances = np.linalg.norm(steps, axis=1)
    if distances.min() < DISTANCE_MM[0] or distances.max() > DISTANCE_MM[1] or (steps[:, 2] >= 0).any():
        return "implausible distance"
    if min(dice(labels == number, mirrored == number) for number in numbers) < MIN_AGREEMENT:
        return "disagrees with its mirror image"
    return None
