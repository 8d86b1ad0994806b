"""`cspine models`: lists, verifies and compares bundles."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from model.bundle import FRACTURE_WEIGHTS, read_bundle, write_bundle
from node.cli import main
from tests.untrained import write_untrained_bundle


@pytest.fixture
def config(tmp_path: Path, untrained_bundle: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"analyse:\n  bundle: {untrained_bundle}\n")
    return path


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", "--config", str(config), *arguments])


def listed(result: Result) -> dict[str, dict[str, Any]]:
    return {found["path"]: found for found in json.loads(result.stdout)}


def test_shipped_and_configured_bundles_are_listed_with_what_they_were_trained_on(
    config: Path, untrained_bundle: Path
) -> None:
    result = run(config)

    assert result.exit_code == 0
    assert "cspine-phantom 0.1.0\n" in result.stdout
    assert "untrained 0.0.1  in use\n" in result.stdout
    assert f"{untrained_bundle}: " in result.stdout
    assert "every sha256 is right" in result.stdout
    assert read_bundle().info.trained_on in result.stdout
    assert "3D U-Net at 2.5 mm" in result.stdout
    assert "residual-24-48-96-128 on 15 slices of 96 x 96 at 0.9 mm" in result.stdout
    assert "nothing: read probabilities as scores" in result.stdout
    assert "mean_dice" in result.stdout


def test_json_has_all_that_the_bundle_says(config: Path, untrained_bundle: Path) -> None:
    found = listed(run(config, "--json"))[str(untrained_bundle)]

    assert found["in_use"]
    assert found["problem"] == ""
    assert found["size_bytes"] == sum(path.stat().st_size for path in untrained_bundle.glob("*.safetensors"))
    assert found["info"]["trained_on"] == "Nothing."
    assert found["classify"]["encoder"] == "residual-4-8"


def test_bundles_in_a_folder_are_found_and_a_damaged_one_is_named(config: Path, tmp_path: Path) -> None:
    sound, damaged = write_untrained_bundle(tmp_path / "all" / "1"), write_untrained_bundle(tmp_path / "all" / "2")
    (damaged / FRACTURE_WEIGHTS).write_bytes(b"")

    result = run(config, "--json", str(tmp_path / "all"))

    assert result.exit_code == 1
    found = listed(result)
    assert found[str(sound)]["problem"] == ""
    assert not found[str(sound)]["in_use"]
    assert f"{FRACTURE_WEIGHTS} is damaged" in found[str(damaged)]["problem"]
    assert f"unusable  {damaged}" in run(config, str(tmp_path / "all")).stdout


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"residual-4-8"', '"resnext-foo"', "There is no encoder 'resnext-foo'"),
        ('"num_folds": 1', '"num_folds": 1000000000', "num_folds is 1000000000; 1 to 100 are possible"),
    ],
)
def test_a_whole_bundle_that_cannot_be_loaded_is_unusable(
    config: Path, tmp_path: Path, old: str, new: str, problem: str
) -> None:
    bundle = write_untrained_bundle(tmp_path / "other")
    text = (bundle / "bundle.json").read_text()
    assert old in text
    (bundle / "bundle.json").write_text(text.replace(old, new))

    result = run(config, "--json", str(bundle))

    assert result.exit_code == 1
    assert problem in listed(result)[str(bundle)]["problem"]


def test_a_folder_without_a_bundle_is_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    result = run(config, str(tmp_path / "empty"))

    assert result.exit_code == 1
    assert "No model bundle in" in result.stdout


def test_two_bundles_are_compared_entry_by_entry(config: Path, tmp_path: Path, untrained_bundle: Path) -> None:
    bundle = read_bundle(untrained_bundle)
    info = replace(bundle.info, version="0.0.2")
    other = replace(bundle, folder=tmp_path / "other", info=info, metrics={"auc": 0.9})
    write_bundle(other, bundle.load_networks())

    result = run(config, "--compare", "--json", str(tmp_path / "other"))
    text = run(config, "--compare", str(tmp_path / "other"), str(untrained_bundle)).stdout

    assert result.exit_code == 0
    differing = json.loads(result.stdout)
    assert differing.pop("path") == [str(tmp_path / "other"), str(untrained_bundle)]
    assert differing == {"info.version": ["0.0.2", "0.0.1"], "metrics.auc": [0.9, None]}
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["info.version", "0.0.2", "0.0.1"],
        ["metrics.auc", "0.9", "–"],
    ]
    assert text.splitlines()[-1].startswith("2 of ")


def test_bundles_that_differ_in_their_weights_alone_do_differ(
    config: Path, tmp_path: Path, untrained_bundle: Path
) -> None:
    bundle = read_bundle(untrained_bundle)
    networks = bundle.load_networks()
    for parameter in networks.fracture_nets[0].parameters():
        parameter.data.add_(1)
    write_bundle(replace(bundle, folder=tmp_path / "other"), networks)

    differing = json.loads(run(config, "--compare", "--json", str(tmp_path / "other")).stdout)

    assert differing.keys() == {"path", f"sha256.{FRACTURE_WEIGHTS}"}
    mine, used = differing[f"sha256.{FRACTURE_WEIGHTS}"]
    assert mine != used
    assert len(mine) == len(used) == 64


@pytest.mark.parametrize("num_given", [0, 3])
def test_comparing_takes_one_or_two(config: Path, untrained_bundle: Path, num_given: int) -> None:
    result = run(config, "--compare", *[str(untrained_bundle)] * num_given)

    assert result.exit_code == 2
    assert "Name one bundle" in result.stderr
