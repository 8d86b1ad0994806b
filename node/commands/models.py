"""`cspine models`: which model bundles there are, whether they are whole, what they are made of, how two differ."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from node.commands import EXIT_FAILED, EXIT_USAGE, config_option, fail, load_config


@click.command()
@click.argument("paths", metavar="[BUNDLE]...", nargs=-1, type=click.Path(exists=True, path_type=Path))
@config_option
@click.option("--compare", is_flag=True, help="Where two differ; one alone is compared with the one in use.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def models(paths: tuple[Path, ...], config_path: Path | None, compare: bool, as_json: bool) -> None:
    """List and verify model bundles: those that come with the node, the one in use, and each BUNDLE.

    A BUNDLE is the folder or zip file that cspine-train exported, or a folder of such; `analyse.bundle` in the
    configuration names the one that the node uses. Every file is checked against its sha256, and loaded. Exit status 1
    if one of them cannot be used.
    """
    used = load_config(config_path).analyse.bundle
    from model import DEFAULT_BUNDLE, BundleError, find_bundles

    used = used or DEFAULT_BUNDLE
    if compare:
        both = (*paths, used)[:2]
        if not 1 <= len(paths) <= 2:
            fail("Name one bundle, to be compared with the one in use, or two.", EXIT_USAGE)
        try:
            first, second = (_described(path) for path in both)
        except BundleError as error:
            fail(str(error), EXIT_FAILED)
        _compare(first, second, as_json)
        return
    places = (DEFAULT_BUNDLE.parent, used, *paths)
    described = []
    for path in dict.fromkeys(path.resolve() for place in places for path in find_bundles(place)):
        try:
            found: dict[str, Any] = _described(path)
        except BundleError as error:
            found = {"path": str(path), "problem": str(error)}
        described.append({**found, "in_use": path == used.resolve()})
    if as_json:
        click.echo(json.dumps(described, indent=2))
    else:
        for number, found in enumerate(described):
            click.echo("\n" * (number > 0) + "\n".join(_text(found)))
    if any(found["problem"] for found in described):
        sys.exit(EXIT_FAILED)


def _described(folder: Path) -> dict[str, Any]:
    """The bundle in a folder or zip file as JSON tells it, with its place and size in bytes.

    Raises:
        BundleError: it cannot be used.
    """
    from model import read_bundle

    bundle = read_bundle(folder)
    bundle.load_networks()  # or files that are whole may still be of another architecture
    files = [folder] if folder.is_file() else [folder / name for name in bundle.file_names]
    size_bytes = sum(path.stat().st_size for path in files)
    return {"path": str(folder), "problem": "", "size_bytes": size_bytes, **bundle.to_dict()}


def _text(found: dict[str, Any]) -> Iterator[str]:
    used = click.style("  in use", fg="green") if found["in_use"] else ""
    if found["problem"]:
        yield f"{click.style('unusable', fg='red', bold=True)}  {found['path']}{used}\n  {found['problem']}"
        return
    info, classify = found["info"], found["classify"]
    yield click.style(f"{info['name']} {info['version']}", bold=True) + used
    yield f"  {found['path']}: {found['size_bytes'] / 1e6:.1f} MB, every sha256 is right"
    yield f"  {info['trained_on']}"
    for data in found["training_data"]:
        yield f"  learned from  {data['name']} ({data['licence']}): {data['use']}"
    yield f"  segments      by {_networks(found)}"
    yield (
        f"  classifies    by {classify['encoder']} on {classify['num_slices']} slices of {classify['num_pixels']} x "
        f"{classify['num_pixels']} at {classify['pixel_mm']:g} mm{_classifiers(found)}"
    )
    own = {level: at for level, at in info["level_operating_points"].items() if at != info["operating_point"]}
    of_levels = "".join(f", {level} {100 * at:g} %" for level, at in own.items())
    yield f"  present from  {100 * info['operating_point']:g} %{of_levels}"
    calibrated = ", ".join(found["calibration"]) or "nothing: read probabilities as scores"
    yield f"  calibrated    {calibrated}"
    yield from (f"  measured      {line}" for line in _metrics(found["metrics"]))


def _networks(found: dict[str, Any]) -> str:
    refined = f", refined at {found['refine']['spacing_mm']:g} mm" if found["refine"] else ""
    encoder = found["segment"]["encoder"]
    network = f"2.5D U-Net with {encoder}" if encoder else "3D U-Net"
    return f"{network} at {found['segment']['spacing_mm']:g} mm{refined}"


def _classifiers(found: dict[str, Any]) -> str:
    folds = found["num_folds"]
    parts = [f", {folds} folds"] if folds > 1 else []
    parts += [", levels seen together"] if found["study"] else []
    parts += [f", regions by {found['regions']['encoder']}"] if found["regions"] else []
    return "".join(parts)


def _metrics(metrics: dict[str, Any], name: str = "") -> Iterator[str]:
    """A line for each group of numbers."""
    plain = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    if plain:
        yield f"{name + ': ' if name else ''}{', '.join(f'{key} {value}' for key, value in plain.items())}"
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _metrics(value, f"{name} {key}".strip())


def _compare(first: dict[str, Any], second: dict[str, Any], as_json: bool) -> None:
    """What differs, leaf by leaf."""
    leaves = dict(_leaves(first)), dict(_leaves(second))
    names = dict.fromkeys([*leaves[0], *leaves[1]])
    pairs = {name: [side.get(name) for side in leaves] for name in names}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if as_json:
        click.echo(json.dumps(differing, indent=2))
        return
    rows = [(name, *("–" if value is None else str(value) for value in values)) for name, values in differing.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
    for name, mine, other in rows:
        click.echo(f"{name:<{widths[0]}}  {mine:<{widths[1]}}  {other}")
    click.echo(f"{len(differing.keys() - {'path'})} of {len(names) - 1} entries differ.")  # their places always do


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and list of those in a nested dict, by its dotted name."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}".strip("."))
    elif isinstance(value, list | tuple) and any(isinstance(part, dict) for part in value):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{name}[{number}]")
    else:
        yield name, value
