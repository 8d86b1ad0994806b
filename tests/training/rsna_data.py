"""A small data set with the shape and all traps of RSNA 2022, and the cache made of it, once for a test process.

`tests/training/conftest.py` has them as the fixtures `rsna_folder` and `rsna_cache`: do not write into them but under
names of your own (`labels/<set>`, `cuts/<name>`).
"""

from pathlib import Path

from training.rsna import Settings, prepare, read_source
from training.rsna.demo import SMALL, generate, study_uid

NUM_STUDIES, NUM_TEST = 8, 1
"""Study 3 cannot be used; 0, 1, 4, 5 and 6 have masks, upside down that of 5; 0 and 4 have boxes. See `traits`."""

SPACING_MM = 2.0
"""Of the neck's grid."""


def uid(number: int) -> str:
    """StudyInstanceUID of a study by its number."""
    return study_uid(number, seed=0)


def make_rsna(folder: Path, num_studies: int = NUM_STUDIES, num_test: int = NUM_TEST) -> Path:
    """Writes the data set."""
    for _ in generate(folder, num_studies, num_test=num_test, scanner=SMALL):
        pass
    return folder


def make_cache(rsna: Path, cache: Path) -> Path:
    """Prepares the data set."""
    for _ in prepare(read_source(rsna), cache, Settings(spacing_mm=SPACING_MM), num_workers=1):
        pass
    return cache
