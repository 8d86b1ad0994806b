"""Which of the Series of one Study are analysed. Pure; called by `clock.py` once none is awaited any more."""

from collections.abc import Sequence
from dataclasses import dataclass

from node.case import Case, CaseState
from node.rules.match import is_preferred, rank, why_preferred
from node.rules.settings import RulesConfig
from node.rules.traits import Traits


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A Series that the rules let pass."""

    case: Case
    traits: Traits


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A Series that is not analysed, for which one, and why."""

    case: Case
    reason: str
    skipped_for: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What becomes of the Series of a Study."""

    analyse: Sequence[Case]
    skip: Sequence[PassedOver]


def choose(rules: RulesConfig, whole: Sequence[Contender], taken: Sequence[Contender]) -> Choice:
    """The best of the Series that are whole, if it is better than those already taken.

    whole: to be decided on. taken: queued, being analysed or analysed. One that is only queued gives way to a better
    one; one that has been begun stands, and the better one is analysed beside it or skipped, as configured.
    """
    ranked = [whole[i] for i in rank(rules, [contender.traits for contender in whole])]
    best = ranked[0]
    skip = [_passed_over(rules, other, best) for other in ranked[1:]]
    if not taken:
        return Choice(analyse=[best.case], skip=skip)
    # The best of those already taken; of the one to come only this matters.
    holder = taken[rank(rules, [contender.traits for contender in taken])[0]]
    if not is_preferred(rules, best.traits, holder.traits):
        return Choice(analyse=[], skip=[_passed_over(rules, contender, holder) for contender in ranked])
    waiting = [contender for contender in taken if contender.case.state is CaseState.QUEUED]
    begun = [contender for contender in taken if contender not in waiting]
    if begun and rules.better_later == "skip":
        reason = f"Series {begun[0].case.series_instance_uid} of this Study was analysed before this one came"
        late = PassedOver(
            case=best.case,
            reason=f"{reason} (rules.better_later)",
            skipped_for=begun[0].case.series_instance_uid,
        )
        return Choice(analyse=[], skip=[late, *skip])
    return Choice(analyse=[best.case], skip=[*skip, *(_passed_over(rules, other, best) for other in waiting)])


def _passed_over(rules: RulesConfig, loser: Contender, winner: Contender) -> PassedOver:
    uid = winner.case.series_instance_uid
    why = why_preferred(rules, winner.traits, loser.traits)
    return PassedOver(case=loser.case, reason=f"Series {uid} of this Study is preferred ({why})", skipped_for=uid)
