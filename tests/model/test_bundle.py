"""Bundles: what was exported comes back, and anything else is refused with a sentence."""

import json
import resource
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model.bundle import (
    VERTEBRA_WEIGHTS,
    Bundle,
    BundleError,
    ClassifySettings,
    Networks,
    RefineSettings,
    RegionSettings,
    SegmentSettings,
    StudySettings,
    TrainingData,
    read_bundle,
    write_bundle,
)
from model.calibrate import Challenge, Platt
from model.findings import ModelInfo
from model.levels import OUTPUTS

SMALL = Bundle(
    folder=Path(),
    info=ModelInfo(name="test", version="1", trained_on="Trained on nothing.", operating_point=0.5),
    segment=SegmentSettings(channels=(4, 8), spacing_mm=3.0),
    classify=ClassifySettings(
        encoder="residual-4-8", num_hidden=4, num_slices=5, num_pixels=16, pixel_mm=1.0, region_threshold=0.5
    ),
    metrics={"anything": [1, 2]},
)

FULL = replace(
    SMALL,
    info=replace(SMALL.info, level_operating_points={"C7": 0.25}),
    refine=RefineSettings(channels=(4, 8), in_channels=4, spacing_mm=1.0),
    classify=replace(SMALL.classify, num_heads=7, num_layers=2, window_hu=(-500.0, 1300.0)),
    num_folds=2,
    study=StudySettings(num_hidden=3),
    regions=RegionSettings(encoder="residual-4-8", weight=0.25),
    calibration={"C1": Platt(scale=0.5, offset=-1.0), "patient_overall": Platt()},
    challenge=Challenge(platt=dict.fromkeys(OUTPUTS, Platt()), undetermined=dict.fromkeys(OUTPUTS, 0.1)),
    training_data=(TrainingData(name="made up", licence="MIT", use="training"),),
)


def make_bundle(folder: Path, bundle: Bundle = SMALL) -> tuple[Bundle, Networks]:
    bundle = replace(bundle, folder=folder)
    networks = bundle.new_networks()
    write_bundle(bundle, networks)
    return bundle, networks


CLASSIFY = asdict(SMALL.classify)


def change_json(folder: Path, /, **changes: Any) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFERENCE = replace(SMALL, segment=SegmentSettings(encoder="residual-4-8", spacing_mm=1.0))


@pytest.mark.parametrize("bundle", [SMALL, FULL, REFERENCE], ids=["small", "full", "reference"])
def test_what_was_written_comes_back(tmp_path: Path, bundle: Bundle) -> None:
    written, networks = make_bundle(tmp_path, bundle)

    read = read_bundle(tmp_path)

    assert read == written
    loaded = read.load_networks().by_file()
    assert set(loaded) == {path.name for path in tmp_path.glob("*.safetensors")}
    for name, original in networks.by_file().items():
        assert not loaded[name].training
        torch.testing.assert_close(loaded[name].state_dict(), original.state_dict())


@pytest.mark.parametrize("top", ["", "folder/"])
@pytest.mark.parametrize("also", [(), ("__MACOSX/folder/._bundle.json",)], ids=["alone", "from a Mac"])
def test_a_bundle_may_be_one_zip_file(tmp_path: Path, top: str, also: tuple[str, ...]) -> None:
    """Of the files, or of the folder with them, as whoever zips a folder gets it."""
    written, networks = make_bundle(tmp_path / "folder", FULL)
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for name in also:
            archive.writestr(name, b"Mac OS X")
        for path in (tmp_path / "folder").iterdir():
            archive.write(path, top + path.name)

    read = read_bundle(tmp_path / "bundle.zip")

    assert replace(read, folder=written.folder) == written
    loaded = read.load_networks().by_file()
    for name, original in networks.by_file().items():
        torch.testing.assert_close(loaded[name].state_dict(), original.state_dict())


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_flipped_bits_is_refused(tmp_path: Path, compression: int) -> None:
    make_bundle(tmp_path / "folder")
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for part in sorted((tmp_path / "folder").iterdir()):
            archive.write(part, part.name)
        middle = archive.getinfo(VERTEBRA_WEIGHTS).header_offset + 500
    content = bytearray(path.read_bytes())
    for byte in range(middle, middle + 8):
        content[byte] ^= 0xFF
    path.write_bytes(content)

    with pytest.raises(BundleError, match=rf"{VERTEBRA_WEIGHTS} cannot be read \((Bad CRC|Error -3)"):
        read_bundle(path)


def test_a_zip_of_two_bundles_is_refused_since_nobody_knows_which(tmp_path: Path) -> None:
    make_bundle(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in (tmp_path / "folder").iterdir():
            archive.write(path, f"one/{path.name}")
            archive.write(path, f"two/{path.name}")

    with pytest.raises(BundleError, match="or a zip of it alone"):
        read_bundle(tmp_path / "bundle.zip")


def test_a_file_that_is_no_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"anything")

    with pytest.raises(BundleError, match=r"No model bundle in .*model\.pt"):
        read_bundle(tmp_path / "model.pt")


