"""The seven cervical levels, in the one order and numbering used everywhere."""

LEVELS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
"""Level names from head to foot; label `k` of a vertebra mask is `LEVELS[k - 1]`, 0 is background."""
