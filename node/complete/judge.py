"""Whether a Series is whole, and whether it can be analysed: the evidence weighed. Pure; called by `clock.py`.

No signal in DICOM says "that was the last Instance". What there is, from strong to weak:

| evidence | what it says |
|---|---|
| the source's own count (C-FIND NumberOfSeriesRelatedInstances) | larger than what is here: wait; equal: whole |
| an association is open | more may come |
| the associations of a sending have all been released | the sender is done, or pauses: see `settling_s` |
| an association broke, or left not all, and no later one was released | the sender tries again, within the quiet time |
| slice positions have a gap, or there are too few | something is missing |
| InstanceNumbers have a gap, or do not start at 0 or 1 | something is missing, though what is here may look even |
| InstanceNumbers that are missing, or repeated | nothing: some scanners write 1 in all of them |

Nothing outlasts the quiet time: after it a Series is judged as it is, and a lost slice bridged as far as the rules
allow; the results say what tells that it is not all (`model/missing.py`). A wrong guess costs one more analysis: a late
slice reopens the case. The rules on slices are the model's (`check_series`), so that what passes here is what it can
read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from model import IncompleteSeries, SeriesError, SeriesRules, SliceHeader, check_series
from node.case import Carrier

_MIN_SETTLING_S = 2.0  # a lost SYN is sent again after 1 s (RFC 6298 2.1)
_SETTLING_FACTOR = 4
_MIN_PAUSES = 3


class Answer(Enum):
    """What to do with a Series."""

    ANALYSE = auto()  # it is whole
    REFUSE = auto()  # it cannot be analysed, and waiting will not change that
    WAIT = auto()  # until `until`, or until an association ends


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer; for a refusal the reason, for a wait until when."""

    answer: Answer
    reason: str = ""
    until: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a Series.

    carriers: its associations. num_instances: those here. habit_s: see `habit_s`. is_source_asked: its answer is
    awaited. num_at_source: Instances that the source says it holds, None when it does not say.
    """

    headers: Sequence[SliceHeader]
    carriers: Sequence[Carrier]
    last_received_at: float
    num_instances: int
    habit_s: Sequence[float] = ()
    is_source_asked: bool = False
    num_at_source: int | None = None


def judge(evidence: Evidence, rules: SeriesRules, *, quiet_time_s: float, now: float) -> Verdict:
    """Whether to analyse, refuse or await more of a Series."""
    if unsettled := await_sender(evidence, quiet_time_s=quiet_time_s, now=now):
        return unsettled
    quiet_at = _quiet_at(evidence, quiet_time_s)
    if now >= quiet_at:
        return _check(evidence.headers, rules, is_final=True, until=quiet_at)
    is_counted = evidence.num_at_source == evidence.num_instances
    if (evidence.num_at_source or 0) > evidence.num_instances or not (
        is_counted or are_numbers_whole(evidence.headers)
    ):
        return Verdict(answer=Answer.WAIT, until=quiet_at)
    return _check(evidence.headers, rules, is_final=False, until=quiet_at)


def await_sender(evidence: Evidence, *, quiet_time_s: float, now: float) -> Verdict | None:
    """The wait for a sender that is not believed to be done; None if it is. Of no interest are the slices.

    A sender with an association for each image has its Series looked at as often: reading all that is here each time
    would take time that grows with the square of their number.
    """
    quiet_at = _quiet_at(evidence, quiet_time_s)
    if now >= quiet_at:
        return None
    # The end of an association and the answer of the source both have it judged again.
    if not is_quiet(evidence.carriers) or evidence.is_source_asked:
        return Verdict(answer=Answer.WAIT, until=quiet_at)
    is_counted = evidence.num_at_source == evidence.num_instances
    settled_at = 0.0 if is_counted else settles_at(evidence.carriers, evidence.habit_s, quiet_time_s)
    if settled_at is None or now < settled_at:
        return Verdict(answer=Answer.WAIT, until=min(quiet_at, settled_at or quiet_at))
    return None


def _quiet_at(evidence: Evidence, quiet_time_s: float) -> float:
    """When the quiet time is over: from the last Instance, or from a break after it.

    A node that was killed notes the break when it starts again, and whoever was sending then needs time to go on.
    """
    broke_at = max((c.ended_at for c in evidence.carriers if c.ended_at is not None and not c.released), default=0.0)
    return max(evidence.last_received_at, broke_at) + quiet_time_s


def _check(headers: Sequence[SliceHeader], rules: SeriesRules, *, is_final: bool, until: float) -> Verdict:
    try:
        check_series(headers, rules, final=is_final)
    except IncompleteSeries as error:
        if not is_final:
            return Verdict(answer=Answer.WAIT, until=until)
        return Verdict(answer=Answer.REFUSE, reason=str(error))
    except SeriesError as error:
        return Verdict(answer=Answer.REFUSE, reason=str(error))
    return Verdict(answer=Answer.ANALYSE)


def is_quiet(carriers: Sequence[Carrier]) -> bool:
    """Whether no association that carried the Series is open."""
    return all(carrier.ended_at is not None for carrier in carriers)


def was_interrupted(carriers: Sequence[Carrier]) -> bool:
    """Whether the last association to end broke off, or had Instances refused: nobody has sent the rest since."""
    ended = [carrier for carrier in carriers if carrier.ended_at is not None]
    return bool(ended) and not max(ended, key=lambda carrier: carrier.ended_at or 0.0).released


def are_numbers_whole(headers: Sequence[SliceHeader]) -> bool:
    """False when InstanceNumbers tell that Instances are missing; True also when they tell nothing."""
    numbers = {header.sop_instance_uid: header.instance_number for header in headers}
    known = {number for number in numbers.values() if number is not None}
    if len(known) < len(numbers) or len(known) < 2:
        return True
    return min(known) in (0, 1) and max(known) - min(known) == len(known) - 1


def settles_at(carriers: Sequence[Carrier], habit_s: Sequence[float], quiet_time_s: float) -> float | None:
    """When a Series counts as sent if nothing more opens until then; None: not before the quiet time.

    Only the latest sending counts: what was sent before a break, or before a pause longer than the quiet time, was
    judged on its own. A break that no later association has mended leaves the quiet time.
    """
    sending = _latest_sending(carriers, quiet_time_s)
    if not sending:
        return None
    ended_at = max(carrier.ended_at or 0.0 for carrier in sending)
    if len(sending) == 1 or _were_open_together(sending):
        wait_s = settling_s(habit_s, quiet_time_s) if habit_s else 0.0
    else:
        wait_s = settling_s([*pauses_s(sending), *habit_s], quiet_time_s)
    return ended_at + wait_s


def _latest_sending(carriers: Sequence[Carrier], quiet_time_s: float) -> list[Carrier]:
    """The associations since the last break or long pause, by the time they opened; none if the break is the latest."""
    carriers = sorted(carriers, key=lambda carrier: carrier.opened_at)
    broke_at = max((c.ended_at for c in carriers if c.ended_at is not None and not c.released), default=0.0)
    sending: list[Carrier] = []
    quiet_since = 0.0
    for carrier in carriers:
        if carrier.opened_at < broke_at:
            continue
        if carrier.opened_at - quiet_since > quiet_time_s:
            sending = []
        sending.append(carrier)
        quiet_since = max(quiet_since, carrier.ended_at or carrier.opened_at)
    return sending


def _were_open_together(sending: Sequence[Carrier]) -> bool:
    """Whether there was a moment at which all of them were open: a sender with a fixed set of associations.

    One that opens an association for each image, several at a time, never has them all open together.
    """
    return max(c.opened_at for c in sending) < min(c.ended_at or float("inf") for c in sending)


def pauses_s(carriers: Sequence[Carrier]) -> list[float]:
    """For each association but the first, how long nothing was open before it; 0 where one still was."""
    carriers = sorted(carriers, key=lambda carrier: carrier.opened_at)
    pauses: list[float] = []
    open_until = 0.0
    for number, carrier in enumerate(carriers):
        if number:
            pauses.append(max(0.0, carrier.opened_at - open_until))
        open_until = max(open_until, carrier.ended_at or carrier.opened_at)
    return pauses


def settling_s(pauses: Sequence[float], quiet_time_s: float) -> float:
    """How long to wait for the next association of a sender that uses many, from the pauses it made between them.

    Four times the longest pause so far, at least 2 s, never more than the quiet time; with fewer than three pauses to
    go by, the quiet time. Why four times the longest: suppose that pauses are independent and of one distribution. That
    the next is longer than all of n before has a chance of 1/(n+1), whatever the distribution: too often, since each
    pause is a chance to be wrong. If their distribution has no heavier tail than an exponential, the chance that the
    next is longer than c times the longest of n is at most 1/C(n+c, c) for whole c: for c = 4 it is 1/35 after three
    pauses, and 1 in 40,000 after 29, as many as 30 slices with an association each have. Over all pauses of a Series of
    300 the chance of a false start is then 1 in 3,700. The floor covers what is not of that distribution: a packet sent
    again.
    """
    if len(pauses) < _MIN_PAUSES:
        return quiet_time_s
    return min(quiet_time_s, max(_MIN_SETTLING_S, _SETTLING_FACTOR * max(pauses)))


def habit_s(earlier: Sequence[Sequence[Carrier]], quiet_time_s: float) -> list[float]:
    """The pauses of a sender that is known to split its Series, from the carriers of its latest Series; else none.

    A Series that came over one association may be the first part of one that comes over several. A sender of which
    every one of the latest Series, at least three, came that way is taken to do so again.
    """
    split = [pauses_s(sending) for carriers in earlier if (sending := _latest_sending(carriers, quiet_time_s))]
    if len(split) < _MIN_PAUSES or not all(split):
        return []
    return [pause for pauses in split for pause in pauses]
