"""Commands over cases: `cases`, `pause`, `resume`, `retry`, `delete`; with and without a running node."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.case import FINISHED, CaseState, local_time
from node.commands import EXIT_FAILED, config_option, load_config, open_index

if TYPE_CHECKING:
    from node.case import Case
    from node.index import Index, StoredFile

_cases_argument = click.argument("names", metavar="CASE...", nargs=-1, required=True)


@click.command()
@config_option
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="How many, the latest first.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([state.value for state in CaseState]),
    help="Only these; may be given repeatedly.",
)
@click.option("--totals", "only_totals", is_flag=True, help="Only what was won against the quiet time, over all cases.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one case per line; with --totals one object.")
def cases(config_path: Path | None, limit: int, states: tuple[str, ...], only_totals: bool, as_json: bool) -> None:
    """List the received Series: which state each is in, and why."""
    config = load_config(config_path)
    from node.cases import describe_totals, print_json, print_table, print_totals_json
    from node.priority import priority_of

    if only_totals:
        with open_index(config) as index:
            totals = index.totals()
        if as_json:
            print_totals_json(totals)
        else:
            click.echo(describe_totals(totals))
        return
    show = print_json if as_json else print_table
    with open_index(config) as index:
        show(index.cases(limit, [CaseState(state) for state in states]), partial(priority_of, config=config.priority))
        since, totals = index.paused_since(), index.totals()
    if totals.num_cases and not as_json:
        click.echo(describe_totals(totals), err=True)
    if since is not None:
        click.echo(f"Paused since {local_time(since)}: no case is analysed until `cspine resume`.", err=True)


@click.command()
@config_option
def pause(config_path: Path | None) -> None:
    """Take no new case, until `cspine resume`. The node goes on receiving; what is being analysed ends."""
    with open_index(load_config(config_path), create=True) as index:
        index.pause()
    click.echo("Paused: no case is analysed until `cspine resume`. Receiving and delivery go on.")


@click.command()
@config_option
def resume(config_path: Path | None) -> None:
    """Take cases again after `cspine pause`."""
    with open_index(load_config(config_path), create=True) as index:
        index.resume()
    click.echo("Resumed: cases are analysed as they come.")


@click.command()
@config_option
@_cases_argument
def retry(config_path: Path | None, names: tuple[str, ...]) -> None:
    """Analyse cases again that have ended: done, skipped, refused or failed.

    A CASE is named by its number or its Series Instance UID, as `cspine cases` shows them.
    """

    def retry_one(index: "Index", case: "Case") -> str:
        if case.state not in FINISHED:
            return f"is {case.state}; only what has ended is started again"
        if case.originals_purged_at is not None:
            return "has no Instances any more, they were purged; send the Series again"
        if not case.num_instances:
            return "has no Instances any more, they were lost from the disk; send the Series again"
        if num_lost := sum(map(_is_lost, index.stored_files(case.series_instance_uid))):
            return f"has {num_lost} Instances whose files are missing or cut off; send the Series again first"
        return "" if index.retry(case) else _CHANGED

    with open_index(load_config(config_path), acts=True) as index:
        _do_to_each(index, names, "is started again", retry_one)


@click.command()
@config_option
@_cases_argument
@click.option("--force", is_flag=True, help="Also while it is being analysed; that is then for nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(config_path: Path | None, names: tuple[str, ...], force: bool, yes: bool) -> None:
    """Delete cases: the received Instances, the results, and all that is known of them. They do not come back.

    A CASE is named by its number or its Series Instance UID, as `cspine cases` shows them. What was delivered stays
    where it was delivered to.
    """
    from node.remove import delete_case

    def delete_one(index: "Index", case: "Case") -> str:
        if case.state is CaseState.ANALYSING and not force:
            return "is being analysed; wait until that ends, or use --force"
        try:
            return "" if delete_case(index, case) else _CHANGED
        except OSError as error:
            return f"is forgotten, but {error.filename} cannot be removed: {error.strerror}"

    with open_index(load_config(config_path), acts=True) as index:
        if not yes:
            click.confirm(f"Delete {len(names)} case(s) with everything received and made?", abort=True)
        _do_to_each(index, names, "is deleted", delete_one)


def _is_lost(file: "StoredFile") -> bool:
    try:
        return not file.is_whole()
    except OSError:
        return True


_CHANGED = "has changed at this moment; look again with `cspine cases`"


def _do_to_each(index: "Index", names: Sequence[str], done: str, act: "Callable[[Index, Case], str]") -> None:
    """Acts on each named case and says how it went; exit status 1 if any was left as it was."""
    num_left = 0
    for name in dict.fromkeys(names):
        case = index.named_case(name)
        problem = "does not exist; see `cspine cases`" if case is None else act(index, case)
        num_left += bool(problem)
        click.echo(f"Case {name} {problem or done}.", err=bool(problem))
    if num_left:
        sys.exit(EXIT_FAILED)
