"""What `cspine cases` prints."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from node.case import Case, CaseState
from node.priority import Priority

_COLOURS = {
    CaseState.DONE: "green",
    CaseState.SKIPPED: "bright_black",
    CaseState.REFUSED: "yellow",
    CaseState.FAILED: "red",
}


def print_table(cases: Sequence[Case], priority_of: Callable[[Case], Priority]) -> None:
    """A table for people."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "case",
        "received",
        "from",
        "Series",
        "Instances",
        "priority",
        "state",
        "tries",
        "finding",
        "reason",
    ):
        table.add_column(heading, overflow="fold")
    for case in cases:
        received = datetime.fromtimestamp(case.first_received_at).strftime("%Y-%m-%d %H:%M:%S")
        state = f"[{_COLOURS.get(case.state, 'cyan')}]{case.state}[/]{_purged(case)}"
        table.add_row(
            str(case.case_id),
            received,
            escape(case.calling_ae_title),  # comes from the network, and brackets are markup to rich
            case.series_instance_uid,
            str(case.num_instances),
            priority_of(case),
            state,
            str(case.attempts),
            escape(case.summary),
            escape(case.reason),
        )
    Console().print(table)


def _purged(case: Case) -> str:
    """A line for each thing that retention has removed of the case."""
    marks = (("originals", case.originals_purged_at), ("results", case.results_purged_at))
    return "".join(f"\n{what} purged {datetime.fromtimestamp(at):%Y-%m-%d}" for what, at in marks if at is not None)


def print_json(cases: Sequence[Case], priority_of: Callable[[Case], Priority]) -> None:
    """A JSON object a line for programs; times in ISO 8601 with the zone."""
    for case in cases:
        values: dict[str, Any] = asdict(case) | {"priority": priority_of(case)}
        for key in [key for key, value in values.items() if key.endswith("_at") and value is not None]:
            values[key] = datetime.fromtimestamp(values[key]).astimezone().isoformat(timespec="seconds")
        sys.stdout.write(json.dumps(values, default=str) + "\n")
