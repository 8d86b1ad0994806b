"""The `rules` section of the configuration: what an administrator writes, checked when it is loaded.

Only what can be written is here; what it means for a Series is `match.py`. Wrong patterns, attributes that do not exist
and reversed ranges are faults of the configuration, so that none waits in a rule until the night it is needed.
"""

import fnmatch
import re
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from node.settings import Section, check_names, listed


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """What to `search` a value with: `/.../` is a regular expression, found anywhere in it; else a glob for all of it.

    Both ignore case. In a glob `*` stands for any text, `?` for one character, `[BH]` for one of those.

    Raises:
        ValueError: it is empty, or not a regular expression.
    """
    if not pattern.strip("/ "):
        raise ValueError("an empty pattern matches nothing; * matches every value")
    if not pattern.startswith("/"):
        return re.compile(rf"\A{fnmatch.translate(pattern)}", re.IGNORECASE)
    if not pattern.endswith("/"):
        raise ValueError("a regular expression stands between two slashes, for example /spine|neck/")
    try:
        return re.compile(pattern[1:-1], re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error


def _check_pattern(value: str) -> str:
    compile_pattern(value)
    return value


class Range(Section):
    """Numbers from min to max, both included; either may be left out."""

    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min:g}) is more than max ({self.max:g})")
        return self

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{self.min:g}"
        parts = ((self.min, "at least"), (self.max, "at most"))
        return " and ".join(f"{word} {limit:g}" for limit, word in parts if limit is not None)


def _as_range(value: Any) -> Any:
    """A number is the range that holds only it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"min": value, "max": value} if is_number else value


Patterns = Annotated[tuple[Annotated[str, AfterValidator(_check_pattern)], ...] | None, BeforeValidator(listed)]
Numbers = Annotated[Range | None, BeforeValidator(_as_range)]
Planes = Annotated[
    tuple[Literal["axial", "coronal", "sagittal", "oblique", "unknown"], ...] | None, BeforeValidator(listed)
]
KernelTypes = Annotated[tuple[Literal["bone", "soft", "unknown"], ...] | None, BeforeValidator(listed)]


class Conditions(Section):
    """What must hold of a Series: every attribute that is named, and of the values listed for it any one.

    An attribute that a Series lacks fulfils no condition. The names are those of `Traits`.
    """

    modality: Patterns = None
    body_part: Patterns = None
    study_description: Patterns = None
    series_description: Patterns = None
    protocol: Patterns = None
    image_type: Patterns = None  # any one value of ImageType, or all of them joined by backslashes
    kernel: Patterns = None
    kernel_type: KernelTypes = None
    plane: Planes = None
    slice_thickness_mm: Numbers = None
    spacing_mm: Numbers = None
    num_slices: Numbers = None
    rows: Numbers = None
    kvp: Numbers = None
    manufacturer: Patterns = None
    model: Patterns = None
    station: Patterns = None
    calling_ae_title: Patterns = None

    @field_validator("*")
    @classmethod
    def _check_not_empty(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("the list is empty; name a value or leave the condition out")
        return value

    def given(self) -> dict[str, tuple[str, ...] | Range]:
        """The conditions that are set, by attribute."""
        values = ((name, getattr(self, name)) for name in Conditions.model_fields)
        return {name: value for name, value in values if value is not None}


class Rule(Section):
    """For a Series of which all of `when` and none of `unless` holds, the outcome."""

    name: str = Field(min_length=1)
    when: Conditions
    unless: Conditions = Conditions()
    outcome: Literal["analyse", "skip"]
    reason: str = ""  # in the words of the administrator, beside the name of the rule

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.when.given():
            raise ValueError("`when` names no condition; what to do with all other Series is rules.default")
        return self


class Preference(Conditions):
    """One thing to prefer among Series that all fit: that these conditions hold, or an order."""

    order: Literal["thinnest", "most_slices"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return {"order": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.order is None) == (not self.given()):
            raise ValueError("give one order, thinnest or most_slices, or conditions")
        return self


# What a CT study holds beside stacks of axial slices. ImageType: PS3.3 C.7.6.1.1.2, C.8.2.1.1.1, and what vendors add.
_DEFAULT_RULES: tuple[dict[str, Any], ...] = (
    {
        "name": "localizers",
        "when": {"image_type": ["LOCALIZER", "*SCOUT*", "*TOPOGRAM*"]},
        "outcome": "skip",
        "reason": "a scout, not slices",
    },
    {
        "name": "reports and screens",
        "when": {"image_type": ["DOSE*", "*SCREEN*"]},
        "outcome": "skip",
        "reason": "a dose report or a picture of a screen",
    },
    {
        "name": "projections",
        "when": {"image_type": ["*MIP*", "*MINIP*", "*PROJECTION*", "*VRT*", "*VOLREN*"]},
        "outcome": "skip",
        "reason": "a projection or rendering, not slices",
    },
    {
        "name": "other planes",
        "when": {"plane": ["coronal", "sagittal"]},
        "outcome": "skip",
        "reason": "a reformat of what the axial Series shows",
    },
    {
        "name": "processed images",
        "when": {"image_type": ["SECONDARY", r"/\bMPR|_MPR/", "*REFORMATTED*"]},
        "outcome": "skip",
        "reason": "made from other images, not by the scanner's reconstruction",
    },
)
_DEFAULT_PREFERENCES: tuple[Any, ...] = (
    {"body_part": ["*SPINE*", "*NECK*"]},
    {"series_description": ["*SPINE*", "*NECK*", "*CERVICAL*", "*HWS*", "*RACHIS*"]},
    {"image_type": ["ORIGINAL"]},
    {"slice_thickness_mm": {"max": 1.5}},
    {"kernel_type": ["bone"]},
    "thinnest",
    "most_slices",
)


class RulesConfig(Section):
    """Which Series are analysed, and which one of a Study where several fit."""

    series: tuple[Rule, ...] = tuple(Rule.model_validate(rule) for rule in _DEFAULT_RULES)
    default: Literal["analyse", "skip"] = "analyse"
    analyse_all: bool = False
    prefer: tuple[Preference, ...] = tuple(Preference.model_validate(item) for item in _DEFAULT_PREFERENCES)
    study_wait_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    better_later: Literal["analyse", "skip"] = "analyse"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names("rules", (rule.name for rule in self.series))
        return self


def as_written(config: RulesConfig) -> dict[str, Any]:
    """The section as an administrator would write it: `RulesConfig.model_validate` is its inverse."""
    values = config.model_dump(mode="json", exclude_none=True)
    for rule in values["series"]:
        if not rule["unless"]:
            del rule["unless"]
        if not rule["reason"]:
            del rule["reason"]
    values["prefer"] = [item.get("order", item) for item in values["prefer"]]
    return values
