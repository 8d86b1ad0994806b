"""`cspine fetch`: CT of a Study, or of a patient, from an archive into this node."""

import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, fail, load_config, open_index

if TYPE_CHECKING:
    from node.config import Config
    from node.peers import DicomPeer
    from node.retrieve.fetch import Fetched, FoundSeries


@click.command()
@config_option
@click.option("--from", "name", required=True, metavar="NAME", help="One of retrieve.peers, by its name or AE title.")
@click.option("--accession", metavar="NUMBER", help="The Study with this accession number.")
@click.option("--study", metavar="UID", help="The Study with this Study Instance UID.")
@click.option("--patient", metavar="ID", help="All Studies of the patient with this ID: the priors.")
@click.option(
    "--by",
    type=click.Choice(["get", "move"]),
    default="get",
    show_default=True,
    help="C-GET, or C-MOVE to this node, which must run and be known there.",
)
@click.option("--list", "only_list", is_flag=True, help="Only say what there is.")
def fetch(
    config_path: Path | None,
    name: str,
    accession: str | None,
    study: str | None,
    patient: str | None,
    by: str,
    only_list: bool,
) -> None:
    """Fetch the CT Series of a Study, or of all Studies of a patient, from an archive.

    They are analysed like any other that arrives. Give one of --accession, --study and --patient. Exit status 0 if all
    came, 1 if not.
    """
    given = {"AccessionNumber": accession, "StudyInstanceUID": study, "PatientID": patient}
    keys = {keyword: value for keyword, value in given.items() if value is not None}
    if len(keys) != 1:
        fail("Give one of --accession, --study and --patient.", EXIT_USAGE)
    if not all(value.strip() and not set(value) & set("*?\\") for value in keys.values()):
        fail("A number, UID or ID is wanted, not a pattern.", EXIT_USAGE)
    config = load_config(config_path)
    peer = next((p for p in config.retrieve.peers if name in (p.name, p.ae_title)), None)
    if peer is None:
        known = ", ".join(p.name for p in config.retrieve.peers) or "none"
        fail(f"There is no {name!r} among retrieve.peers ({known}); add its host, port and AE title.", EXIT_USAGE)
    from node.process import set_up_logging
    from node.retrieve.fetch import find_series
    from node.send import SendError

    set_up_logging("ERROR")
    try:
        found = find_series(peer, keys, calling_ae_title=config.receive.ae_title)
        if not found:
            fail(f"{peer.where} finds no CT for it.", EXIT_FAILED)
        if only_list:
            for series in found:
                click.echo(_line(series, "?" if series.num_instances is None else str(series.num_instances)))
        elif not _fetch_all(config, peer, found, by):
            fail("Not everything came; run it again to fetch what is missing.", EXIT_FAILED)
    except SendError as error:
        fail(f"{error}.", EXIT_FAILED)
    except OSError as error:
        fail(f"{config.data_dir} cannot be written: {error.strerror}.", EXIT_FAILED)


def _fetch_all(config: "Config", peer: "DicomPeer", found: "list[FoundSeries]", by: str) -> bool:
    """Fetches one Series after the other; whether all came."""
    from node.receive.store import Store
    from node.retrieve.fetch import get_series, move_series

    us = config.receive.ae_title
    if by == "move":
        return _report_all((series, move_series(series, peer, calling_ae_title=us)) for series in found)
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-fetch{time.time_ns() % 10**9}"
    with open_index(config, create=True) as index, closing(Store(config, index, run)) as store:
        return _report_all((series, get_series(series, peer, store, calling_ae_title=us)) for series in found)


def _report_all(all_fetched: Iterable["tuple[FoundSeries, Fetched]"]) -> bool:
    """Says what became of each as it comes; whether all came."""
    is_whole = True
    for series, fetched in all_fetched:
        click.echo(_line(series, str(fetched.num_instances), fetched.problem))
        is_whole = is_whole and not fetched.problem
    return is_whole


def _line(series: "FoundSeries", num_instances: str, problem: str = "") -> str:
    where = (
        f"Study {series.study_instance_uid} of {series.study_date or 'no date'}, Series {series.series_instance_uid}"
    )
    return f"{where}: {num_instances} Instances" + (f"; {problem}" if problem else "")
