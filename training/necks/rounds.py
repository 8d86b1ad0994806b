"""Rounds of self-training: a network labels the real necks it has not seen labelled, and learns from the likely
ones."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.networks import VertebraUNet
from model.segment import network_input
from training.necks.openkbp import RealNeck
from training.necks.pseudo import STEP_MM, Cut, Profile, cut_profile, own_cut, profile, relabelled
from training.necks.samples import write_real

MAX_COST, MIN_CONTRAST = 0.15, 0.1
"""Of a cut (`pseudo.Cut`) that is believed; of 210 necks the first round believed 84."""

MAX_TOP_MM, MAX_SPREAD = 14.0, 1.6
"""How far from the brainstem's end C2 may begin, and by how much the network's error may change from C2 to C6."""


@torch.inference_mode()
def coarse_scores(unet: VertebraUNet, hu: NDArray[np.int16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logit and level, `(Z, Y, X)`, of a volume on the coarse grid: the mean of it and its mirror image."""
    inputs = network_input(torch.from_numpy(hu).float())[None].contiguous(memory_format=torch.channels_last_3d)
    scores = (unet(inputs)[-1] + unet(inputs.flip(-1))[-1].flip(-1))[0].float() / 2
    return scores[0].numpy(), scores[1].numpy()


def pseudo_labels(
    unet: VertebraUNet, necks: list[RealNeck], trust: float, folder: Path, *, knows: bool = False
) -> Iterator[Path]:
    """Writes the necks whose cut is believed, with their vertebrae; gives their files.

    trust: how much the network's own numbers count: little in the first round, more in later ones. knows: where the cut
    is not believed, the network's own is, if it is likely; for a network that has come to number well.
    """
    unet.eval()
    for neck in necks:
        logit, level = coarse_scores(unet, neck.hu)
        found = profile(neck, logit, level)
        cut = _likely_cut(found, trust, knows) if found is not None else None
        if found is None or cut is None:
            continue
        labelled = relabelled(neck, logit, level, found, cut)
        first, last = int(max(cut.borders_mm[0], 0) / STEP_MM), int(cut.borders_mm[-1] / STEP_MM)
        path = folder / f"{neck.name}.npz"
        write_real(path, labelled, found.points[max(first - 8, 0) : last])
        yield path


def _likely_cut(found: Profile, trust: float, knows: bool) -> Cut | None:
    """The cut to label a neck by, if one is believed. Arguments as of `pseudo_labels`."""
    cut = cut_profile(found, trust)
    if cut is not None and is_believed(cut, found):
        return cut
    own = own_cut(found) if knows else None
    return own if own is not None and abs(own.borders_mm[0] - found.top_mm) <= MAX_TOP_MM else None


def is_believed(cut: Cut, found: Profile) -> bool:
    """Whether a cut is likely enough to teach from."""
    off = cut.off[:5]
    return bool(
        cut.cost <= MAX_COST
        and cut.contrast >= MIN_CONTRAST
        and abs(cut.borders_mm[0] - found.top_mm) <= MAX_TOP_MM
        and not np.isnan(off).any()
        and np.ptp(off) <= MAX_SPREAD
    )
