"""`cspine notifications`: what was told to whom, what could not be, and a test of each target."""

from datetime import UTC, datetime
from pathlib import Path

import click

from node.case import local_time
from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, fail, load_config, open_index


@click.group()
def notifications() -> None:
    """See and test what is told to web addresses, mailboxes, HL7 and FHIR receivers."""


@notifications.command("list")
@config_option
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="How many, the latest first.")
def list_them(config_path: Path | None, limit: int) -> None:
    """List notifications: to whom, about what, whether it was sent, and why not."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    config = load_config(config_path)
    table = Table("id", "at", "target", "case", "about", "state", "tries", box=box.SIMPLE_HEAD, pad_edge=False)
    with open_index(config) as index:
        found = index.notifications(limit)
    for item in found:
        row = (
            item.notification_id,
            local_time(item.at),
            item.target,
            item.case_id,
            item.about,
            item.state,
            item.attempts,
        )
        table.add_row(*(Text(str(cell), overflow="fold") for cell in row))
    Console().print(table)
    for item in found:  # a column of them would be too narrow to read
        if why := item.reason or item.text:
            click.echo(f"{item.notification_id}: {why}")


@notifications.command()
@config_option
@click.argument("ids", metavar="ID...", nargs=-1, required=True, type=int)
def retry(config_path: Path | None, ids: tuple[int, ...]) -> None:
    """Send failed notifications again."""
    with open_index(load_config(config_path), acts=True) as index:
        number = index.retry_notifications(ids)
    click.echo(f"{number} of {len(set(ids))} will be sent again.")
    if number < len(set(ids)):
        fail("The others have not failed, or do not exist; see `cspine notifications list`.", EXIT_FAILED)


@notifications.command()
@config_option
@click.argument("name", metavar="TARGET")
def test(config_path: Path | None, name: str) -> None:
    """Send a made-up positive notice to a target, whatever its rule says, and say how that went."""
    config = load_config(config_path)
    from node.notify.clock import send
    from node.notify.errors import NotifyError
    from node.notify.notice import Event, Notice

    targets = {target.name: target for target in config.notify.targets}
    if name not in targets:
        fail(
            f"There is no target {name!r} in the configuration; there are: {', '.join(targets) or 'none'}.", EXIT_USAGE
        )
    notice = Notice(
        event=Event.POSITIVE,
        at=datetime.now(UTC),
        case_id=0,
        study_instance_uid="2.25.0",
        series_instance_uid="2.25.0",
        calling_ae_title="TEST",
        text="This is a test of the notification: no patient was examined.",
    )
    try:
        send(notice, targets[name])
    except (NotifyError, OSError) as error:
        fail(f"{name}: not sent: {error}.", EXIT_FAILED)
    click.echo(f"{name}: sent.")
