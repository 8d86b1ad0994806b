"""What `prepare` makes of a data set with every trap of RSNA 2022, held against the phantoms it was drawn from."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.uid import JPEGLosslessSV1

from model import LEVELS, Grid
from model.phantom import Phantom, write_series
from tests.training.rsna_data import NUM_STUDIES, SPACING_MM, make_cache, uid
from training.cli import main
from training.drawn_boxes import DrawnBox
from training.rsna import Cache, CacheError, Settings, SourceStudy, labels_on, prepare, read_source
from training.rsna.demo import SMALL, draw_study, traits
from training.rsna.study import prepare_study

USABLE = [number for number in range(NUM_STUDIES) if not traits(number).is_sagittal]
WITH_MASK = [number for number in USABLE if traits(number).has_mask]


@cache
def truth(number: int) -> Phantom:
    return draw_study(number, 0, SMALL)


def in_slices(number: int) -> slice:
    """Z indices of the phantom that the study's volume has."""
    return slice(0, -1) if traits(number).has_odd_slice else slice(None)


# ---- the data set has the traps ----


def test_the_generated_files_have_the_traps_of_the_real_ones(rsna_folder: Path) -> None:
    first = pydicom.dcmread(rsna_folder / "train_images" / uid(0) / "1.dcm")
    from_feet = pydicom.dcmread(rsna_folder / "train_images" / uid(1) / "1.dcm")
    from_feet_last = pydicom.dcmread(rsna_folder / "train_images" / uid(1) / "9.dcm")

    assert first.file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert "Modality" not in from_feet
    assert "SOPClassUID" not in from_feet
    assert from_feet.ImagePositionPatient[2] < from_feet_last.ImagePositionPatient[2]
    with (rsna_folder / "train.csv").open() as file:
        rows = {row["StudyInstanceUID"]: row for row in csv.DictReader(file)}
    for number in range(NUM_STUDIES):
        levels = [(truth(number).fractures == label).any() for label in range(1, 8)]
        assert [rows[uid(number)][level] == "1" for level in LEVELS] == levels
        assert (rows[uid(number)]["patient_overall"] == "1") == any(levels)


# ---- voxels, masks and boxes are where they belong ----


