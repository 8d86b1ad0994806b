"""`cspine token`: who may use the HTTP side."""

from pathlib import Path

import click

from node.commands import EXIT_USAGE, config_option, fail, load_config


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
    from node.web.tokens import RIGHTS, Tokens

    config = load_config(config_path)
    config.data_dir.mkdir(parents=True, exist_ok=True)
    click.echo(Tokens(config.data_dir).make(name, tuple(right for right in RIGHTS if right in rights)))


@token.command("list")
@config_option
def list_them(config_path: Path | None) -> None:
    """List the tokens: name, rights, when it was made."""
    from node.web.tokens import Tokens

    for item in Tokens(load_config(config_path).data_dir).all():
        click.echo(f"{item.name}  {', '.join(item.rights)}  {item.made_at}")


@token.command()
@click.argument("name")
@config_option
def remove(name: str, config_path: Path | None) -> None:
    """Remove a token; it is refused from now on."""
    from node.web.tokens import Tokens

    if not Tokens(load_config(config_path).data_dir).remove(name):
        fail(f"There is no token {name!r}; cspine token list shows those there are.", EXIT_USAGE)
    click.echo(f"{name} is removed.")
