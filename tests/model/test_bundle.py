"""Bundles: what was exported comes back, and anything else is refused with a sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.bundle import (
    FRACTURE_WEIGHTS,
    REFINER_WEIGHTS,
    VERTEBRA_WEIGHTS,
    Bundle,
    BundleError,
    ClassifySettings,
    Networks,
    RefineSettings,
    SegmentSettings,
    read_bundle,
    write_bundle,
)
from model.findings import ModelInfo


def make_bundle(folder: Path, refine: RefineSettings | None = None) -> tuple[Bundle, Networks]:
    bundle = Bundle(
        folder=folder,
        info=ModelInfo(name="test", version="1", trained_on="Trained on nothing.", operating_point=0.5),
        segment=SegmentSettings(channels=(4, 8), spacing_mm=3.0),
        refine=refine,
        classify=ClassifySettings(
            channels=(4, 8), num_hidden=4, num_slices=5, num_pixels=16, pixel_mm=1.0, region_threshold=0.5
        ),
        metrics={"anything": [1, 2]},
    )
    networks = bundle.new_networks()
    write_bundle(bundle, networks)
    return bundle, networks


def change_json(folder: Path, **changes: Any) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("refine", [None, RefineSettings(channels=(4, 8), in_channels=4, spacing_mm=1.0)])
def test_what_was_written_comes_back(tmp_path: Path, refine: RefineSettings | None) -> None:
    written, networks = make_bundle(tmp_path, refine)

    read = read_bundle(tmp_path)

    assert read == written
    loaded = read.load_networks().by_file()
    assert loaded.keys() == networks.by_file().keys()
    assert (REFINER_WEIGHTS in loaded) == (refine is not None)
    for name, original in networks.by_file().items():
        assert not loaded[name].training
        torch.testing.assert_close(loaded[name].state_dict(), original.state_dict())


def test_a_missing_refiner_is_named(tmp_path: Path) -> None:
    make_bundle(tmp_path, RefineSettings(channels=(4, 8), in_channels=4, spacing_mm=1.0))
    (tmp_path / REFINER_WEIGHTS).unlink()

    with pytest.raises(BundleError, match=rf"{REFINER_WEIGHTS} is missing"):
        read_bundle(tmp_path)


def test_the_shipped_bundle_is_whole_small_and_honest_about_its_training() -> None:
    bundle = read_bundle()

    bundle.load_networks()
    assert "phantom" in bundle.info.trained_on
    assert sum(path.stat().st_size for path in bundle.folder.iterdir()) < 10_000_000


@pytest.mark.parametrize("name", [VERTEBRA_WEIGHTS, FRACTURE_WEIGHTS])
def test_changed_weights_are_refused_by_their_hash(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)

    with pytest.raises(BundleError, match=rf"{name} is damaged.*sha256"):
        read_bundle(tmp_path)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    (tmp_path / FRACTURE_WEIGHTS).unlink()

    with pytest.raises(BundleError, match=rf"{FRACTURE_WEIGHTS} is missing"):
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
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"segment": {"channels": [4, 8]}}, "SegmentSettings needs"),
        ({"segment": {"channels": [4, 8], "spacing_mm": "3"}}, "spacing_mm is '3'"),
        ({"metrics": None}, "not a complete bundle"),
        ({"sha256": {}}, "damaged"),
    ],
)
def test_an_incomplete_description_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_bundle(tmp_path)
    change_json(tmp_path, **changes)

    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    change_json(tmp_path, segment={"channels": [4, 16], "spacing_mm": 3.0})

    with pytest.raises(BundleError, match="does not fit the architecture"):
        read_bundle(tmp_path).load_networks()


def test_a_bundle_is_checked_without_torch() -> None:
    code = "import sys, model.bundle; model.bundle.read_bundle(); print('torch' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "False"