def test_networks_that_the_description_does_not_name_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="describes"):
        write_bundle(replace(SMALL, folder=tmp_path), FULL.new_networks())

    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_not_written_to_its_end_is_none_and_spoils_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill, which undoes nothing either."""
    before, _ = make_bundle(tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    save = safetensors.torch.save_file

    def save_once(content: dict[str, torch.Tensor], path: Path) -> None:
        if path.name != VERTEBRA_WEIGHTS:
            raise KeyboardInterrupt
        save(content, path)

    with monkeypatch.context() as killed:
        killed.setattr(safetensors.torch, "save_file", save_once)
        for name in ("old", "new"):
            with pytest.raises(KeyboardInterrupt):
                make_bundle(tmp_path / name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".unfinished"]
    read_bundle(tmp_path / "old").load_networks()
    make_bundle(tmp_path / "old", replace(before, metrics={}))
    read_bundle(tmp_path / "old").load_networks()
    assert {"notes.txt", *before.file_names, "bundle.json"} == {path.name for path in (tmp_path / "old").iterdir()}


def test_weights_for_which_the_disk_has_no_room_are_an_os_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"vertebra_unet\.safetensors cannot be written: .*too large"):
            make_bundle(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_shipped_bundle_is_whole_small_and_honest_about_its_training() -> None:
    bundle = read_bundle()

    bundle.load_networks()
    assert "phantom" in bundle.info.trained_on
    assert sum(path.stat().st_size for path in bundle.folder.iterdir()) < 25_000_000


@pytest.mark.parametrize("name", replace(FULL, folder=Path()).file_names)
def test_changed_or_missing_weights_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path, FULL)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)

    with pytest.raises(BundleError, match=rf"{name} is damaged.*sha256"):
        read_bundle(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing"):
        read_bundle(tmp_path)


def test_a_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"No model bundle in {tmp_path / 'nowhere'}"):
        read_bundle(tmp_path / "nowhere")


def test_broken_json_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text("{")

    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1; this version reads format 2"),
        ({"segment": {"channels": [4, 8]}}, "segment lacks spacing_mm"),
        ({"segment": {"spacing_mm": 3.0}}, "either channels, for a 3D U-Net, or an encoder"),
        ({"segment": {"channels": [4, 8], "spacing_mm": "3"}}, "spacing_mm is '3', which is not of type float"),
        ({"segment": {"channels": [4, 8.5], "spacing_mm": 3}}, r"channels\[1\] is 8.5"),
        ({"segment": {"channels": [4, 8], "spacing_mm": 10**400}}, "spacing_mm is 1000"),
        ({"segment": {"channels": [4, 8], "spacing_mm": 3, "turbo": 1}}, "segment has turbo, which this version does"),
        ({"segment": {"channels": [4], "spacing_mm": 3}}, r"segment.channels is \[4\]; two or more numbers from 1 on"),
        ({"segment": {"channels": [4, 8], "spacing_mm": float("nan")}}, "segment.spacing_mm is nan; it must be from"),
        ({"refine": {"channels": [4, -8], "in_channels": 4, "spacing_mm": 1}}, r"refine.channels is \[4, -8\]"),
        ({"classify": CLASSIFY | {"num_slices": 1}}, "classify.num_slices is 1; it must be from 2"),
        ({"classify": CLASSIFY | {"pixel_mm": 0}}, "classify.pixel_mm is 0.0; it must be from 0.1 to 10"),
        ({"classify": CLASSIFY | {"region_threshold": 50}}, "classify.region_threshold is 50.0"),
        ({"classify": CLASSIFY | {"window_hu": [0, float("inf")]}}, "classify.window_hu is"),
        ({"turbo": 1}, "bundle.json has turbo"),
        ({"folder": "/elsewhere"}, "folder is '/elsewhere'"),
        ({"metrics": None}, "metrics is None"),
        ({"num_folds": 0}, "num_folds is 0"),
        ({"num_folds": True}, "num_folds is True"),
        ({"calibration": {"C8": {"scale": 1.0, "offset": 0.0}}}, "calibration has C8"),
        ({"calibration": {"C1": {"scale": -1.0, "offset": 0.0}}}, "scale -1.0"),
        ({"regions": {"encoder": "residual-4-8", "weight": 1.5}}, "regions.weight is 1.5"),
        ({"info": {"name": "n", "version": "1", "trained_on": "", "operating_point": 50.0}}, "50.0 is not"),
        ({"sha256": {}}, "damaged"),
        ({"sha256": {"other.safetensors": ""}}, "sha256 names other.safetensors"),
    ],
)
def test_an_incomplete_or_unknown_description_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_bundle(tmp_path)
    change_json(tmp_path, **changes)

    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    change_json(tmp_path, segment={"channels": [4, 16], "spacing_mm": 3.0})

    with pytest.raises(BundleError, match="does not fit the architecture"):
        read_bundle(tmp_path).load_networks()


def test_slices_that_the_encoder_cannot_read_are_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    change_json(tmp_path, classify=CLASSIFY | {"num_pixels": 18})

    with pytest.raises(BundleError, match="num_pixels is 18; a multiple of 4 is needed"):
        read_bundle(tmp_path).load_networks()


@pytest.mark.parametrize(
    ("encoder", "message"), [("transformer", "no encoder 'transformer'"), ("timm:resnet18", "needs timm")]
)
def test_an_encoder_that_cannot_be_built_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    make_bundle(tmp_path)
    classify = json.loads((tmp_path / "bundle.json").read_text())["classify"]
    change_json(tmp_path, classify=classify | {"encoder": encoder})

    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path).load_networks()


def test_a_bundle_is_checked_without_torch() -> None:
    code = "import sys, model.bundle; model.bundle.read_bundle(); print('torch' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "False"
