"""What `cspine cases` prints."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from node.case import Case, CaseState, local_time
from node.index import Totals
from node.priority import Priority

_COLOURS = {
    CaseState.DONE: "green",
    CaseState.SKIPPED: "bright_black",
    CaseState.REFUSED: "yellow",
    CaseState.FAILED: "red",
}


_COLUMNS = ("case", "state", "received", "from", "Instances", "priority")


def print_table(cases: Sequence[Case], priority_of: Callable[[Case], Priority]) -> None:
    """For people: a line for each case, which fits 80 columns, and below it what may be long."""
    rows = [_COLUMNS, *(_row(case, priority_of(case)) for case in cases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        Text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()) for row in rows
    ]
    console, below = Console(), (0, 0, 0, widths[0] + 2)
    lines[0].stylize("bold")
    console.print(lines[0], overflow="fold")
    for case, line in zip(cases, lines[1:], strict=True):
        start = widths[0] + 2
        line.stylize(_COLOURS.get(case.state, "cyan"), start, start + len(case.state))
        console.print(line, overflow="fold")
        summary = "" if case.is_outdated else case.summary
        details = case.series_instance_uid, summary, case.reason, _tries(case), case.conflicts, _purged(case)
        for detail in filter(None, details):
            console.print(Padding(Text(detail, overflow="fold"), below, expand=False))


def _row(case: Case, priority: Priority) -> tuple[str, ...]:
    received = local_time(case.first_received_at)
    return str(case.case_id), case.state, received, case.calling_ae_title, str(case.num_instances), priority


def _tries(case: Case) -> str:
    return f"{case.attempts} tries" if case.attempts > 1 else ""


def _purged(case: Case) -> str:
    """What retention has removed of the case."""
    marks = (("originals", case.originals_purged_at), ("results", case.results_purged_at))
    return ", ".join(f"{what} purged {datetime.fromtimestamp(at):%Y-%m-%d}" for what, at in marks if at is not None)


def print_json(cases: Sequence[Case], priority_of: Callable[[Case], Priority]) -> None:
    """A JSON object a line for programs; times in ISO 8601 with the zone."""
    for case in cases:
        values: dict[str, Any] = asdict(case) | {"priority": priority_of(case)}
        for key in [key for key, value in values.items() if key.endswith("_at") and value is not None]:
            values[key] = datetime.fromtimestamp(values[key]).astimezone().isoformat(timespec="seconds")
        sys.stdout.write(json.dumps(values, default=str) + "\n")


def describe_totals(totals: Totals) -> str:
    """For people."""
    return (
        f"Won against the quiet time: {totals.won_s:.0f} s over {totals.num_cases} Series. "
        f"Late Instances after a start: {totals.num_reopened}."
    )


def print_totals_json(totals: Totals) -> None:
    """A JSON object for programs."""
    sys.stdout.write(json.dumps(asdict(totals)) + "\n")
