"""What the rules say of a Series, and which of several they prefer. Pure; every answer can be explained.

A condition on an attribute that the Series lacks does not hold. While slices are still arriving, conditions on what
grows with them are open, and so is every rule that hangs on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from node.rules.settings import Preference, Range, Rule, RulesConfig, compile_pattern
from node.rules.traits import Traits

_GROWING = ("num_slices", "spacing_mm")
# What may be told in logs and in the database; any other text may hold a patient's data, and is only ever compared.
_TELLABLE = ("plane", "kernel_type", "slice_thickness_mm", "spacing_mm", "num_slices", "rows", "kvp")


class Outcome(Enum):
    """What the rules say."""

    ANALYSE = auto()
    SKIP = auto()
    OPEN = auto()  # it hangs on slices that are still to come


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition as it was judged. holds: None while it is open."""

    attribute: str
    wanted: str
    found: str
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One rule as it was tried. matches: None while it is open."""

    rule: Rule
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...]
    matches: bool | None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the rules say of a Series: why, in a sentence, and the rules tried up to the one that decided."""

    outcome: Outcome
    reason: str
    trials: tuple[Trial, ...]


def decide(config: RulesConfig, traits: Traits, *, is_whole: bool = True) -> Decision:
    """The outcome of the first rule that matches, else the default. is_whole: no more slices will come."""
    trials = []
    for rule in config.series:
        trial = _try(rule, traits, is_whole=is_whole)
        trials.append(trial)
        if trial.matches is None:
            return Decision(
                outcome=Outcome.OPEN, reason=f"rule {rule.name!r} needs the whole Series", trials=tuple(trials)
            )
        if trial.matches:
            words = f"rule {rule.name!r}" + (f": {rule.reason}" if rule.reason else "")
            return Decision(outcome=Outcome[rule.outcome.upper()], reason=words, trials=tuple(trials))
    return Decision(
        outcome=Outcome[config.default.upper()], reason="no rule matches: rules.default", trials=tuple(trials)
    )


def _try(rule: Rule, traits: Traits, *, is_whole: bool) -> Trial:
    when = tuple(_conditions(rule.when.given(), traits, is_whole=is_whole))
    unless = tuple(_conditions(rule.unless.given(), traits, is_whole=is_whole))
    answers = [condition.holds for condition in when]
    answers += [None if condition.holds is None else not condition.holds for condition in unless]
    # One that fails settles it, whatever is open.
    matches = False if False in answers else None if None in answers else True
    return Trial(rule=rule, when=when, unless=unless, matches=matches)


def _conditions(given: dict[str, tuple[str, ...] | Range], traits: Traits, *, is_whole: bool) -> list[Condition]:
    conditions = []
    for attribute, wanted in given.items():
        found = getattr(traits, attribute)
        if isinstance(wanted, Range):
            words, shown = str(wanted), "(missing)" if found is None else f"{found:g}"
            holds = found is not None and _is_within(found, wanted)
        else:
            words = " or ".join(wanted)
            values = found if isinstance(found, tuple) else (found,)
            shown = "\\".join(values) or "(missing)"
            holds = _fits(wanted, values)
        is_open = attribute in _GROWING and not is_whole
        conditions.append(Condition(attribute=attribute, wanted=words, found=shown, holds=None if is_open else holds))
    return conditions


def _is_within(value: float, limits: Range) -> bool:
    return (limits.min is None or value >= limits.min) and (limits.max is None or value <= limits.max)


def _fits(patterns: Sequence[str], values: Sequence[str]) -> bool:
    """Whether any pattern fits any one of the values, or all of them as DICOM writes them, joined by backslashes."""
    candidates = {value for value in (*values, "\\".join(values)) if value}
    return any(compile_pattern(pattern).search(value) for pattern in patterns for value in candidates)


def rank(config: RulesConfig, traits: Sequence[Traits]) -> list[int]:
    """Indices of Series that all fit, the preferred first; among equals the earlier one."""
    return sorted(range(len(traits)), key=lambda i: (_distances(config, traits[i]), i))


def is_preferred(config: RulesConfig, traits: Traits, other: Traits) -> bool:
    """Whether the first Series is preferred to the other; of two equal ones neither is."""
    return _distances(config, traits) < _distances(config, other)


def _distances(config: RulesConfig, traits: Traits) -> tuple[float, ...]:
    return tuple(_distance(preference, traits) for preference in config.prefer)


def _distance(preference: Preference, traits: Traits) -> float:
    """How far a Series is from what is preferred; smaller is better."""
    if preference.order == "thinnest":
        thickness_mm = traits.slice_thickness_mm or traits.spacing_mm
        return float("inf") if thickness_mm is None else round(thickness_mm, 3)
    if preference.order == "most_slices":
        return -float(traits.num_slices or 0)
    return float(not all(c.holds for c in _conditions(preference.given(), traits, is_whole=True)))


def why_preferred(config: RulesConfig, winner: Traits, loser: Traits) -> str:
    """What made the difference, without a word that may come from a description."""
    for preference in config.prefer:
        if _distance(preference, winner) != _distance(preference, loser):
            return _difference(preference, winner, loser)
    return "both are alike and it came first"


def _difference(preference: Preference, winner: Traits, loser: Traits) -> str:
    if preference.order == "thinnest":
        return f"thinner slices: {_thickness(winner)}, here {_thickness(loser)}"
    if preference.order == "most_slices":
        return f"more slices: {winner.num_slices}, here {loser.num_slices}"
    pairs = zip(
        _conditions(preference.given(), winner, is_whole=True),
        _conditions(preference.given(), loser, is_whole=True),
        strict=True,
    )
    return ", ".join(
        f"{won.attribute} {won.wanted}" + (f", here {lost.found}" if lost.attribute in _TELLABLE else "")
        for won, lost in pairs
        if not lost.holds
    )


def _thickness(traits: Traits) -> str:
    thickness_mm = traits.slice_thickness_mm or traits.spacing_mm
    return "unknown" if thickness_mm is None else f"{thickness_mm:g} mm"
