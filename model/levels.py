"""The seven cervical levels, in the one order and numbering used everywhere."""

LEVELS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
"""Level names from head to foot; label `k` of a vertebra mask is `LEVELS[k - 1]`, 0 is background."""

OUTPUTS = ("patient_overall", *LEVELS)
"""What a study is judged on, named and ordered as in the RSNA challenge's tables."""
