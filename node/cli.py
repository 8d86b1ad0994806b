"""The `cspine` command. Everything heavy is imported inside the command that needs it, so that `--help` is quick.

Exit status: 0 done, 1 it did not work out, 2 wrong usage or configuration, 3 the Series cannot be analysed.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.commands import EXIT_FAILED, EXIT_NOT_ANALYSABLE, EXIT_USAGE, config_option, dicom_files, fail, load_config
from node.commands.cases import cases, delete, pause, resume, retry
from node.commands.conformance import conformance
from node.commands.deliveries import deliveries
from node.commands.fetch import fetch
from node.commands.models import models
from node.commands.notifications import notifications
from node.commands.purge import purge
from node.commands.rules import rules
from node.commands.sources import sources
from node.commands.token import token

if TYPE_CHECKING:
    from node.config import Config

NOTICE = "Research software, not a medical device. Its findings must not be used for diagnosis."


@click.group(epilog=NOTICE, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("cspine-node"), prog_name="cspine")
def main() -> None:
    """AI node for cervical spine CT: receives Series, finds C1..C7 and fractures, returns DICOM SEG and SR."""


@main.command()
@config_option
def serve(config_path: Path | None) -> None:
    """Run the node until it is stopped (Ctrl-C or SIGTERM).

    Receives CT Series by C-STORE, analyses each one when it is complete, and delivers SEG, SR and findings.json to the
    configured destinations.
    """
    config = load_config(config_path)
    from node.process import set_up_logging
    from node.service import StartError, TakenError
    from node.service import serve as run

    set_up_logging(config.log_level)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        run(config, stopping, on_started=lambda: _say_how_to_use(config))
    except StartError as error:
        fail(f"The node cannot start: {error}.", EXIT_FAILED)
    except TakenError as error:
        click.echo(f"The node stopped: {error}.", err=True)
        os._exit(EXIT_FAILED)  # as below
    # Python would wait for threads, and one may be with a destination that hangs; that delivery is still due.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _say_how_to_use(config: "Config") -> None:
    receive = config.receive
    click.echo(f"\nC-Spine Node is ready. {NOTICE}\n")
    click.echo(f"  Send CT Series to  AE title {receive.ae_title}, {receive.host}:{receive.port}")
    click.echo(f"  for example        cspine send DIR --to {receive.host}:{receive.port} --aet {receive.ae_title}")
    for source in config.sources.each:
        click.echo(f"  Watched            {source.where}")
    for destination in config.deliver.destinations:
        click.echo(f"  Results go to      {destination.where}")
    if config.web.enabled:
        scheme = "https" if config.web.tls else "http"
        root = config.web.public_url or f"{scheme}://{config.web.host}:{config.web.port}"
        click.echo(f"  Cases, DICOMweb    {root}/, {root}/dicom-web")
    click.echo("  What is going on   cspine cases\n  Stop               Ctrl-C\n")


@main.command()
def demo() -> None:
    """Watch the node work on two made-up studies, in a temporary folder and on free ports.

    Starts the node, sends one intact and one fractured phantom by C-STORE, receives SEG and SR back as a PACS would,
    and compares what they say with the truth. Exit status 0 only if they agree.
    """
    from node.demo import run_demo
    from node.send import SendError
    from node.service import StartError

    try:
        agrees = run_demo()
    except (SendError, StartError) as error:
        fail(f"The demo cannot run: {error}.", EXIT_FAILED)
    if not agrees:
        fail("The demo failed: see above.", EXIT_FAILED)


@main.command()
@click.argument("series_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", "out_dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the results."
)
@config_option
def analyze(series_dir: Path, out_dir: Path, config_path: Path | None) -> None:
    """Analyse the CT Series in SERIES_DIR, without any network.

    Writes findings.json, vertebrae.seg.dcm, report.sr.dcm and, if there are any, fractures.seg.dcm into the --out
    folder. Exit status 3 when the Series cannot be analysed; stderr says why.
    """
    config = load_config(config_path)
    from model import BundleError, DecodePool, SeriesError, load_pipeline
    from node.analyse import analyse_series
    from node.complete import series_rules
    from node.deliver import copy_results
    from node.encode import NodeIdentity, conclude
    from node.process import be_child, set_up_logging

    set_up_logging("WARNING")
    paths, _ = dicom_files(series_dir, EXIT_NOT_ANALYSABLE)
    try:
        pipeline = load_pipeline(config.analyse.bundle, config.analyse.device, config.analyse.threads)
    except (BundleError, ValueError) as error:  # ValueError: there is no such device
        fail(str(error), EXIT_USAGE)
    rules, node = series_rules(config.complete), NodeIdentity(ae_title=config.receive.ae_title)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".cspine-", dir=out_dir) as scratch,
            DecodePool(config.analyse.threads, be_child, ("WARNING",)) as decode_pool,
        ):
            results = analyse_series(paths, Path(scratch) / "results", pipeline, rules, node, decode_pool=decode_pool)
            copy_results(results.folder, out_dir)
    except SeriesError as error:
        fail(str(error), EXIT_NOT_ANALYSABLE)
    except OSError as error:
        fail(f"{error.filename or out_dir}: {error.strerror}.", EXIT_FAILED)
    for warning in results.findings.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(conclude(results.findings))
    click.echo(f"Analysed in {results.findings.timings_s['total']:.1f} s. Results: {out_dir}")
    click.echo(f"Model {pipeline.info.name} {pipeline.info.version}: {pipeline.info.trained_on}\n{NOTICE}")


_pem_file = click.Path(exists=True, dir_okay=False, path_type=Path)


def _parse_address(_context: Any, _parameter: Any, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise click.BadParameter(f"{value!r} is not HOST:PORT, for example 127.0.0.1:11112.")
    return host.strip("[]"), int(port)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "address", metavar="HOST:PORT", required=True, callback=_parse_address, help="Where to send.")
@click.option("--aet", "called", required=True, metavar="CALLED", help="AE title of the receiver.")
@click.option("--from", "calling", default="CSPINE-SEND", show_default=True, metavar="CALLING", help="Our AE title.")
@click.option("--tls", "use_tls", is_flag=True, help="Under TLS; the options below imply it.")
@click.option(
    "--tls-ca", metavar="PEM", type=_pem_file, help="Authorities of its certificate.  [default: the system's]"
)
@click.option("--tls-certificate", metavar="PEM", type=_pem_file, help="Our certificate, where it wants to see one.")
@click.option("--tls-key", metavar="PEM", type=_pem_file, help="The key of our certificate.")
def send(
    folder: Path,
    address: tuple[str, int],
    called: str,
    calling: str,
    use_tls: bool,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Send every DICOM file under DIR by C-STORE over one association."""
    from pydantic import ValidationError
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from node.config import DicomDestination
    from node.peers import ClientTls
    from node.process import set_up_logging
    from node.send import SendError, send_files

    set_up_logging("WARNING")
    try:
        host, port = address
        tls = None
        if use_tls or tls_ca or tls_certificate or tls_key:
            tls = ClientTls(ca=tls_ca, certificate=tls_certificate, key=tls_key)
        peer = DicomDestination(type="dicom", name="to", host=host, port=port, ae_title=called, tls=tls)
        caller = DicomDestination(type="dicom", name="from", host=host, port=port, ae_title=calling)
    except ValidationError as error:
        fault = error.errors()[0]
        about = "" if isinstance(fault["input"], dict) else f"{fault['input']!r}: "
        fail(f"{about}{fault['msg'].removeprefix('Value error, ')}.", EXIT_USAGE)
    paths, num_others = dicom_files(folder, EXIT_USAGE)
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:2], MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("Sending", total=len(paths))
            refused = send_files(
                paths, peer, calling_ae_title=caller.ae_title, on_answer=lambda _: progress.advance(task)
            )
    except SendError as error:
        fail(f"{error}.", EXIT_FAILED)
    seconds = time.perf_counter() - started
    num_sent = len(paths) - len(refused)
    skipped = f", {num_others} files that are not DICOM left out" if num_others else ""
    click.echo(f"{num_sent} of {len(paths)} Instances sent in {seconds:.1f} s{skipped}.")
    for reason, number in Counter(item.reason for item in refused).most_common(10):
        click.echo(f"{number} refused: {reason}.", err=True)
    if refused:
        sys.exit(EXIT_FAILED)


@main.command()
@config_option
def check(config_path: Path | None) -> None:
    """Check that the node can run: ports, certificates, disk, model, peers, archives, destinations, secrets.

    While it runs, too. Exit status 1 if anything is wrong.
    """
    config = load_config(config_path)
    from node.check import run_checks
    from node.process import set_up_logging

    set_up_logging("CRITICAL")
    sound = True
    for name, problem, detail in run_checks(config):
        sound &= not problem
        mark = click.style("failed", fg="red") if problem else click.style("ok    ", fg="green")
        click.echo(f"{mark}  {name:<24}  {problem or detail}")
    if not sound:
        sys.exit(EXIT_FAILED)


for _command in (
    *(cases, pause, resume, retry, delete),
    *(conformance, deliveries, fetch, models, notifications, purge, rules, sources, token),
):
    main.add_command(_command)
