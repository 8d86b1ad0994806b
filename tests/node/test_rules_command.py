"""`cspine rules`: what a PACS administrator sees of the rules, and of what they make of a folder."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from pydicom import Dataset
from pydicom.uid import generate_uid

from node.config import Config, load_config
from node.rules.settings import RulesConfig
from tests.factories import SAGITTAL, make_ct_series, make_localizer, make_screen_save

ROOT = Path(__file__).parents[2]
REAL_CT = sorted((ROOT.parent / "shared" / "data" / "ct").glob("*"))

Cspine = Callable[..., Result]


@pytest.fixture(name="cspine")
def cspine_rules(cspine: Cspine) -> Cspine:
    """Runs `cspine rules` with arguments."""
    return partial(cspine, "rules")


def make_study(folder: Path) -> dict[str, str]:
    """Bone and soft tissue, a reformat, a scout and a dose report; SeriesInstanceUID of each by its name."""
    study = generate_uid()

    def kernel(name: str) -> Callable[[int, Dataset], None]:
        def edit(_: int, ds: Dataset) -> None:
            ds.ConvolutionKernel, ds.SeriesDescription = name, f"HWS {name}"

        return edit

    uids = {name: generate_uid() for name in ("bone", "soft", "sagittal", "scout", "dose")}
    for name, value in (("bone", "BONEPLUS"), ("soft", "STANDARD")):
        make_ct_series(
            folder / name,
            num_slices=32,
            spacing_mm=2.0,
            study_instance_uid=study,
            series_instance_uid=uids[name],
            edit=kernel(value),
        )
    make_ct_series(
        folder / "sagittal",
        num_slices=32,
        orientation=SAGITTAL,
        study_instance_uid=study,
        series_instance_uid=uids["sagittal"],
    )
    for name, make in (("scout", make_localizer), ("dose", make_screen_save)):
        path = make(folder / name / "1.dcm") if name == "scout" else make(folder / f"{name}.dcm")
        uids[name] = str(_read(path).SeriesInstanceUID)
    return uids


def _read(path: Path) -> Dataset:
    from pydicom import dcmread

    return dcmread(path, stop_before_pixels=True)


def test_every_series_is_explained(cspine: Cspine, tmp_path: Path) -> None:
    uids = make_study(tmp_path / "in")
    result = cspine("test", "in", "--json")
    found = {item["series_instance_uid"]: item for item in map(json.loads, result.stdout.splitlines())}
    assert {name: found[uid]["verdict"] for name, uid in uids.items()} == {
        "bone": "analysed",
        "soft": "skipped",
        "sagittal": "skipped",
        "scout": "skipped",
        "dose": "skipped",
    }
    assert result.exit_code == 0
    assert found[uids["soft"]]["reason"].endswith("is preferred (kernel_type bone, here soft)")
    assert uids["bone"] in found[uids["soft"]]["reason"]
    assert found[uids["scout"]]["reason"] == "rule 'localizers': a scout, not slices"
    assert found[uids["bone"]]["attributes"]["series_description"] == "HWS BONEPLUS"
    (decisive,) = [rule for rule in found[uids["sagittal"]]["rules"] if rule["matches"]]
    assert decisive["name"] == "other planes"
    assert decisive["when"] == [
        {"attribute": "plane", "wanted": "coronal or sagittal", "found": "sagittal", "holds": True}
    ]


def test_it_reads_as_text(cspine: Cspine, tmp_path: Path) -> None:
    uids = make_study(tmp_path / "in")
    text = cspine("test", "in").output
    scout = text[text.index(uids["scout"]) :].split("\n\n")[0]
    assert re.sub(" +", " ", scout).splitlines()[2:] == [
        " matches localizers",
        " yes image_type LOCALIZER or *SCOUT* or *TOPOGRAM*: it is ORIGINAL\\PRIMARY\\LOCALIZER",
        " skipped rule 'localizers': a scout, not slices",
    ]
    assert "HWS STANDARD" in text
    assert "1 of 5 Series would be analysed." in text


def test_rules_of_a_configuration_are_tried(cspine: Cspine, tmp_path: Path) -> None:
    uids = make_study(tmp_path / "in")
    rule = {
        "name": "soft tissue of our scanner",
        "when": {"kernel": "STAND*", "calling_ae_title": "CT_ED"},
        "unless": {"series_description": "/thorax/"},
        "outcome": "analyse",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rules": {"series": [rule], "default": "skip"}}))
    result = cspine("test", "in", "--from", "CT_ED", "--json")
    analysed = [i for i in map(json.loads, result.stdout.splitlines()) if i["verdict"] == "analysed"]
    assert [item["series_instance_uid"] for item in analysed] == [uids["soft"]]
    assert cspine("test", "in").exit_code == 1  # from nobody in particular
    assert "no series_description /thorax/: it is HWS STANDARD" in re.sub(" +", " ", cspine("test", "in").output)


def test_what_cannot_be_analysed_is_told_from_what_is_skipped(cspine: Cspine, tmp_path: Path) -> None:
    make_ct_series(tmp_path / "in", num_slices=8)
    result = cspine("test", "in")
    assert result.exit_code == 1
    assert "refused  Series " in result.output
    assert "8 slices; at least 30 are needed" in result.output


def test_files_that_are_damaged_or_no_dicom(cspine: Cspine, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "in", num_slices=32, spacing_mm=2.0)
    (tmp_path / "in" / "notes.txt").write_text("no DICOM")
    (tmp_path / "in" / "cut.dcm").write_bytes(paths[0].read_bytes()[:140])
    assert cspine("test", "in").exit_code == 0
    (tmp_path / "none").mkdir()
    assert cspine("test", "none").exit_code == 2


@pytest.mark.filterwarnings("ignore:Found unknown escape")
def test_a_description_cannot_drive_the_terminal(cspine: Cspine, tmp_path: Path) -> None:
    def edit(_: int, ds: Dataset) -> None:
        ds.SeriesDescription = "red \x1b[31m"

    make_ct_series(tmp_path / "in", num_slices=2, edit=edit)
    assert "\x1b[31m" not in cspine("test", "in").output


def test_show_prints_what_could_stand_in_a_configuration(cspine: Cspine, tmp_path: Path) -> None:
    result = cspine("show")
    assert result.exit_code == 0
    assert RulesConfig.model_validate(yaml.safe_load(result.output)["rules"]) == RulesConfig()
    (tmp_path / "config.yaml").write_text("rules: {analyse_all: true, prefer: [thinnest]}\n")
    shown = tmp_path / "shown.yaml"
    shown.write_text(cspine("show").output)
    assert load_config(shown).rules == load_config(tmp_path / "config.yaml").rules


@pytest.mark.parametrize("folder", REAL_CT, ids=lambda path: path.name)
def test_the_default_rules_let_real_ct_pass(cspine: Cspine, folder: Path) -> None:
    result = cspine("test", folder)
    assert result.exit_code == 0
    assert "1 of 1 Series would be analysed." in result.output


# ---- the examples of the documentation ----


def examples() -> list[Any]:
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("example", examples(), ids=lambda text: text.splitlines()[0])
def test_every_example_in_the_documentation_loads(tmp_path: Path, example: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(example, encoding="utf-8")
    assert load_config(path).rules != Config().rules or load_config(path).complete != Config().complete
