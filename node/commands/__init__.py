"""What the commands of `cspine` share; those that are not in `node/cli.py` are modules here, one each.

Everything heavy is imported inside the command that needs it, so that `--help` is quick.
"""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from node.config import Config
    from node.index import Index

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_ANALYSABLE = 1, 2, 3

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Configuration file. Without it: ./config.yaml if there is one, else the built-in defaults.",
)


def fail(message: str, status: int) -> NoReturn:
    """Ends the command: the message on stderr, the exit status."""
    click.echo(message, err=True)
    sys.exit(status)


def load_config(path: Path | None) -> "Config":
    """The named configuration, else ./config.yaml, else the defaults; ends the command when it has faults."""
    from node.config import ConfigError
    from node.config import load_config as load

    here = Path("config.yaml")
    try:
        return load(path or (here if here.exists() else None))
    except ConfigError as error:
        fail(str(error), EXIT_USAGE)


def dicom_files(folder: Path, status: int) -> tuple[list[Path], int]:
    """The DICOM files under a folder, and the number of others; ends the command when there is none."""
    from node.send import find_dicom_files

    try:
        paths, num_others = find_dicom_files(folder)
    except OSError as error:
        fail(f"{error.filename or folder} cannot be read: {error.strerror}.", status)
    if not paths:
        fail(f"{folder} holds no DICOM file ({num_others} other files).", status)
    return paths, num_others


@contextmanager
def open_index(config: "Config", *, create: bool = False, acts: bool = False) -> Iterator["Index"]:
    """The database of a configuration; ends the command when it cannot be used, or there is none yet.

    create: then it is made. acts: the command does something to what is in it, so nothing there is a failure.
    """
    from node.index import DatabaseError, Index

    if not create and config.database is None and not (config.data_dir / "cspine.sqlite").exists():
        status = EXIT_FAILED if acts else 0
        fail(f"Nothing has been received yet: there is no database in {config.data_dir}.", status)
    try:
        index = Index(config.data_dir, config.database)
    except DatabaseError as error:
        fail(f"{str(error)[0].upper()}{str(error)[1:]}.", EXIT_FAILED)
    with closing(index):
        yield index
