"""`cspine sources`: how far each watched archive has been followed, and what it did not give out.

With and without a running node.
"""

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.commands import EXIT_FAILED, config_option, load_config, open_index

if TYPE_CHECKING:
    from node.index import TroubledSeries, WatchedSource
    from node.peers import DicomWebSource, OrthancSource

_MAX_SHOWN = 20  # Series that one archive did not give out


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="As JSON, one source per line.")
def sources(config_path: Path | None, as_json: bool) -> None:
    """See the archives that are watched: state, last success, last error, and the Series that they did not give out.

    Such a Series is tried again with growing waits for an hour and then set aside; it holds up no other. Exit status 1
    while an archive fails.
    """
    config = load_config(config_path)
    if not config.sources.each:
        click.echo("No archive is watched; the lists under sources in the configuration are empty.", err=True)
        return
    with open_index(config) as index:
        found = [(source, index.watched_source(source.name)) for source in config.sources.each]
        troubled = {source.name: list(index.troubled_series(source.name).values()) for source, _ in found}
    if as_json:
        for source, known in found:
            not_given = [asdict(series) for series in troubled[source.name]]
            told = {"url": source.url, "state": _state(known), **asdict(known), "series_not_given": not_given}
            click.echo(json.dumps(told))
    else:
        _print_table(found)
        for name, series in troubled.items():
            _print_troubled(name, series)
    if any(known.is_failing for _, known in found):
        sys.exit(EXIT_FAILED)


def _state(known: "WatchedSource") -> str:
    if known.is_failing:
        return "failing"
    return "watching" if known.succeeded_at is not None else "not looked at"


def _print_table(found: "list[tuple[OrthancSource | DicomWebSource, WatchedSource]]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Source", "State", "Last success", "Series fetched", "Up to", "Last error"):
        table.add_column(title, overflow="fold")
    for source, known in found:
        state = _state(known)
        error = f"{_when(known.failed_at)}: {known.error}" if known.error else ""
        table.add_row(
            Text(f"{source.name}\n{source.url}"),
            Text(state, style="red" if known.is_failing else "green" if state == "watching" else ""),
            _when(known.succeeded_at),
            str(known.num_series),
            _up_to(source, known),
            Text(error),
        )
    Console().print(table)


def _print_troubled(name: str, troubled: "list[TroubledSeries]") -> None:
    for series in troubled[:_MAX_SHOWN]:
        if series.next_attempt_at is None:
            becomes = f"set aside {_when(series.failed_at)}; send it to the node once {name} can give it out"
        else:
            becomes = f"to be tried again {_when(series.next_attempt_at)}"
        times = f"{series.attempts} attempt{'s' * (series.attempts > 1)}"
        click.echo(f"{name} did not give out Series {series.series_id} in {times}: {series.reason}\n  {becomes}")
    if len(troubled) > _MAX_SHOWN:
        click.echo(f"{name}: {len(troubled) - _MAX_SHOWN} more Series; see --json")


def _up_to(source: "OrthancSource | DicomWebSource", known: "WatchedSource") -> str:
    """How far it is done with: the number of a change of an Orthanc, or a day of a DICOMweb archive."""
    from node.peers import OrthancSource

    if known.position is None:
        return ""
    if isinstance(source, OrthancSource):
        return f"change {known.position}"
    return f"{known.position // 10000:04}-{known.position // 100 % 100:02}-{known.position % 100:02}"


def _when(time_s: float | None) -> str:
    return "" if time_s is None else f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M:%S}"
