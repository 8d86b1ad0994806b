"""Fractures, and what only looks like them, put into any CT volume whose vertebrae are known. The door is this module.

For training and measuring where no labelled patient is at hand. What it draws was made to look right to the eye; that a
network finds it says little about fractures of patients.
"""

from training.inserted.insertion import Inserted, InsertedFracture, draw_levels, insert
from training.inserted.measures import Outcome, measure_on_inserted, summarise_inserted
from training.inserted.negatives import Negative
from training.inserted.scanner import disturb
from training.inserted.stacks import inserted_stacks

__all__ = [
    "Inserted",
    "InsertedFracture",
    "Negative",
    "Outcome",
    "disturb",
    "draw_levels",
    "insert",
    "inserted_stacks",
    "measure_on_inserted",
    "summarise_inserted",
]
