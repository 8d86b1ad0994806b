"""`cspine rules`: which rules are in force, and what they make of a folder of files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, dicom_files, load_config

if TYPE_CHECKING:
    from node.rules.explain import Explanation
    from node.rules.match import Condition

_COLOURS = {"analysed": "green", "skipped": "yellow", "refused": "red"}


@click.group()
def rules() -> None:
    """See and test the rules that say which Series are analysed."""


@rules.command()
@config_option
def show(config_path: Path | None) -> None:
    """Print the rules in force, as they stand in a configuration."""
    import yaml

    from node.rules.settings import as_written

    text = yaml.safe_dump({"rules": as_written(load_config(config_path).rules)}, sort_keys=False, allow_unicode=True)
    click.echo(text, nl=False)


@rules.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@config_option
@click.option("--from", "calling", default="", metavar="AET", help="AE title of the sender, for rules that ask for it.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one Series per line.")
def test(folder: Path, config_path: Path | None, calling: str, as_json: bool) -> None:
    """Explain rule by rule what would happen to every Series under DIR.

    Nothing is analysed or sent. Shows descriptions, which may hold anything. Exit status 0 if at least one Series would
    be analysed, 1 if none.
    """
    config = load_config(config_path)
    from node.complete import series_rules
    from node.process import set_up_logging
    from node.rules.explain import explain

    set_up_logging("WARNING")
    paths, _ = dicom_files(folder, EXIT_USAGE)
    found, num_unreadable = explain(paths, config.rules, series_rules(config.complete), calling)
    if as_json:
        for item in found:
            click.echo(json.dumps(item.to_dict()))
    else:
        _print(found)
    if num_unreadable:
        click.echo(f"{num_unreadable} files cannot be read and were left out.", err=True)
    if not any(item.verdict == "analysed" for item in found):
        raise SystemExit(EXIT_FAILED)


def _print(found: "list[Explanation]") -> None:
    study = ""
    for item in found:
        if item.study_instance_uid != study:
            study = item.study_instance_uid
            click.echo(f"Study {study}")
        traits = item.traits
        click.echo(f"\n  Series {item.series_instance_uid}  {_quoted(traits.series_description)}")
        click.echo(f"    {traits.num_slices} slices, {traits.plane}, kernel {traits.kernel_type}")
        for trial in item.decision.trials:
            click.echo(f"    {'matches' if trial.matches else 'no     '}  {trial.rule.name}")
            for condition in trial.when:
                click.echo(f"               {_words(condition, is_wanted=True)}")
            for condition in trial.unless:
                click.echo(f"        unless {_words(condition, is_wanted=False)}")
        if not any(trial.matches for trial in item.decision.trials):
            click.echo(f"    {'default':<7}  {item.decision.outcome.name.lower()}")
        verdict = click.style(f"{item.verdict:<8}", fg=_COLOURS[item.verdict], bold=True)
        click.echo(f"    {verdict} {item.reason}")
    num_analysed = sum(item.verdict == "analysed" for item in found)
    click.echo(f"\n{num_analysed} of {len(found)} Series would be analysed.")


def _words(condition: "Condition", *, is_wanted: bool) -> str:
    mark = click.style("yes" if condition.holds else "no ", fg="green" if condition.holds is is_wanted else "red")
    return f"{mark} {condition.attribute} {condition.wanted}: it is {_quoted(condition.found)}"


def _quoted(text: str) -> str:
    """Text from a file, safe on a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