@pytest.mark.parametrize("number", USABLE)
def test_slices_are_sorted_by_position_and_lie_where_they_were(rsna_cache: Cache, number: int) -> None:
    study, phantom = rsna_cache.study(uid(number)), truth(number)
    volume = study.volume()

    there = np.abs(volume.voxels_hu - np.clip(phantom.voxels_hu[in_slices(number)], -1024, None))
    wrong = np.flatnonzero(there.max(axis=(1, 2)))
    assert wrong.tolist() == ([len(there) // 2] if traits(number).lacks_slice else [])
    np.testing.assert_allclose(volume.grid.affine, phantom.grid.affine, atol=1e-4)
    np.testing.assert_array_equal(study.grid.affine, volume.grid.affine)


@pytest.mark.parametrize("number", USABLE)
def test_the_neck_has_bone_where_the_phantom_has_it(rsna_cache: Cache, number: int) -> None:
    study, phantom = rsna_cache.study(uid(number)), truth(number)
    vertebrae = labels_on(phantom.vertebrae, phantom.grid, study.neck_grid)

    hu = study.neck_hu()

    assert hu.dtype == np.int16
    assert study.neck_grid.spacing_mm == pytest.approx((SPACING_MM,) * 3)
    assert hu[vertebrae > 0].mean() > hu[vertebrae == 0].mean() + 300
    assert (vertebrae > 0).sum() * SPACING_MM**3 == pytest.approx(
        (phantom.vertebrae > 0).sum() * phantom.grid.voxel_volume_mm3, rel=0.05
    )


@pytest.mark.parametrize("number", WITH_MASK)
def test_masks_cover_their_vertebrae_however_they_are_stored(rsna_cache: Cache, number: int) -> None:
    study, phantom = rsna_cache.study(uid(number)), truth(number)

    mask, labels = study.mask(), study.labels()

    assert mask is not None
    assert labels is not None
    vertebrae = phantom.vertebrae[in_slices(number)]
    assert (mask != vertebrae).sum() < 0.002 * (vertebrae > 0).sum()  # crumbs of the phantom count as stray voxels
    np.testing.assert_array_equal(labels, labels_on(mask, study.grid, study.neck_grid))
    assert set(np.unique(labels)) == set(range(9))


def test_only_the_mask_that_was_upside_down_was_turned(rsna_cache: Cache) -> None:
    report = json.loads((rsna_cache.folder / "report.json").read_text())

    turned = [study for study, record in report["studies"].items() if (record["mask"] or {}).get("was_reversed")]
    assert turned == [uid(5)]
    assert report["studies"][uid(1)]["mask"]["num_stray_voxels"] >= 32


@pytest.mark.parametrize("number", USABLE)
def test_boxes_lie_on_the_fractures(rsna_cache: Cache, number: int) -> None:
    study, phantom = rsna_cache.study(uid(number)), truth(number)
    fractures = phantom.fractures[in_slices(number)] > 0

    assert bool(study.boxes) == (traits(number).has_boxes and bool(fractures.any()))
    if study.boxes:
        assert study.boxes_on(study.grid)[fractures].all()
    for box in study.boxes:
        inside = fractures[box.z, int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)]
        assert inside.any()


def test_boxes_are_in_the_same_place_on_any_grid(rsna_cache: Cache) -> None:
    study = rsna_cache.study(uid(0))

    on_neck = study.boxes_on(study.neck_grid)

    there = study.neck_grid.to_lps_mm(np.argwhere(on_neck)).mean(axis=0)
    here = study.grid.to_lps_mm(np.argwhere(study.boxes_on(study.grid))).mean(axis=0)
    assert np.abs(there - here).max() < 1.5


# ---- what is left out is named; folds ----


def test_what_was_left_out_or_changed_is_named_with_the_reason(rsna_cache: Cache) -> None:
    lines = (rsna_cache.folder / "report.txt").read_text().splitlines()

    said = {number: " ".join(line for line in lines if line.startswith(uid(number))) for number in range(NUM_STUDIES)}
    assert "sagittal" in said[3]
    assert "upside down" in said[5]
    assert "stray voxels" in said[1]
    assert "interpolated" in said[2]
    assert "another size" in said[4]
    assert said[7] == ""
    assert lines.index("Left out (1)") < next(i for i, line in enumerate(lines) if line.startswith(uid(3)))
    with pytest.raises(CacheError, match=r"report\.txt says why"):
        rsna_cache.study(uid(3))


def water_in_air(folder: Path) -> Path:
    """Files of a CT without bone."""
    grid = Grid.axial(shape=(32, 40, 40), spacing_mm=(2.5, 3.0, 3.0))
    voxels_hu = np.full(grid.shape, -1000, np.int16)
    voxels_hu[:, 8:32, 8:32] = 40
    empty = np.zeros(grid.shape, np.uint8)
    write_series(Phantom(voxels_hu=voxels_hu, grid=grid, vertebrae=empty, fractures=empty), folder)
    return folder


def test_a_study_that_cannot_be_used_says_why(rsna_folder: Path, tmp_path: Path) -> None:
    study = read_source(rsna_folder).studies[uid(1)]
    listed = replace(study, study_instance_uid="1.2.826.0.1.3680043.29952")
    nothing = replace(study, files=tmp_path / "nothing")
    no_bone = replace(study, files=water_in_air(tmp_path / "water"))

    def why(changed: SourceStudy) -> str:
        root = changed.files.parents[1]
        return str(prepare_study(root, changed, tmp_path / "cache", Settings(spacing_mm=SPACING_MM))["left_out"])

    assert "on the list of studies" in why(listed)
    assert "There are no files in" in why(nothing)
    assert "It holds 0 cm3 of bone; at least 30 are expected of a neck." in why(no_bone)
    assert not list(tmp_path.glob("cache/studies/*/neck.npy"))


def test_a_study_whose_files_cannot_be_read_now_is_tried_again(
    rsna_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_source(rsna_folder).studies[uid(1)]
    settings = Settings(spacing_mm=SPACING_MM)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("training.rsna.study.read_volume", fail)
        assert "Input/output error" in prepare_study(rsna_folder, study, tmp_path, settings)["left_out"]

    assert prepare_study(rsna_folder, study, tmp_path, settings)["left_out"] is None


@pytest.mark.parametrize("num_cut_off", [1, 8])
def test_files_that_were_cut_off_are_named_and_count_as_missing(
    rsna_folder: Path, tmp_path: Path, num_cut_off: int
) -> None:
    study = read_source(rsna_folder).studies[uid(1)]
    changed = replace(study, files=shutil.copytree(study.files, tmp_path / "files" / uid(1)))
    cut_off = sorted(changed.files.iterdir())[10 : 10 + num_cut_off]
    for path in cut_off:
        path.write_bytes(path.read_bytes()[:600])

    record = prepare_study(tmp_path, changed, tmp_path / "cache", Settings(spacing_mm=SPACING_MM))

    said = " ".join(record["notes"]) if num_cut_off == 1 else record["left_out"]
    assert (record["left_out"] is None) == (num_cut_off == 1)
    assert (
        f"Damaged, without a SeriesInstanceUID, and counted as missing: {num_cut_off} files ({cut_off[0].name}" in said
    )
    assert ("was interpolated" if num_cut_off == 1 else "has slice gaps") in said


def test_a_mask_or_box_that_cannot_be_used_is_named_and_the_study_kept(rsna_folder: Path, tmp_path: Path) -> None:
    study = read_source(rsna_folder).studies[uid(1)]
    (tmp_path / "mask.nii").write_bytes(b"not NIfTI")
    stray = DrawnBox(slice_number=9999, x=1, y=1, width=2, height=2)
    changed = replace(study, mask=tmp_path / "mask.nii", boxes=(stray, replace(stray, slice_number=3)))

    record = prepare_study(rsna_folder, changed, tmp_path / "cache", Settings(spacing_mm=SPACING_MM))

    assert record["left_out"] is None
    assert record["mask"] is None
    assert [box["z"] for box in record["boxes"]] == [2]
    assert record["notes"][0].startswith("The mask was left out: mask.nii cannot be read as NIfTI")
    assert record["notes"][1] == "1 of 2 boxes lie in slices that are not here."


def test_studies_come_by_fold_and_mask_and_patients_stay_together(rsna_cache: Cache) -> None:
    everything = rsna_cache.studies()

    assert [study.study_instance_uid for study in everything] == sorted(uid(number) for number in USABLE)
    by_fold = [study.study_instance_uid for fold in range(5) for study in rsna_cache.studies(folds=[fold])]
    assert sorted(by_fold) == sorted(uid(number) for number in USABLE)
    assert {study.study_instance_uid for study in rsna_cache.studies(has_mask=True)} == {uid(n) for n in WITH_MASK}
    second, sixth = rsna_cache.study(uid(2)), rsna_cache.study(uid(6))
    assert (second.patient, second.fold) == (sixth.patient, sixth.fold)
    assert len({study.patient for study in everything}) == len(everything) - 1


def test_subgroups_name_what_the_images_may_be_grouped_by(rsna_cache: Cache) -> None:
    with (rsna_cache.folder / "subgroups.csv").open() as file:
        rows = {row["StudyInstanceUID"]: row for row in csv.DictReader(file)}

    assert rows.keys() == {uid(number) for number in USABLE}
    assert rows[uid(0)]["direction"] == "from the head"
    assert rows[uid(1)]["direction"] == "from the feet"
    assert rows[uid(0)]["slice_spacing"] == "more than 1.1 mm"


# ---- built once, whatever happens ----


def contents(folder: Path) -> dict[str, bytes]:
    """What `prepare` made; not what other tests have put beside it."""
    made = [*sorted((folder / "studies").rglob("*")), *sorted(folder.glob("*.*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in made if path.is_file()}


def test_a_run_killed_in_the_middle_goes_on_and_ends_with_the_same_cache(
    rsna_folder: Path, rsna_cache: Cache, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "from training.cli import main; main()", "prepare"]
    arguments = ["--rsna", str(rsna_folder), "--cache", str(tmp_path), "--spacing", str(SPACING_MM), "--workers", "2"]
    run = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("studies/[0-9]*")):
            assert run.poll() is None
            time.sleep(0.01)
        workers = psutil.Process(run.pid).children(recursive=True)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("studies/[0-9]*/study.json")}
    assert 0 < len(done) < NUM_STUDIES
    with pytest.raises(CacheError, match="no finished cache"):
        Cache.open(tmp_path)

    make_cache(rsna_folder, tmp_path)

    assert contents(tmp_path) == contents(rsna_cache.folder)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_only_studies_whose_files_or_settings_changed_are_made_again(
    rsna_folder: Path, rsna_cache: Cache, tmp_path: Path
) -> None:
    shutil.copytree(rsna_folder, tmp_path / "rsna")
    shutil.copytree(rsna_cache.folder, tmp_path / "cache")
    (tmp_path / "rsna" / "train_images" / uid(0) / "1.dcm").unlink()

    def made_again(settings: Settings) -> set[str]:
        files = {number: tmp_path / "cache" / "studies" / uid(number) / "study.json" for number in range(NUM_STUDIES)}
        before = {number: path.stat().st_ino for number, path in files.items()}
        run = prepare(read_source(tmp_path / "rsna"), tmp_path / "cache", settings, num_workers=1)
        next(run)
        with pytest.raises(CacheError, match="no finished cache"):
            Cache.open(tmp_path / "cache")
        assert len(list(run)) == NUM_STUDIES - 1
        return {number for number, path in files.items() if path.stat().st_ino != before[number]}

    assert made_again(Settings(spacing_mm=SPACING_MM)) == {0}
    assert made_again(Settings(spacing_mm=SPACING_MM)) == set()
    moved = Cache.open(tmp_path / "cache").study(uid(0))
    assert moved.files == tmp_path / "rsna" / "train_images" / uid(0)
    assert made_again(Settings(spacing_mm=4.0)) == set(range(NUM_STUDIES))


def test_a_folder_that_is_not_the_data_set_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["prepare", "--rsna", str(tmp_path), "--cache", str(tmp_path / "cache")])

    assert result.exit_code == 1
    assert result.output.startswith(f"Error: There is no train.csv in {tmp_path}")
