"""The file of `cspine-train --config`: defaults for the options of each command."""

from pathlib import Path
from typing import Any

import click
import yaml


def read_config(path: Path, group: click.Group) -> dict[str, dict[str, Any]]:
    """What click takes as `default_map`, of a YAML file such as `segment: {epochs: 10, batch-size: 4}`.

    Keys are commands and their options without the dashes in front.

    Raises:
        click.BadParameter: no YAML, no such command or option, or a value that the command line cannot give.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise click.BadParameter(
            f"{path} holds {content!r}; commands with their options are needed, segment: {{epochs: 10}}."
        )
    defaults: dict[str, dict[str, Any]] = {}
    for name, options in content.items():
        command = group.commands.get(name)
        if command is None:
            raise click.BadParameter(f"{path} names {name!r}; the commands are {', '.join(sorted(group.commands))}.")
        options = {} if options is None else options
        if not isinstance(options, dict):
            raise click.BadParameter(f"{path} gives {name} {options!r}; options with values are needed, epochs: 10.")
        known = {
            long.removeprefix("--"): parameter
            for parameter in command.params
            for long in parameter.opts
            if parameter.name
        }
        if unknown := sorted(map(str, options.keys() - known.keys())):
            raise click.BadParameter(
                f"{path} gives {name} {', '.join(unknown)}; its options are {', '.join(sorted(known))}."
            )
        defaults[name] = {}
        for key, value in options.items():
            if not _is_text_or_flag(known[key], value):
                given = "nothing" if value is None else repr(value)
                raise click.BadParameter(
                    f"{path} gives {name} {key} {given}; a value as on the command line is needed."
                )
            defaults[name][str(known[key].name)] = _as_given(known[key], value)
    return defaults


def _is_text_or_flag(option: click.Parameter, value: Any) -> bool:
    """Whether it is what the option takes: true or false of a flag, else text, a number, or a list of these."""
    if getattr(option, "is_flag", False):
        return isinstance(value, bool)
    each = value if isinstance(value, list) else [value]
    return not any(one is None or isinstance(one, bool | dict | list) for one in each)


def _as_given(option: click.Parameter, value: Any) -> Any:
    """A value of the file as on the command line: a list is numbers with commas, or what is given several times."""
    each = [str(one) for one in (value if isinstance(value, list) else [value])]
    if getattr(option, "multiple", False):
        return each
    return value if isinstance(value, bool) else ",".join(each)
