"""Vertebrae of a cut as training samples: what `regions`, `classify` and `study` read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.classify import NUM_NEIGHBOURS
from model.levels import LEVELS
from training.rsna import Study
from training.steps.run import StepError
from training.vertebra_stacks import Stack


@dataclass(frozen=True, kw_only=True)
class Vertebra:
    """One judged vertebra of a cut. level: 0 is C1. regions_known: its regions are a target; where a network drew
    them, `drawn` is the file that has them."""

    study: Study
    cut: str
    level: int
    fractured: bool
    regions_known: bool
    drawn: Path | None = None

    @property
    def key(self) -> str:
        """Names it among all."""
        return f"{self.study.study_instance_uid}.{LEVELS[self.level]}"

    def read(self, shift: int = 0) -> Stack:
        """Its stack, shifted by so many slices along the spine; what lies beyond the ends repeats the last plane."""
        stacks = self.study.stacks(self.cut)
        assert stacks is not None
        num_planes = stacks.planes_hu.shape[1]
        planes = np.clip(np.arange(num_planes) + 2 * shift, 0, num_planes - 1)
        slices = planes[NUM_NEIGHBOURS : num_planes - NUM_NEIGHBOURS : 2]
        if self.drawn is None:
            regions = stacks.regions[self.level][slices] > 0
        else:
            with np.load(self.drawn) as arrays:
                drawn = arrays["regions"]
            regions = drawn[np.clip(np.arange(len(drawn)) + shift, 0, len(drawn) - 1)]
        return Stack(
            planes=stacks.planes_hu[self.level][planes], masks=stacks.masks[self.level][slices], regions=regions
        )


def judged_vertebrae(studies: Sequence[Study], cut: str) -> list[Vertebra]:
    """The vertebrae of these studies that were found, and of which at least 30 % are in the field of view.

    A study without stacks has none: `cut.json` says why.

    Raises:
        StepError: none has such a vertebra.
    """
    found = []
    for study in studies:
        stacks = study.stacks(cut)
        if stacks is None:
            continue
        found += [
            Vertebra(
                study=study,
                cut=cut,
                level=level,
                fractured=bool(stacks.fractured[level]),
                regions_known=bool(stacks.regions_known[level]),
            )
            for level in np.flatnonzero(stacks.judged).tolist()
        ]
    if not found and not any(study.stacks_folder(cut).exists() for study in studies):
        raise StepError(
            f"The cut {cut!r} has none of {len(studies)} studies; its cut.json says why. If they have no labels: train "
            "`segment` for their folds, too, or for a single fold with --label-all, and cut again."
        )
    if not found:
        raise StepError(f"No vertebra was found in any of {len(studies)} studies. Train `segment` for longer.")
    return found


def both_kinds(vertebrae: Sequence[Vertebra], where: str) -> tuple[int, int]:
    """How many of these are fractured and how many intact.

    Raises:
        StepError: one kind is missing. where: of what they are, for its message.
    """
    num_fractured = sum(vertebra.fractured for vertebra in vertebrae)
    num_intact = len(vertebrae) - num_fractured
    if not num_fractured or not num_intact:
        raise StepError(
            f"{where} holds {num_fractured} fractured and {num_intact} intact vertebrae; both are needed. "
            "Prepare more studies."
        )
    return num_fractured, num_intact
