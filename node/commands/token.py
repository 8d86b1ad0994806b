"""`cspine token`: who may use the HTTP side."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, fail, load_config

if TYPE_CHECKING:
    from node.web.tokens import Tokens


@click.group()
def token() -> None:
    """Make, list and remove the tokens of DICOMweb clients and of the viewer's users."""


@token.command()
@click.argument("name")
@click.option(
    "--right",
    "rights",
    multiple=True,
    type=click.Choice(["read", "store", "delete"]),
    default=["read"],
    show_default=True,
    help="What it allows; may be given several times.",
)
@config_option
def make(name: str, rights: tuple[str, ...], config_path: Path | None) -> None:
    """Make a token called NAME, in place of one of the same name, and show it, once.

    Clients send it as "Authorization: Bearer TOKEN"; browsers as the password of any user. Only a hash of it is kept.
    """
    from node.web.tokens import RIGHTS

    if not name.strip() or not name.isprintable():
        fail(f"{name!r} is no name; name who will use the token, for example viewer.", EXIT_USAGE)
    with _open_tokens(config_path) as tokens:
        click.echo(tokens.make(name, tuple(right for right in RIGHTS if right in rights)))


@token.command("list")
@config_option
def list_them(config_path: Path | None) -> None:
    """List the tokens: name, rights, when it was made."""
    with _open_tokens(config_path) as tokens:
        for item in tokens.all():
            click.echo(f"{item.name}  {', '.join(item.rights)}  {item.made_at}")
        if not tokens.all():
            click.echo("There is no token; `cspine token make NAME` makes one.", err=True)


@token.command()
@click.argument("name")
@config_option
def remove(name: str, config_path: Path | None) -> None:
    """Remove a token; it is refused from now on."""
    with _open_tokens(config_path) as tokens:
        if not tokens.remove(name):
            fail(f"There is no token {name!r}; cspine token list shows those there are.", EXIT_FAILED)
    click.echo(f"{name} is removed.")


@contextmanager
def _open_tokens(config_path: Path | None) -> Iterator["Tokens"]:
    """The tokens of a configuration; ends the command when their file cannot be read or written."""
    from node.web.tokens import Tokens, TokensError

    data_dir = load_config(config_path).data_dir
    try:
        yield Tokens(data_dir)
    except TokensError as error:
        fail(f"{error}.", EXIT_FAILED)
    except OSError as error:
        fail(f"{error.filename or data_dir} cannot be used: {error.strerror}.", EXIT_FAILED)
