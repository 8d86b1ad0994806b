"""Studies by category: scanner, slice thickness, age band, whatever a column of the user's file says."""

from collections.abc import Mapping, Sequence
from decimal import Decimal

import numpy as np

from training.evaluation.tables import InputError

NOT_STATED = "not stated"

_MAX_CATEGORIES = 12


def split(studies: Sequence[str], category_of: Mapping[str, str], column: str) -> dict[str, list[int]]:
    """Rows of the Studies in each category of a column, none left out: those without a value are "not stated".

    A number is one category, however it is spelled. A column of more than 12 different numbers is cut into four bins of
    about equal size, named by their ends.

    Raises:
        InputError: more than 12 categories that are no numbers.
    """
    values = [category_of.get(study, NOT_STATED) for study in studies]
    names = _names([value for value in values if value != NOT_STATED], column)
    rows: dict[str, list[int]] = {name: [] for name in names.values()}
    for row, value in enumerate(values):
        rows.setdefault(names.get(value, NOT_STATED), []).append(row)
    return rows


def _names(values: Sequence[str], column: str) -> dict[str, str]:
    """The category of each value, in the order of the categories."""
    different = sorted(set(values))
    words = [value for value in different if not _is_number(value)]
    if words and len(different) > _MAX_CATEGORIES:
        raise InputError(
            f"Subgroup column {column} has {len(different)} different values (one is {words[0]!r}); at most "
            f"{_MAX_CATEGORIES} are categories. Put rare ones together, or remove the column."
        )
    if words:
        return dict(zip(different, different, strict=True))
    different.sort(key=Decimal)
    spelled = {Decimal(value): value for value in sorted(different, key=len, reverse=True)}  # the shortest stays
    if len(spelled) <= _MAX_CATEGORIES:
        return {value: spelled[Decimal(value)] for value in different}
    edges = np.quantile([float(value) for value in values], [0.25, 0.5, 0.75])
    bins: dict[int, list[str]] = {}
    for value in different:
        bins.setdefault(int(np.searchsorted(edges, float(value))), []).append(value)
    return {
        value: f"{spelled[Decimal(inside[0])]} to {spelled[Decimal(inside[-1])]}"
        for inside in bins.values()
        for value in inside
    }


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
