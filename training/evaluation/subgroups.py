"""Studies by category: scanner, slice thickness, age band, whatever a column of the user's file says."""

from collections.abc import Mapping, Sequence

import numpy as np

from training.evaluation.tables import InputError

NOT_STATED = "not stated"

_MAX_CATEGORIES = 12


def split(studies: Sequence[str], category_of: Mapping[str, str], column: str) -> dict[str, list[int]]:
    """Rows of the Studies in each category of a column, none left out: those without a value are "not stated".

    A column of more than 12 different numbers is cut into four bins of about equal size, named by their ends.

    Raises:
        InputError: more than 12 categories that are no numbers.
    """
    values = [category_of.get(study, NOT_STATED) for study in studies]
    different = sorted({value for value in values if value != NOT_STATED})
    if len(different) > _MAX_CATEGORIES:
        values = _quartiles(values, column, len(different))
        different = sorted({value for value in values if value != NOT_STATED}, key=lambda name: float(name.split()[0]))
    elif all(_is_number(value) for value in different):
        different.sort(key=float)
    rows = {category: [row for row, value in enumerate(values) if value == category] for category in different}
    if NOT_STATED in values:
        rows[NOT_STATED] = [row for row, value in enumerate(values) if value == NOT_STATED]
    return rows


def _quartiles(values: list[str], column: str, num_different: int) -> list[str]:
    words = [value for value in values if value != NOT_STATED and not _is_number(value)]
    if words:
        raise InputError(
            f"Subgroup column {column} has {num_different} different values (one is {words[0]!r}); at most "
            f"{_MAX_CATEGORIES} are categories. Put rare ones together, or remove the column."
        )
    numbers = np.array([np.nan if value == NOT_STATED else float(value) for value in values])
    edges = np.nanquantile(numbers, [0.25, 0.5, 0.75])
    bins = np.searchsorted(edges, numbers, side="left")
    names = {}
    for index in np.unique(bins[~np.isnan(numbers)]):
        inside = numbers[(bins == index) & ~np.isnan(numbers)]
        names[index] = f"{inside.min():g} to {inside.max():g}"
    return [NOT_STATED if np.isnan(number) else names[index] for number, index in zip(numbers, bins, strict=True)]


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
