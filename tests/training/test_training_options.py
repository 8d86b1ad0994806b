"""Options of the commands that train: their defaults, and the file that gives others."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from model.networks import RegionUNet
from training.cli import main
from training.commands.config_file import read_config
from training.commands.everything import steps
from training.steps.regions import RegionsPlan, check_sides


def test_the_defaults_of_all_fit_one_another() -> None:
    def default(command: str, option: str) -> Any:
        return next(each.default for each in main.commands[command].params if each.name == option)

    plan = RegionsPlan(
        cut="any",
        encoder=default("regions", "encoder"),
        patch=default("regions", "patch"),
        num_rounds=1,
        threshold=0.5,
    )
    check_sides(plan, default("cut", "pixels"), RegionUNet(plan.encoder).unet.stride)
    assert default("classify", "encoder") == plan.encoder


def test_a_config_with_an_unknown_option_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("study: {epoch: 3}\n", encoding="utf-8")

    refused = CliRunner().invoke(main, ["--config", str(path), "study"])

    assert refused.exit_code == 2
    assert "gives study epoch; its options are" in refused.output


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("study: {epochs: }", "gives study epochs nothing; a value as on the command line is needed"),
        ("study: {epochs: true}", "gives study epochs True; a value as on the command line is needed"),
        ("segment: {channels: [8, [16]]}", "gives segment channels [8, [16]]; a value as on"),
        ("study: {fresh: 1}", "gives study fresh 1; a value as on the command line is needed"),
        ("study: {epochs: 1.5}", "'1.5' is not a valid integer range"),
        ("study: {learning-rate: .nan}", "'nan' is no finite number"),
        ("segment: {channels: 8, 16, 32}", "gives segment 16, 32; its options are"),
        ("study: {hidden: \xe4}", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_value_of_a_config_is_held_to_what_the_command_line_takes(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    command, where = text.split(":")[0], ["--cache", str(tmp_path), "--work", str(tmp_path), "--fold", "0"]

    refused = CliRunner().invoke(main, ["--config", str(path), command, *where])

    assert refused.exit_code == 2
    assert sentence in " ".join(refused.output.split())


def test_true_and_lists_of_a_config_are_flags_and_numbers_with_commas(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("segment: {label-all: true, channels: [8, 16], spacing-mm: 4}\n", encoding="utf-8")
    parent = click.Context(main, default_map=read_config(path, main))

    where = ["--cache", "c", "--work", "w", "--fold", "0"]
    given = main.commands["segment"].make_context("segment", where, parent=parent).params

    assert (given["label_all"], given["channels"], given["spacing_mm"]) == (True, (8, 16), 4.0)


def test_the_demo_config_and_every_step_of_all_are_commands_with_such_options(tmp_path: Path) -> None:
    read_config(Path(__file__).parents[2] / "training" / "demo.yaml", main)
    (tmp_path / "calibrate").mkdir()
    points = {"level_operating_point": 0.3, "patient_operating_point": 0.5}
    (tmp_path / "calibrate" / "calibration.json").write_text(json.dumps(points), encoding="utf-8")
    for name in ("predictions.csv", "train.csv", "subgroups.csv"):
        for folder in (tmp_path, tmp_path / "calibrate"):
            (folder / name).touch()

    # As downloaded from some places, the data set lies in a folder of its own.
    (tmp_path / "rsna-2022").mkdir()
    (tmp_path / "rsna-2022" / "train.csv").touch()
    (tmp_path / "cache.json").write_text(json.dumps({"source": str(tmp_path / "rsna-2022")}), encoding="utf-8")

    for name, *arguments in steps(tmp_path, tmp_path, tmp_path, tmp_path / "bundle", (0, 1)):
        if name == "evaluate":
            assert arguments[arguments.index("--truth") + 1] == str(tmp_path / "rsna-2022" / "train.csv")
        command = main.commands[name]
        assert isinstance(command, click.Command)
        command.make_context(name, arguments)


@pytest.mark.parametrize("text", ["[segment]", "segment: fast"])
def test_a_config_that_is_no_table_of_options_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")

    refused = CliRunner().invoke(main, ["--config", str(path), "segment"])

    assert refused.exit_code == 2
    assert "epochs: 10" in refused.output


@pytest.mark.parametrize(("text", "given"), [("0.4", ("0.4",)), ("[0.4, C2=0.3]", ("0.4", "C2=0.3"))])
def test_an_option_that_may_be_repeated_is_one_value_or_a_list(tmp_path: Path, text: str, given: tuple) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"evaluate: {{operating-point: {text}}}\n", encoding="utf-8")
    parent = click.Context(main, default_map=read_config(path, main))

    context = main.commands["evaluate"].make_context("evaluate", ["--out", str(tmp_path)], parent=parent)

    assert context.params["given_points"] == given


@pytest.mark.parametrize(
    ("command", "option", "sentence"),
    [
        ("all", ["--folds", "0,1,5"], "'0,1,5' names a fold that is none; they are 0 to 4"),
        ("calibrate", ["--level-specificity", "95"], "is not in the range 0<=x<=1"),
        ("segment", ["--epochs", "0"], "0 is not in the range x>=1"),
        ("segment", ["--learning-rate", "0"], "is not in the range x>0"),
        ("segment", ["--learning-rate", "inf"], "'inf' is no finite number"),
        ("calibrate", ["--level-specificity", "nan"], "'nan' is no finite number"),
        ("all", ["--work", ".x"], "'.x' is no name of a folder"),
        ("segment", ["--precision", "half"], "'half' is not one of 'auto', '32-true'"),
        ("segment", ["--seed", "-1"], "-1 is not in the range"),
        ("segment", ["--channels", "8"], "'8' must be two or more numbers from 1 on"),
        ("segment", ["--crop", "0,16,16"], "'0,16,16' must be two or more numbers from 1 on"),
        ("regions", ["--cut", "A", "--threshold", "50"], "is not in the range 0<=x<=1"),
        ("classify", ["--cut", "A", "--dropout", "1"], "is not in the range 0<=x<1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, command: str, option: list[str], sentence: str
) -> None:
    where = ["--cache", str(tmp_path / "cache"), "--work", str(tmp_path / "work")]
    more = {"all": ["--rsna", str(tmp_path), "--out", str(tmp_path / "out")], "calibrate": []}.get(
        command, ["--fold", "0"]
    )

    refused = CliRunner().invoke(main, [command, *where, *more, *option])

    assert refused.exit_code == 2
    assert sentence in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cut", "--cache", "c", "--name", "../x", "--masks", "truth"], "'../x' is no name of a folder"),
        (["cut", "--cache", "c", "--name", "", "--masks", "truth"], "'' is no name of a folder"),
        (["cut", "--cache", "c", "--name", ".x", "--masks", "truth"], "'.x' is no name of a folder"),
        (["prepare", "--rsna", ".", "--cache", "file"], "'file' is a file"),
        (["phantom", "--out", "o", "--patients", "0"], "0 is not in the range x>=1"),
        (["measure", "b", "--phantoms", "0"], "0 is not in the range x>=1"),
    ],
)
def test_a_place_or_number_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    refused = CliRunner().invoke(main, arguments)

    assert refused.exit_code == 2
    assert sentence in " ".join(refused.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", ['{"format": 1', "[]"])
def test_a_damaged_cache_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "cache.json").write_text(content, encoding="utf-8")

    refused = CliRunner().invoke(main, ["cut", "--cache", str(tmp_path), "--name", "x", "--masks", "truth"])

    assert refused.exit_code == 1
    assert f"{tmp_path / 'cache.json'} is damaged. Run `cspine-train prepare` again" in refused.output


def test_a_work_folder_that_is_the_current_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--rsna", "r", "--cache", "c", "--work", ".", "--out", "o"]

    assert main.commands["all"].make_context("all", arguments).params["work"] == tmp_path


def test_a_fold_that_is_named_twice_is_trained_once() -> None:
    arguments = ["--rsna", "r", "--cache", "c", "--work", "w", "--out", "o", "--folds", "0,1,0"]

    assert main.commands["all"].make_context("all", arguments).params["folds"] == (0, 1)


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = CliRunner().invoke(main, ["rsna-demo", "--out", str(tmp_path / "file"), "--studies", "1"])
    assert refused.exit_code == 1
    assert f"Error: {tmp_path / 'file'} cannot be written or read (File exists)." in refused.output
    assert CliRunner().invoke(main, ["-h"]).exit_code == 0
