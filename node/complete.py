"""Completeness: whether a Series is whole, and whether it can be analysed.

No signal in DICOM says "that was the last Instance". Two things together do: the association that carried the Series
was released, and the slice positions have no gap. Where they do not, a quiet time decides. The rules on slices are the
model's (`check_series`), so that what passes here is what it can read. `judge` is pure; `service.py` calls
`check_cases` by the clock.
"""

import logging
import time
from dataclasses import dataclass
from enum import Enum, auto

from model import IncompleteSeries, SeriesError, SeriesRules, SliceHeader, check_series
from node.config import CompleteConfig
from node.index import Index, StoredSeries

log = logging.getLogger(__name__)


class Answer(Enum):
    """What to do with a Series."""

    ANALYSE = auto()  # it is whole
    REFUSE = auto()  # it cannot be analysed, and waiting will not change that
    WAIT = auto()  # until an association ends or the quiet time is over


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer, and for a refusal the reason."""

    answer: Answer
    reason: str = ""


def judge(stored: StoredSeries, rules: SeriesRules, *, is_quiet: bool) -> Verdict:
    """Whether to analyse, refuse or await more of a Series.

    Before the quiet time is over, only a Series that came over a single association, now released, is judged: a sender
    that uses several may open another one. is_quiet: no Instance has come for the quiet time;
    a lost slice is then bridged, as far as the rules allow.
    """
    came_whole = (stored.num_open, stored.num_released, stored.num_broken) == (0, 1, 0)
    if not is_quiet and not came_whole:
        return Verdict(answer=Answer.WAIT)
    try:
        check_series([SliceHeader.from_dict(header) for header in stored.headers], rules, final=is_quiet)
    except IncompleteSeries as error:
        return Verdict(answer=Answer.REFUSE, reason=str(error)) if is_quiet else Verdict(answer=Answer.WAIT)
    except SeriesError as error:
        return Verdict(answer=Answer.REFUSE, reason=str(error))
    return Verdict(answer=Answer.ANALYSE)


def series_rules(config: CompleteConfig) -> SeriesRules:
    """The rules on slices, as configured."""
    return SeriesRules(min_slices=config.min_slices, max_spacing_mm=config.max_spacing_mm)


def check_cases(index: Index, config: CompleteConfig) -> None:
    """Judges every Series that is due, and moves its case on."""
    for case in index.cases_to_check():
        quiet_at = case.last_received_at + config.quiet_time_s
        stored = index.stored_series(case.series_instance_uid)
        verdict = judge(stored, series_rules(config), is_quiet=time.time() >= quiet_at)
        if verdict.answer is Answer.WAIT:
            index.check_again(case, quiet_at)
        elif verdict.answer is Answer.ANALYSE and index.queue(case):
            log.info(
                "action=complete case=%d series=%s instances=%d",
                case.case_id,
                case.series_instance_uid,
                case.num_instances,
            )
        elif verdict.answer is Answer.REFUSE and index.refuse(case, verdict.reason):
            log.warning("action=refused case=%d series=%s: %s", case.case_id, case.series_instance_uid, verdict.reason)
