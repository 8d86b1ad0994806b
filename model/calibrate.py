"""From a network's logits to numbers that mean something: probabilities, and the challenge's answers beside them.

The parameters are in the bundle; how they are found is in `training/calibration.py`.
"""

import math
from dataclasses import dataclass

from model.levels import OUTPUTS


@dataclass(frozen=True, kw_only=True)
class Platt:
    """A logit, scaled and shifted, is the logit of the calibrated probability; as it stands it changes nothing.

    Reference: Platt, Probabilistic Outputs for Support Vector Machines, 1999.
    """

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0 or not math.isfinite(self.scale) or not math.isfinite(self.offset):
            raise ValueError(
                f"scale {self.scale} and offset {self.offset}: finite numbers are needed, the scale above 0"
            )

    def probability(self, logit: float) -> float:
        """0..1."""
        calibrated = self.scale * logit + self.offset
        # Of a negative number the exponential cannot overflow.
        odds = math.exp(-abs(calibrated))
        return 1 / (1 + odds) if calibrated >= 0 else odds / (1 + odds)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """What to hand in to the RSNA 2022 challenge: its metric wants numbers that are no probabilities.

    Fractured studies weigh twice there, and the patient weighs as much as all levels. platt: from logits, by output.
    undetermined: what to say of an output without a logit.
    """

    platt: dict[str, Platt]
    undetermined: dict[str, float]

    def __post_init__(self) -> None:
        for name, part in (("platt", self.platt), ("undetermined", self.undetermined)):
            if part.keys() != set(OUTPUTS):
                raise ValueError(f"challenge.{name} has {sorted(part)}; it must have {', '.join(OUTPUTS)}")

    def row(self, logits: dict[str, float]) -> dict[str, float]:
        """The numbers of one study, by output, from `Analysis.logits`."""
        return {
            name: self.platt[name].probability(logits[name]) if name in logits else self.undetermined[name]
            for name in OUTPUTS
        }
