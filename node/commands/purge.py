"""`cspine purge`: removes what retention says is due, now."""

from pathlib import Path

import click

from node.commands import config_option, load_config, open_index


@click.command()
@config_option
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
def purge(config_path: Path | None, dry_run: bool) -> None:
    """Remove received Instances and results that are too old, or that the disk has no room for.

    As the section retention of the configuration says. Whatever is still to be analysed or delivered stays. The node
    may be running.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from node.process import set_up_logging
    from node.retention import plan_now
    from node.retention import purge as carry_out

    config = load_config(config_path)
    set_up_logging("WARNING")
    with open_index(config) as index:
        purges = plan_now(index, config)
        if not purges:
            click.echo("There is nothing to purge.")
            return
        freed_bytes = sum(item.kept.num_bytes for item in purges) if dry_run else carry_out(index, purges)
    table = Table("case", Column("Series", overflow="fold"), "what", "MB", "why", box=box.SIMPLE_HEAD, pad_edge=False)
    for item in purges:
        kept = item.kept
        table.add_row(
            str(kept.case.case_id),
            kept.case.series_instance_uid,
            str(kept.what),
            f"{kept.num_bytes / 1e6:.1f}",
            item.why,
        )
    Console().print(table)
    click.echo(f"{freed_bytes / 1e6:.1f} MB {'would be freed' if dry_run else 'freed'}.")
