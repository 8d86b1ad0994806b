"""Which case a free worker gets: STAT first, then the one that has waited longest; nobody waits for ever.

Pure; `service.py` claims in this order, `cspine cases` shows it.
"""

from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase

from node.case import Case
from node.config import PriorityConfig


class Priority(StrEnum):
    """How soon a case is needed."""

    STAT = "stat"  # before all that is routine
    ROUTINE = "routine"  # in the order of arrival


def priority_of(case: Case, config: PriorityConfig) -> Priority:
    """STAT if the caller, or any attribute that a rule looks at, says so."""
    rules = {
        "RequestedProcedurePriority": config.stat_procedure_priorities,
        "InstitutionalDepartmentName": config.stat_departments,
        "StationName": config.stat_stations,
        "CurrentPatientLocation": config.stat_locations,
    }
    is_stat = case.calling_ae_title in config.stat_ae_titles or any(
        _matches(case.attributes.get(keyword), patterns) for keyword, patterns in rules.items()
    )
    return Priority.STAT if is_stat else Priority.ROUTINE


def rank(case: Case, config: PriorityConfig, now: float) -> tuple[bool, float]:
    """What queued cases are sorted by. Routine that has waited its time is as urgent as STAT, so that STAT without end
    cannot starve it."""
    queued_at = case.queued_at or case.last_received_at
    has_waited = now - queued_at >= config.max_routine_wait_s
    return not (has_waited or priority_of(case, config) is Priority.STAT), queued_at


def _matches(value: object, patterns: Iterable[str]) -> bool:
    """Whether the attribute, or one of its values, fits one of the patterns; case does not count."""
    values = value if isinstance(value, list) else [value]
    return any(fnmatchcase(str(text).casefold(), pattern.casefold()) for text in values if text for pattern in patterns)
