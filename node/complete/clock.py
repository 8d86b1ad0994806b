"""The job that judges every Series that is due, asks the rules, chooses within its Study, and moves its case on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from model import SeriesRules, SliceHeader
from node.case import Case, CaseState
from node.complete.choose import Contender, choose
from node.complete.judge import Answer, Evidence, Verdict, await_sender, habit_s, is_quiet, judge
from node.complete.sources import Sources
from node.config import CompleteConfig, Config
from node.index import Index
from node.rules.match import Decision, Outcome, decide
from node.rules.traits import Traits, describe_series

log = logging.getLogger(__name__)

# Series by which the habit of a sender is known: so many, of so many Instances at least; a scout has one or two.
_NUM_EARLIER, _MIN_INSTANCES = 5, 10
_UNDECIDED = Decision(outcome=Outcome.OPEN, reason="", trials=())


def series_rules(config: CompleteConfig) -> SeriesRules:
    """The rules on slices, as configured."""
    return SeriesRules(min_slices=config.min_slices, max_spacing_mm=config.max_spacing_mm)


def check_cases(index: Index, config: Config, sources: Sources) -> None:
    """Judges every Series that is due, with the others of its Study, and moves their cases on."""
    index.reconsider_skipped()
    due = index.cases_to_check()
    for study_instance_uid in dict.fromkeys(case.study_instance_uid for case in due):
        try:
            _Study(index, config, sources, study_instance_uid).settle({case.case_id for case in due})
        except Exception:
            for case in due:  # put off, so that the other Studies do not wait for it
                if case.study_instance_uid == study_instance_uid:
                    index.check_again(case, index.now() + config.complete.quiet_time_s)
            raise


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A Series that is being received, and what is to be done with it."""

    case: Case
    verdict: Verdict
    traits: Traits
    decision: Decision
    num_at_source: int | None


class _Study:
    """One Study at one look."""

    def __init__(self, index: Index, config: Config, sources: Sources, study_instance_uid: str) -> None:
        self._index, self._config, self._sources = index, config, sources
        self._now = index.now()
        self._cases = index.cases_of_study(study_instance_uid)

    def settle(self, due: set[int]) -> None:
        """Moves on what can be; the rest is looked at again when it says."""
        judged = [self._judge(case) for case in self._cases if case.state is CaseState.RECEIVING]
        whole: list[_Judged] = []
        is_awaited = False
        for item in judged:
            if item.case.is_asked_for and item.verdict.answer is Answer.ANALYSE:
                self._queue(item)
            elif item.decision.outcome is Outcome.SKIP and not item.case.is_asked_for:
                self._skip(item.case, item.decision.reason)
            elif item.verdict.answer is Answer.REFUSE:
                self._refuse(item)
            elif item.verdict.answer is Answer.ANALYSE:
                whole.append(item)
            else:
                is_awaited = True
                if item.case.case_id in due:
                    self._index.check_again(item.case, item.verdict.until)
        if not whole:
            return
        if self._config.rules.analyse_all:
            for item in whole:
                self._queue(item)
        elif is_awaited and self._now < self._wait_until():
            for item in whole:
                self._index.check_again(item.case, self._wait_until())
        else:
            self._choose(whole)

    def _judge(self, case: Case) -> _Judged:
        carriers = self._index.carriers(case.series_instance_uid)
        quiet_time_s = self._config.complete.quiet_time_s
        is_asked, num_at_source = self._sources.ask(case) if is_quiet(carriers) else (False, None)
        evidence = Evidence(
            headers=(),
            carriers=carriers,
            # One that was started again long after its last Instance waits for its source, too.
            last_received_at=case.changed_at if is_asked else case.last_received_at,
            num_instances=case.num_instances,
            habit_s=habit_s(self._index.earlier_carriers(case, _NUM_EARLIER, _MIN_INSTANCES), quiet_time_s),
            is_source_asked=is_asked,
            num_at_source=num_at_source,
        )
        traits, decision = Traits(), _UNDECIDED
        verdict = await_sender(evidence, quiet_time_s=quiet_time_s, now=self._now)
        if verdict is None:
            headers = self._headers(case)
            evidence = replace(evidence, headers=headers)
            verdict = judge(evidence, series_rules(self._config.complete), quiet_time_s=quiet_time_s, now=self._now)
            traits = self._describe(case, headers)
            decision = decide(self._config.rules, traits, is_whole=verdict.answer is not Answer.WAIT)
        return _Judged(case=case, verdict=verdict, traits=traits, decision=decision, num_at_source=num_at_source)

    def _headers(self, case: Case) -> list[SliceHeader]:
        stored = self._index.stored_series(case.series_instance_uid)
        return [SliceHeader.from_dict(header) for header in stored.headers]

    def _describe(self, case: Case, headers: list[SliceHeader]) -> Traits:
        files = self._index.instance_files(case.series_instance_uid)
        return describe_series(headers, files, case.calling_ae_title)

    def _wait_until(self) -> float:
        """Until when a whole Series waits for the others of the Study."""
        wait_s = min(self._config.rules.study_wait_s, self._config.complete.quiet_time_s)
        return max(case.last_received_at for case in self._cases) + wait_s

    def _choose(self, whole: list[_Judged]) -> None:
        by_id = {item.case.case_id: item for item in whole}
        contenders = [Contender(case=item.case, traits=item.traits) for item in whole]
        choice = choose(self._config.rules, contenders, list(self._taken()))
        for passed in choice.skip:
            self._skip(passed.case, passed.reason, passed.skipped_for)
        for case in choice.analyse:
            self._queue(by_id[case.case_id])

    def _taken(self) -> Iterable[Contender]:
        """The Series of the Study that are to be analysed, or were."""
        for case in self._cases:
            came_to_nothing = case.state is CaseState.REFUSED or (case.state is CaseState.FAILED and not case.summary)
            if case.state in (CaseState.RECEIVING, CaseState.SKIPPED) or came_to_nothing:
                continue
            if headers := self._headers(case):
                yield Contender(case=case, traits=self._describe(case, headers))

    def _queue(self, item: _Judged) -> None:
        case = item.case
        won_s = max(0.0, case.last_received_at + self._config.complete.quiet_time_s - self._now)
        if case.is_asked_for:  # it was started again, and its Instances came long ago
            won_s = max(won_s, case.won_s or 0.0)
        if not self._index.queue(case, won_s=won_s, num_at_source=item.num_at_source):
            return
        self._sources.forget(case)
        where = f"case={case.case_id} series={case.series_instance_uid} instances={case.num_instances}"
        log.info("action=complete %s won_s=%.1f", where, won_s)
        if item.num_at_source is not None and item.num_at_source > case.num_instances:
            log.warning("action=incomplete %s: its source holds %d", where, item.num_at_source)

    def _refuse(self, item: _Judged) -> None:
        if self._config.deliver.report_not_analysed:
            self._queue(item)  # the worker refuses it for the same reason, and writes the report that says so
        elif self._index.refuse(item.case, item.verdict.reason):
            self._sources.forget(item.case)
            where = f"case={item.case.case_id} series={item.case.series_instance_uid}"
            log.warning("action=refused %s: %s", where, item.verdict.reason)

    def _skip(self, case: Case, reason: str, skipped_for: str | None = None) -> None:
        if self._index.skip(case, reason, skipped_for=skipped_for):
            self._sources.forget(case)
            log.info("action=skipped case=%d series=%s: %s", case.case_id, case.series_instance_uid, reason)
