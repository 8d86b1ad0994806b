"""`cspine deliveries`: what went where, and what did not; with and without a running node."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.case import THERE, UNSETTLED, DeliveryState, local_time
from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, fail, load_config, open_index

if TYPE_CHECKING:
    from node.case import Delivery
    from node.config import Config
    from node.index import Index

_COLOURS = {DeliveryState.DONE: "green", DeliveryState.FAILED: "red", DeliveryState.SUPERSEDED: "bright_black"}
_ids_argument = click.argument("ids", metavar="ID...", nargs=-1, type=int)
_destination_option = click.option("--destination", help="Only those to the destination of this name.")


@click.group()
def deliveries() -> None:
    """See what went to which destination, and try again or give up what did not."""


@deliveries.command(name="list")
@config_option
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([state.value for state in DeliveryState]),
    help="Only these; may be given repeatedly.",
)
@_destination_option
@click.option("--case", "case_name", metavar="CASE", help="Only those of the case with this number or Series UID.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one delivery per line, with every object.")
def list_deliveries(
    config_path: Path | None, states: tuple[str, ...], destination: str | None, case_name: str | None, as_json: bool
) -> None:
    """List deliveries, those that changed last first."""
    config = load_config(config_path)
    with open_index(config) as index:
        case_id = None if case_name is None else _case_id(index, case_name)
        wanted = [DeliveryState(state) for state in states] or tuple(DeliveryState)
        _check_destination(config, index, destination)
        found = index.deliveries(states=wanted, destination=destination, case_id=case_id)
    (_print_json if as_json else _print_table)(found)


@deliveries.command()
@config_option
@_ids_argument
@click.option("--all-failed", is_flag=True, help="All that were given up, instead of an ID.")
@_destination_option
def retry(config_path: Path | None, ids: tuple[int, ...], all_failed: bool, destination: str | None) -> None:
    """Try deliveries again now, with all their attempts.

    What the destination has already is not sent again, unless the delivery was done: then all of it is.
    """
    if bool(ids) == all_failed or (destination and not all_failed):
        fail("Name deliveries by their IDs, or give --all-failed with or without --destination.", EXIT_USAGE)
    config = load_config(config_path)
    with open_index(config, acts=True) as index:
        _check_destination(config, index, destination)
        if all_failed:
            found = index.deliveries(states=[DeliveryState.FAILED], destination=destination)
        else:
            found = _named(index, ids)
        num = sum(index.retry_delivery(delivery) for delivery in found)
    click.echo(f"{num} of {len(found)} deliveries are tried again now.")
    if num < len(found):
        fail("The others changed at this moment; see `cspine deliveries list`.", EXIT_FAILED)


@deliveries.command(name="give-up")
@config_option
@_ids_argument
@click.option("--all-unsettled", is_flag=True, help="All of --destination that are pending or verifying.")
@_destination_option
def give_up(config_path: Path | None, ids: tuple[int, ...], all_unsettled: bool, destination: str | None) -> None:
    """End deliveries that are not done. What a destination has of them stays there."""
    if bool(ids) == all_unsettled or bool(destination) != all_unsettled:
        fail("Name deliveries by their IDs, or give --all-unsettled with --destination.", EXIT_USAGE)
    config = load_config(config_path)
    with open_index(config, acts=True) as index:
        _check_destination(config, index, destination)
        if all_unsettled:
            found = index.deliveries(states=UNSETTLED, destination=destination)
        else:
            found = _named(index, ids)
        num = sum(index.give_up_delivery(delivery) for delivery in found)
    click.echo(f"{num} of {len(found)} deliveries are given up.")
    if num < len(found):
        fail("The others had ended before.", EXIT_FAILED)


def _case_id(index: "Index", name: str) -> int:
    case = index.named_case(name)
    if case is None:
        fail(f"There is no case {name}; see `cspine cases`.", EXIT_USAGE)
    return case.case_id


def _check_destination(config: "Config", index: "Index", name: str | None) -> None:
    """Ends the command when a destination is named that is none, and to which nothing ever went: it is mistyped."""
    known = {destination.name for destination in config.deliver.destinations}
    known |= {delivery.destination for delivery in index.deliveries()}
    if name is not None and name not in known:
        fail(f"There is no destination {name!r}; there are: {', '.join(sorted(known)) or 'none'}.", EXIT_USAGE)


def _named(index: "Index", ids: Sequence[int]) -> list["Delivery"]:
    """The deliveries with these IDs; ends the command when one is not there."""
    known = {delivery.delivery_id: delivery for delivery in index.deliveries()}
    missing = [str(number) for number in ids if number not in known]
    if missing:
        fail(f"There is no delivery {', '.join(missing)}; see `cspine deliveries list`.", EXIT_FAILED)
    return [known[number] for number in dict.fromkeys(ids)]


def _print_table(found: Sequence["Delivery"]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("id", "case", "destination", "state", "objects", "tries", "next"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "destination")
    for delivery in found:
        there = [item for item in delivery.objects.values() if item.state in THERE]
        table.add_row(
            str(delivery.delivery_id),
            str(delivery.case_id),
            escape(delivery.destination),
            f"[{_COLOURS.get(delivery.state, 'cyan')}]{delivery.state}[/]",
            f"{len(there)}/{len(delivery.objects)}" if delivery.objects else "",
            str(delivery.attempts),
            local_time(delivery.next_attempt_at) if delivery.state in UNSETTLED else "",
        )
    Console().print(table)
    for delivery in found:  # a column of them would be too narrow to read
        if delivery.reason:
            click.echo(f"{delivery.delivery_id}: {delivery.reason}")


def _print_json(found: Sequence["Delivery"]) -> None:
    for delivery in found:
        values = asdict(delivery)
        for name in ("next_attempt_at", "changed_at", "sent_at"):
            values[name] = datetime.fromtimestamp(values[name]).astimezone().isoformat(timespec="seconds")
        sys.stdout.write(json.dumps(values, default=str) + "\n")
