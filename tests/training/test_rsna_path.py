"""The whole way from an RSNA-shaped data set to a bundle that runs, with tiny networks and a few steps of each."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner

from model.levels import LEVELS, OUTPUTS
from model.resample import sample
from tests.training.rsna_data import NUM_STUDIES, uid
from training.cli import main
from training.commands.everything import steps
from training.files import locked
from training.rsna import Cache, Study
from training.rsna.demo import SMALL, draw_study

FOLDS = (0, 1, 3)
"""Of the eight studies of `rsna_data`, these have fractured ones and intact ones, and a mask each."""

TINY = {
    "segment": {
        "channels": [8, 16],
        "spacing-mm": 4.0,
        "crop": [16, 16, 16],
        "batch-size": 2,
        "draws": 4,
        "epochs": 2,
        "pseudo-label-rounds": 1,
        "workers": 0,
        "label-all": True,
    },
    "cut": {"slices": 3, "pixels": 64, "pixel-mm": 1.5, "workers": 1},
    "regions": {
        "encoder": "residual-8-16",
        "patch": 32,
        "batch-size": 2,
        "draws": 4,
        "epochs": 1,
        "pseudo-label-rounds": 1,
        "workers": 0,
    },
    "classify": {
        "encoder": "residual-8-16",
        "hidden": 8,
        "layers": 1,
        "batch-size": 2,
        "draws": 4,
        "epochs": 1,
        "mixup": 0.5,
        "workers": 0,
    },
    "study": {"hidden": 8, "batch-size": 2, "draws": 4, "epochs": 1, "workers": 0},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more by waiting for threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


def run(config: Path, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["--config", str(config), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(rsna_folder: Path, rsna_cache: Cache, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything trained for three folds, and exported to `bundle`."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for arguments in steps(rsna_folder, rsna_cache.folder, folder, folder / "bundle", FOLDS):
        if arguments[0] == "cut":
            label_rightly(rsna_cache, "oof-tiny")
        if arguments[0] != "prepare":  # the fixture has
            run(config, *arguments)
    return folder


def label_rightly(cache: Cache, name: str) -> None:
    """Puts the truth in the place of labels: a network of a few steps finds nothing."""
    for number in range(NUM_STUDIES):
        if uid(number) not in cache.folds:
            continue
        study = cache.study(uid(number))
        assert study.labels(name) is not None
        phantom = draw_study(number, 0, SMALL)
        vertebrae = torch.from_numpy(phantom.vertebrae).float()[None]
        study.write_labels(name, sample(vertebrae, phantom.grid, study.neck_grid, nearest=True)[0].byte().numpy())


def result(work: Path, step: str, fold: int) -> dict:
    return json.loads((work / step / f"fold{fold}" / "result.json").read_text(encoding="utf-8"))


def test_every_step_of_a_fold_leaves_weights_curves_a_checkpoint_and_a_result_beside_constants(work: Path) -> None:
    for step in ("segment", "regions", "classify", "study"):
        folder = work / step / "fold0"
        assert {"weights.safetensors", "last.ckpt", "options.json"} <= {path.name for path in folder.iterdir()}
        assert list((folder / "curves").glob("events.*"))
        assert result(work, step, 0)["constants"]


def test_what_a_network_of_a_few_steps_labels_is_not_believed(work: Path, rsna_cache: Cache) -> None:
    others = rsna_cache.studies([1, 2, 3, 4], has_mask=False)

    assert result(work, "segment", 0)["pseudo_label_rounds"] == [{"levels missing": len(others)}]


def test_the_exported_bundle_runs_with_folds_calibration_and_what_it_was_trained_on(work: Path) -> None:
    from model import load_pipeline
    from model.phantom import Anatomy, default_grid, render
    from training.samples import phantom_volume

    pipeline = load_pipeline(work / "bundle", device="cpu")
    bundle = pipeline.bundle

    assert bundle.num_folds == len(FOLDS)
    assert bundle.calibration.keys() == set(OUTPUTS)
    assert "network at a time; this bundle averages 3" in bundle.metrics["note"]
    assert bundle.training_data[0].licence == "non-commercial research"
    assert bundle.metrics["study"].keys() == {f"fold{fold}" for fold in FOLDS}
    anatomy = Anatomy.random(5)
    phantom = render(anatomy, default_grid(anatomy, (3.0, 1.8, 1.8)), noise_hu=10, blur_mm=0.5, seed=5)
    findings = pipeline.analyse(phantom_volume(phantom, "1.2.3")).findings
    assert findings.levels.keys() == set(LEVELS)


def test_predictions_of_held_out_studies_are_evaluated(work: Path, rsna_cache: Cache) -> None:
    lines = (work / "calibrate" / "predictions.csv").read_text(encoding="utf-8").splitlines()

    metrics = json.loads((work / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    assert len(lines) - 1 == len(rsna_cache.studies(FOLDS)) == metrics["num_studies"]


def test_probabilities_stand_beside_base_rates_and_the_score_beside_its_best_constants(
    work: Path, rsna_cache: Cache
) -> None:
    from training.evaluation.loss import best_constants, weighted_log_loss
    from training.steps.calibrate import halve, read_held_out

    held_out = read_held_out(work)
    truths, judged = held_out.truths, ~np.isnan(held_out.logits[:, 1:])
    first = halve([rsna_cache.study(study).patient for study in held_out.study_instance_uids], truths[:, 0])
    rates, best = (
        np.clip(np.where(first[:, None], of(truths[~first]), of(truths[first])), 1e-3, 1 - 1e-3)
        for of in (lambda truth: truth.mean(axis=0), best_constants)
    )

    constants = json.loads((work / "calibrate" / "result.json").read_text(encoding="utf-8"))["constants"]
    losses = -np.log(np.where(truths, rates, 1 - rates))[:, 1:][judged]
    assert constants["levels"]["cross_entropy"] == pytest.approx(losses.mean(), abs=1e-4)
    assert constants["weighted_log_loss"] == pytest.approx(weighted_log_loss(truths, best), abs=1e-4)


def test_the_last_word_of_all_sets_each_step_beside_its_constants(
    work: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.commands.everything.steps", lambda *_: iter(()))  # all are done
    where = ["--rsna", str(work), "--cache", str(work), "--work", str(work), "--out", str(work / "bundle")]

    lines = run(config, "all", *where).splitlines()

    assert {line.split()[0] for line in lines} == {"segment", "regions", "classify", "study", "calibrate"}
    losses = [result(work, "study", fold) for fold in FOLDS]
    figure = np.mean([each["weighted_log_loss"] for each in losses])
    constant = np.mean([each["constants"]["best_constants"] for each in losses])
    (line,) = [line for line in lines if line.startswith("study")]
    assert f"{figure:.4f}  constants  {constant:.4f}  {'better' if figure < constant else 'NO BETTER'}" in line
    assert (work / "summary.txt").read_text(encoding="utf-8").splitlines() == lines


def test_a_killed_run_goes_on_and_other_options_are_refused(rsna_cache: Cache, config: Path, tmp_path: Path) -> None:
    work = tmp_path / "killed"
    arguments = ["segment", "--cache", str(rsna_cache.folder), "--work", str(work), "--fold", "0"]
    arguments += ["--epochs", "30", "--pseudo-label-rounds", "0"]
    command = [sys.executable, "-m", "training.cli", "--config", str(config), *arguments]
    checkpoint = work / "segment" / "fold0" / "last.ckpt"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ) as process:
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert epoch < 29

    seen = []
    from lightning.pytorch.callbacks import ModelCheckpoint

    def note(self: ModelCheckpoint, trainer: object, module: object) -> None:
        seen.append(trainer.current_epoch)  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCheckpoint, "on_train_epoch_start", note, raising=False)
        run(config, *arguments)
    assert seen == list(range(epoch + 1, 30))

    refused = CliRunner().invoke(main, ["--config", str(config), *arguments, "--learning-rate", "1"])
    assert refused.exit_code == 1
    assert "learning_rate 0.002, now 1.0. Give the same to go on, --fresh to begin again" in refused.output
    # Given again, a finished step only says what it measured.
    assert json.loads(run(config, *arguments)) == result(work, "segment", 0)


@pytest.mark.parametrize("step", ["segment", "regions", "classify", "study"])
def test_a_training_that_diverged_is_refused_also_when_the_command_is_given_again(
    step: str, work: Path, rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(work, tmp_path / work.name)
    shutil.rmtree(folder / step / "fold0")
    arguments = [step, "--cache", str(rsna_cache.folder), "--work", str(folder), "--fold", "0"]
    arguments += ["--epochs", "2", "--learning-rate", "1e30"]
    arguments += ["--cut", "tiny"] if step in ("regions", "classify") else []

    for _ in range(2):
        refused = CliRunner().invoke(main, ["--config", str(config), *arguments])
        assert refused.exit_code == 1
        assert "Training diverged: " in refused.output
        assert "is not finite. Start it again with --fresh and a smaller --learning-rate." in refused.output
        assert not (folder / step / "fold0" / "result.json").exists()


@pytest.mark.parametrize("step", ["segment", "regions", "classify", "study"])
def test_the_same_seed_gives_the_same_weights_also_after_a_kill(
    step: str, work: Path, rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def killed(self: ModelCheckpoint, trainer: Any, module: object) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")

    weights = []
    for is_killed in (False, True):
        folder = tmp_path / f"seed-{is_killed}"
        if step != "segment":  # which would label for `work`
            folder = shutil.copytree(work, folder / work.name)
            shutil.rmtree(folder / step / "fold0")
        arguments = [step, "--cache", str(rsna_cache.folder), "--work", str(folder), "--fold", "0", "--epochs", "2"]
        arguments += ["--cut", "tiny"] if step in ("regions", "classify") else []
        if is_killed:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ModelCheckpoint, "on_train_epoch_start", killed, raising=False)
                with pytest.raises(RuntimeError, match="killed"):
                    run(config, *arguments)
        run(config, *arguments)
        weights.append([path.read_bytes() for path in sorted((folder / step / "fold0").rglob("*.safetensors"))])

    assert weights[0] == weights[1]


def test_the_reference_network_is_trained_and_labels_in_the_same_way(
    rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    from training.steps.segment import trained_network

    work = tmp_path / "reference"
    where = ["--cache", str(rsna_cache.folder), "--work", str(work), "--fold", "0", "--pseudo-label-rounds", "0"]
    run(config, "segment", *where, "--network", "unet2d", "--encoder", "residual-8-16", "--pixels", "32")

    network, plan = trained_network(work, 0)
    assert plan.settings().encoder == "residual-8-16"
    assert plan.settings().spacing_mm == rsna_cache.spacing_mm
    assert not network.training
    assert all(study.labels("oof-reference") is not None for study in rsna_cache.studies())


def test_labels_that_are_believed_are_learned_from_in_the_next_round(
    rsna_cache: Cache, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.steps.pseudo_labels import PseudoLabel

    def believed(study: Study, *_: object) -> PseudoLabel:
        labels = np.zeros(study.neck_grid.shape, np.uint8)
        labels[10:30, 20:40, 20:40] = 5
        return PseudoLabel(labels=labels, doubt=None)

    monkeypatch.setattr("training.steps.segment.pseudo_label", believed)
    work = tmp_path / "rounds"

    run(config, "segment", "--cache", str(rsna_cache.folder), "--work", str(work), "--fold", "0")

    others = {study.study_instance_uid for study in rsna_cache.studies([1, 2, 3, 4], has_mask=False)}
    necks = work / "segment" / "necks-4mm" / "pseudo-rounds-fold0-round1"
    assert {path.stem.split("-")[0] for path in necks.iterdir()} == others
    assert result(work, "segment", 0)["pseudo_label_rounds"] == [{"believed": len(others)}]
    assert (work / "segment" / "fold0" / "round1" / "weights.safetensors").exists()


def test_a_round_that_ended_on_a_full_disk_says_of_each_study_what_it_would_have(
    rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    write_text = Path.write_text

    def full(path: Path, *values: Any, **named: Any) -> int:
        if path.parent.name == "doubts":
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *values, **named)

    arguments = ["segment", "--cache", str(rsna_cache.folder), "--work", str(tmp_path / "full"), "--fold", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        failed = CliRunner().invoke(main, ["--config", str(config), *arguments])
    assert failed.exit_code == 1
    assert "No space left on device). Is the disk full" in failed.output

    run(config, *arguments)
    assert result(tmp_path / "full", "segment", 0)["pseudo_label_rounds"] == [{"levels missing": 1}]


def test_what_must_come_before_is_named(work: Path, rsna_cache: Cache, config: Path, tmp_path: Path) -> None:
    where = ["--cache", str(rsna_cache.folder), "--work", str(tmp_path)]
    for arguments, sentence in (
        (["study", *where, "--fold", "0"], "Run `cspine-train classify --fold 0` first"),
        (["calibrate", *where], "Run `cspine-train study` first"),
        (["regions", *where, "--fold", "0", "--cut", "uncut"], "then `cspine-train cut --name uncut --masks"),
        (["segment", *where, "--fold", "0", "--crop", "5,5,5"], "must be three multiples of 2"),
        (["regions", *where, "--fold", "0", "--cut", "tiny", "--patch", "48"], "Give at most 40, or cut with more"),
        (
            ["regions", *where, "--fold", "0", "--cut", "tiny", "--patch", "38"],
            "needs a multiple of 4, here at most 40",
        ),
        (["segment", *where, "--fold", "0", "--network", "unet2d", "--encoder", "none"], "There is no encoder 'none'"),
        (
            ["segment", *where, "--fold", "0", "--network", "unet2d", "--encoder", "residual-8-16", "--pixels", "34"],
            "--pixels is 34; residual-8-16 needs a multiple of 4",
        ),
        (["regions", *where, "--fold", "0", "--cut", "tiny", "--encoder", "timm:any"], "pip install timm"),
        (
            [
                "classify",
                *where,
                "--fold",
                "0",
                "--cut",
                "tiny",
                "--start",
                "random",
                "--encoder",
                f"residual{7 * '-4'}",
            ],
            "Slices of the cut 'tiny' have 64 pixels; residual-4-4-4-4-4-4-4 needs a multiple of 128",
        ),
    ):
        refused = CliRunner().invoke(main, ["--config", str(config), *arguments])
        assert refused.exit_code == 1
        assert sentence in refused.output
    for step in ("segment", "regions", "classify"):
        assert not (tmp_path / step / "fold0").exists(), "else the step would count as begun with what was refused"


def test_devices_that_are_not_there_are_refused_in_a_sentence(rsna_cache: Cache, config: Path, tmp_path: Path) -> None:
    where = ["--cache", str(rsna_cache.folder), "--work", str(tmp_path), "--fold", "0"]
    for option in (["--devices", "many"], ["--strategy", "none"]):
        refused = CliRunner().invoke(main, ["--config", str(config), "segment", *where, *option])
        assert refused.exit_code == 1
        assert f"{' '.join(option)}" in refused.output.split(" here: ")[0]


def test_a_result_made_from_something_that_changed_since_is_refused_by_all_that_reads_it(
    work: Path, rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(work, tmp_path / work.name)  # its name names the labels
    where = ["--cache", str(rsna_cache.folder), "--work", str(changed)]
    run(config, "calibrate", *where)
    with (changed / "classify" / "fold0" / "weights.safetensors").open("ab") as file:
        file.write(b"trained again")

    for arguments, sentence in (
        (["study", *where, "--fold", "0"], "fold0 was made from another classify than there is now. Give --fresh"),
        (["calibrate", *where], "another classify than there is now. Run `cspine-train study --fold 0` as before"),
        (["export", *where, "--out", str(tmp_path / "bundle")], "another classify than there is now"),
    ):
        refused = CliRunner().invoke(main, ["--config", str(config), *arguments])
        assert refused.exit_code == 1
        assert sentence in refused.output
    for start in ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "8"}):
        fresh = ["--config", str(config), "study", *where, "--fold", "0", "--fresh"]
        refused = CliRunner(env=start).invoke(main, fresh)  # one process would remove what another reads
        assert "Remove " + str(changed / "study" / "fold0") in refused.output
        assert (changed / "study" / "fold0" / "result.json").exists()
    run(config, "study", *where, "--fold", "0", "--fresh")
    refused = CliRunner().invoke(main, ["--config", str(config), "export", *where, "--out", str(tmp_path / "bundle")])
    assert "was fitted to other networks than there are now. Run `cspine-train calibrate` again" in refused.output


def test_networks_of_different_cuts_or_encoders_do_not_go_together(
    work: Path, rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(work, tmp_path / work.name)
    where = ["--cache", str(rsna_cache.folder), "--work", str(changed)]
    options = changed / "regions" / "fold0" / "options.json"
    options.write_text(options.read_text().replace('"cut": "tiny"', '"cut": "fine"'))

    for arguments, sentence in (
        (["classify", *where, "--fold", "0", "--cut", "tiny"], "with --cut fine, and `classify` has --cut tiny"),
        (
            ["classify", *where, "--fold", "1", "--cut", "tiny", "--encoder", "residual-8"],
            "residual-8: they must be the",
        ),
        (["calibrate", *where], "learned from different cuts: regions fold0 'fine', classify fold0 'tiny'"),
        (["export", *where, "--out", str(tmp_path / "bundle")], "learned from different cuts"),
    ):
        refused = CliRunner().invoke(main, ["--config", str(config), *arguments])
        assert refused.exit_code == 1
        assert sentence in refused.output


def test_a_step_does_not_go_on_with_other_studies_or_folds_and_their_necks_are_made_anew(
    work: Path, rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    from training.steps.segment import neck_path, trained_network

    (tmp_path / "cache.json").write_text(
        (rsna_cache.folder / "cache.json").read_text().replace('"fingerprint": "', '"fingerprint": "x')
    )
    refused = CliRunner().invoke(
        main,
        ["--config", str(config), "segment", "--cache", str(tmp_path), "--work", str(work), "--fold", "0"],
    )
    assert "was made from another cache than there is now" in refused.output

    study, plan = rsna_cache.study(uid(0)), trained_network(work, 0)[1]
    assert neck_path(study, "truth", plan, work) != neck_path(replace(study, fingerprint="b" * 64), "truth", plan, work)


def test_two_runs_do_not_work_on_one_fold_or_one_cache_at_once(
    work: Path, rsna_folder: Path, rsna_cache: Cache, config: Path, tmp_path: Path
) -> None:
    where = ["--cache", str(rsna_cache.folder), "--work", str(work)]
    prepare = ["prepare", "--rsna", str(rsna_folder), "--cache", str(rsna_cache.folder)]
    for folder, shared, arguments in (
        (work / "study" / "fold0", False, ["study", *where, "--fold", "0"]),
        (rsna_cache.folder / "studies", True, prepare),
        (rsna_cache.folder / "cuts" / "busy", False, ["cut", *where[:2], "--name", "busy", "--masks", "truth"]),
    ):
        with locked(folder, shared=shared):
            refused = CliRunner().invoke(main, ["--config", str(config), *arguments])
        assert refused.exit_code == 1
        assert f"Another run of cspine-train is at work with {folder}" in refused.output
    assert Cache.open(rsna_cache.folder).folds == rsna_cache.folds


def test_a_step_ends_with_the_run_of_all_that_began_it(rsna_folder: Path, config: Path, tmp_path: Path) -> None:
    arguments = ["all", "--rsna", rsna_folder, "--cache", tmp_path / "cache", "--work", tmp_path / "work"]
    command = [sys.executable, "-m", "training.cli", "--config", config, *arguments, "--out", tmp_path / "bundle"]
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as all_of_it:
        try:
            while not (children := psutil.Process(all_of_it.pid).children(recursive=True)):
                assert all_of_it.poll() is None
                time.sleep(0.02)
        finally:
            all_of_it.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
