"""What the rules would make of the files in a folder, and why: the answer of `cspine rules test`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread

from model import HEADER_TAGS, PARSE_ERRORS, SeriesError, SeriesRules, SliceHeader, check_series, slice_headers
from node.rules.match import Decision, Outcome, decide, rank, why_preferred
from node.rules.settings import RulesConfig
from node.rules.traits import Traits, describe_series


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One Series. verdict: "analysed", "skipped" or "refused"."""

    study_instance_uid: str
    series_instance_uid: str
    traits: Traits
    decision: Decision
    verdict: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "study_instance_uid": self.study_instance_uid,
            "series_instance_uid": self.series_instance_uid,
            "verdict": self.verdict,
            "reason": self.reason,
            "attributes": asdict(self.traits),
            "rules": [
                {
                    "name": trial.rule.name,
                    "matches": trial.matches,
                    "when": [asdict(condition) for condition in trial.when],
                    "unless": [asdict(condition) for condition in trial.unless],
                }
                for trial in self.decision.trials
            ],
        }


def explain(
    paths: Sequence[Path], config: RulesConfig, slice_rules: SeriesRules, calling_ae_title: str
) -> tuple[list[Explanation], int]:
    """One explanation for each Series of the files, by Study; and how many files could not be read."""
    headers, path_of, num_unreadable = _read(paths)
    studies: dict[str, list[Explanation]] = defaultdict(list)
    for series in _by_series(headers):
        traits = describe_series(series, path_of, calling_ae_title)
        decision = decide(config, traits)
        verdict, reason = "analysed", decision.reason
        if decision.outcome is Outcome.SKIP:
            verdict = "skipped"
        else:
            try:
                check_series(series, slice_rules, final=True)
            except SeriesError as error:
                verdict, reason = "refused", str(error)
        explanation = Explanation(
            study_instance_uid=series[0].study_instance_uid,
            series_instance_uid=series[0].series_instance_uid,
            traits=traits,
            decision=decision,
            verdict=verdict,
            reason=reason,
        )
        studies[explanation.study_instance_uid].append(explanation)
    return [item for study in studies.values() for item in _choose(study, config)], num_unreadable


def _choose(study: list[Explanation], config: RulesConfig) -> list[Explanation]:
    """The Series of a Study, all but the preferred of those that fit now skipped."""
    fitting = [item for item in study if item.verdict == "analysed"]
    if config.analyse_all or len(fitting) < 2:
        return study
    best = fitting[rank(config, [item.traits for item in fitting])[0]]
    passed_over = {
        item.series_instance_uid: f"Series {best.series_instance_uid} of this Study is preferred "
        f"({why_preferred(config, best.traits, item.traits)})"
        for item in fitting
        if item is not best
    }
    return [
        Explanation(**{**vars(item), "verdict": "skipped", "reason": passed_over[item.series_instance_uid]})
        if item.series_instance_uid in passed_over
        else item
        for item in study
    ]


def _read(paths: Sequence[Path]) -> tuple[list[SliceHeader], dict[str, Path], int]:
    """Headers of all slices, the file of each Instance, and the number of files that cannot be read."""
    headers: list[SliceHeader] = []
    path_of: dict[str, Path] = {}
    num_unreadable = 0
    for path in paths:
        try:
            found = slice_headers(dcmread(path, stop_before_pixels=True, specific_tags=HEADER_TAGS))
        except (OSError, *PARSE_ERRORS):
            num_unreadable += 1
            continue
        headers += found
        path_of |= {header.sop_instance_uid: path for header in found}
    return headers, path_of, num_unreadable


def _by_series(headers: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    series: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in headers:
        series[header.series_instance_uid].append(header)
    return list(series.values())
