"""`cspine sources`: how far each watched archive has been followed; what it did not give out, and to ask it again.

With and without a running node.
"""

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.case import local_time
from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, fail, load_config, open_index

if TYPE_CHECKING:
    from node.index import TroubledSeries, WatchedSource
    from node.peers import DicomWebSource, OrthancSource

_MAX_SHOWN = 20  # Series that one archive did not give out


@click.group(invoke_without_command=True)
@config_option
@click.option("--json", "as_json", is_flag=True, help="As JSON, one source per line.")
@click.pass_context
def sources(context: click.Context, config_path: Path | None, as_json: bool) -> None:
    """See the archives that are watched: state, last success, last error, and the Series that they did not give out.

    Such a Series is tried again with growing waits for an hour and then set aside, until `cspine sources retry`; it
    holds up no other. Exit status 1 while an archive fails.
    """
    context.obj = config_path
    if context.invoked_subcommand is not None:
        return
    config = load_config(config_path)
    if not config.sources.each:
        click.echo("No archive is watched; the lists under sources in the configuration are empty.", err=True)
        return
    with open_index(config) as index:
        found = [(source, index.watched_source(source.name)) for source in config.sources.each]
        troubled = {source.name: list(index.troubled_series(source.name).values()) for source, _ in found}
    if as_json:
        for source, known in found:
            not_given = [_told(series) for series in troubled[source.name]]
            told = {"url": source.url, "state": _state(known), **_told(known), "series_not_given": not_given}
            click.echo(json.dumps(told))
    else:
        _print_table(found)
        for name, series in troubled.items():
            _print_troubled(name, series)
    if any(known.is_failing for _, known in found):
        sys.exit(EXIT_FAILED)


@sources.command()
@config_option
@click.argument("series_ids", metavar="SERIES...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="All that were not given out, instead of SERIES.")
@click.option("--source", "source_name", metavar="NAME", help="Only those of this archive.")
@click.pass_obj
def retry(
    config_before: Path | None,
    config_path: Path | None,
    series_ids: tuple[str, ...],
    is_all: bool,
    source_name: str | None,
) -> None:
    """Ask again for Series that an archive did not give out, as `cspine sources` names them, set aside or not.

    They are asked for at the archive's next look, however old their Study is, and have all their attempts again.
    """
    if bool(series_ids) == is_all:
        fail("Name Series as `cspine sources` does, or give --all, with or without --source.", EXIT_USAGE)
    config = load_config(config_path or config_before)
    names = [source.name for source in config.sources.each if source_name in (None, source.name)]
    if not names:
        named = f"No archive {source_name}" if source_name else "No archive"
        fail(f"{named} is watched; see sources in the configuration.", EXIT_USAGE)
    with open_index(config, acts=True) as index:
        wanted = {name: set(index.troubled_series(name)) for name in names}
        if series_ids:
            wanted = {name: known & set(series_ids) for name, known in wanted.items()}
            if missing := set(series_ids).difference(*wanted.values()):
                fail(f"No archive failed to give out {', '.join(sorted(missing))}; see `cspine sources`.", EXIT_FAILED)
        num = sum(index.retry_series(name, ids) for name, ids in wanted.items())
    click.echo(f"{num} Series {'is' if num == 1 else 'are'} asked for again at the next look.")


def _told(known: "WatchedSource | TroubledSeries") -> dict[str, Any]:
    """For programs: times in ISO 8601 with the zone, as `cspine cases --json` gives them."""
    values = asdict(known)
    for key in values.keys() & {"succeeded_at", "failed_at", "paused_until", "next_attempt_at"}:
        if values[key] is not None:
            values[key] = datetime.fromtimestamp(values[key]).astimezone().isoformat(timespec="seconds")
    return values


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
    for title in ("Source", "State", "Last success", "Series", "Up to"):
        table.add_column(title, overflow="fold", no_wrap=title != "Source")
    for source, known in found:
        state = _state(known)
        table.add_row(
            Text(source.name),
            Text(state, style="red" if known.is_failing else "green" if state == "watching" else ""),
            _when(known.succeeded_at),
            str(known.num_series),
            _up_to(source, known),
        )
    Console().print(table)
    for source, known in found:  # columns of them would be too narrow to read
        click.echo(f"{source.name} is {source.url}")
        if known.error:
            click.echo(f"  {_when(known.failed_at)}: {known.error}")
        if known.paused_until is not None:
            click.echo(f"  It asked to be left alone until {_when(known.paused_until)}.")


def _print_troubled(name: str, troubled: "list[TroubledSeries]") -> None:
    for series in troubled[:_MAX_SHOWN]:
        if series.next_attempt_at is None:
            again = f"cspine sources retry {series.series_id}"
            becomes = f"set aside {_when(series.failed_at)}; once {name} can give it out: {again}"
        else:
            becomes = f"to be tried again {_when(series.next_attempt_at)}"
        times = f"{series.attempts} attempt{'s' * (series.attempts != 1)}"
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
    return "" if time_s is None else local_time(time_s)
