"""`cspine-train evaluate --data`: a model over a folder as the challenge's, restarted, and what it leaves behind."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from model.levels import OUTPUTS
from tests.training.evaluation_data import HEADER, write_csv
from tests.training.rsna_data import uid
from tests.untrained import write_untrained_bundle
from training.cli import main
from training.drawn_boxes import BOX_COLUMNS
from training.evaluation.evaluate import operating_points, points_of
from training.evaluation.evaluate_model import evaluate_model, measure_run, write_tables
from training.evaluation.froc import Box, read_boxes
from training.evaluation.metrics import Settings, measure_all
from training.evaluation.run import Run, describe, run_model
from training.evaluation.tables import InputError, match, read_predictions, read_truth
from training.rsna import read_source

SETTINGS = Settings(operating_points=dict.fromkeys(OUTPUTS, 0.5), num_resamples=20)
ASKED = (0, 1, 3)
"""Studies: 0 and 1 have masks, 0 has boxes, 3 cannot be read."""


@pytest.fixture(scope="module")
def evaluated(rsna_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the result, and what stood on the terminal."""
    folder = tmp_path_factory.mktemp("evaluated")
    with (rsna_folder / "train.csv").open(newline="", encoding="utf-8") as file:
        labels = {row["StudyInstanceUID"]: row for row in csv.DictReader(file)}
    rows = ([labels[uid(number)][name] for name in HEADER] for number in ASKED)
    truth = write_csv(folder / "truth.csv", HEADER, rows)
    arguments = ["evaluate", "--data", rsna_folder, "--truth", truth, "--out", folder / "out", "--resamples", 20]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"], catch_exceptions=False)
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def test_a_study_that_fails_is_named_with_its_reason_and_the_others_are_measured(evaluated: tuple[Path, str]) -> None:
    out, output = evaluated
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    assert metrics["num_studies"] == metrics["run"]["num_answered"] == 2
    assert list(metrics["run"]["failures"]) == metrics["only_in_truth"] == [uid(3)]
    reason = metrics["run"]["failures"][uid(3)]
    assert len(reason) > 20
    assert f"{uid(3)}: {reason}" in output
    assert reason.split(".")[0] in (out / "report.html").read_text(encoding="utf-8")


def test_the_report_says_where_the_curve_of_regions_ends_and_why(evaluated: tuple[Path, str]) -> None:
    froc = json.loads((evaluated[0] / "metrics.json").read_text(encoding="utf-8"))["froc"]
    report = (evaluated[0] / "report.html").read_text(encoding="utf-8")

    end = froc["false_positives_per_study_at_any_score"]
    assert f"levels that the model does not call are not drawn: the curve ends at {end:.2f} false positives" in report
    assert "at 0.5 false positives per Study" in report


def test_seconds_memory_and_masks_are_measured(evaluated: tuple[Path, str]) -> None:
    metrics = json.loads((evaluated[0] / "metrics.json").read_text(encoding="utf-8"))

    assert 0 < metrics["run"]["latency_s"]["p50"] <= metrics["run"]["latency_s"]["p95"] < 120
    assert 2**26 < metrics["run"]["peak_memory_bytes"] < 2**35
    assert metrics["masks"]["num_studies"] == 2
    assert 0.5 < metrics["masks"]["mean_dice"] < 1
    assert metrics["masks"]["levels"]["C4"]["num_levels"] == 2
    assert "froc" in metrics


def test_the_predictions_it_writes_can_be_evaluated_again(evaluated: tuple[Path, str]) -> None:
    out, _ = evaluated
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    matched = match(read_predictions(out / "predictions.csv"), read_truth(out.parent / "truth.csv"))
    again = measure_all(matched, SETTINGS, {})

    assert again["weighted_log_loss"] == pytest.approx(metrics["weighted_log_loss"])
    assert again["all_levels"]["num"] == metrics["all_levels"]["num"]


def test_a_study_that_was_answered_is_not_run_again(evaluated: tuple[Path, str], rsna_folder: Path) -> None:
    out, _ = evaluated
    files = sorted((out / "studies").iterdir())
    before = [path.stat().st_mtime_ns for path in files]

    run = run_model(None, read_source(rsna_folder), out, only=[uid(0), uid(1)], device="cpu")

    assert [path.stat().st_mtime_ns for path in files] == before
    assert set(run.answers) == {path.stem for path in files} == {uid(0), uid(1)}


def test_a_study_whose_mask_has_changed_since_is_measured_anew(
    evaluated: tuple[Path, str], rsna_folder: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    data = shutil.copytree(rsna_folder, tmp_path / "data")
    only = [uid(0), uid(1)]
    before = run_model(
        None, read_source(data), out, only=only, device="cpu"
    ).answers  # those of a folder moved elsewhere
    next(data.glob(f"segmentations/{uid(0)}.nii*")).unlink()

    after = run_model(None, read_source(data), out, only=only, device="cpu").answers

    assert before[uid(0)]["masks"]["dice"]
    assert after[uid(0)]["masks"] is None
    assert after[uid(1)] == before[uid(1)]


def test_a_damaged_answer_is_named_and_made_again(
    evaluated: tuple[Path, str], rsna_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = evaluated
    path = out / "studies" / f"{uid(0)}.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")

    run = run_model(None, read_source(rsna_folder), out, only=[uid(0), uid(1)], device="cpu")

    assert f"{path} is damaged: Study {uid(0)} is analysed again" in caplog.text
    assert run.answers[uid(0)]["probabilities"] == pytest.approx(before["probabilities"], abs=1e-3)
    assert json.loads(path.read_text(encoding="utf-8"))["model"] == before["model"]


def test_answers_of_another_model_are_not_mixed_in(
    evaluated: tuple[Path, str], rsna_folder: Path, tmp_path: Path
) -> None:
    bundle = write_untrained_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match=r"holds an answer of .* and the model to run is untrained 0\.0\.1"):
        evaluate_model(bundle, rsna_folder, evaluated[0], SETTINGS)


def test_a_bundle_in_a_zip_is_the_same_model_as_its_folder(tmp_path: Path) -> None:
    bundle = write_untrained_bundle(tmp_path / "bundle")
    zipped = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", bundle))

    assert describe(zipped) == describe(bundle)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no train\.csv"):
        evaluate_model(None, tmp_path, tmp_path / "out", SETTINGS)


def test_a_box_that_cannot_be_used_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", HEADER, [(uid(0), *[0] * 8)])  # without a file: were it read, that would be said
    write_csv(tmp_path / "train_bounding_boxes.csv", (HEADER[0], *BOX_COLUMNS), [(uid(0), 10, 10, 0, 6, 3)])

    with pytest.raises(InputError, match="line 2: a box of 0 x 6 pixels has no area"):
        evaluate_model(None, tmp_path, tmp_path / "out", SETTINGS)


def test_no_answer_at_all_says_why(rsna_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"None of the 1 Studies .* has an answer.\n  {uid(3)}: "):
        run_model(None, read_source(rsna_folder), tmp_path, only=[uid(3)], device="cpu")


def test_studies_that_the_folder_does_not_have_are_no_failures(rsna_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"None of the 2 Studies asked for is among the \d+ of"):
        run_model(None, read_source(rsna_folder), tmp_path, only=["9.1", "9.2"], device="cpu")


def test_the_test_set_is_predicted_and_submitted(rsna_folder: Path, tmp_path: Path) -> None:
    bundle, out = write_untrained_bundle(tmp_path / "bundle"), tmp_path / "out"
    where = ["--data", rsna_folder / "test_images", "--bundle", bundle, "--out", out, "--device", "cpu"]
    predicted = CliRunner().invoke(main, ["predict", *map(str, where)], catch_exceptions=False)
    assert predicted.exit_code == 0, predicted.output
    assert "1 studies predicted, 0 without an answer" in predicted.output

    where = ["--predictions", out / "predictions.csv", "--test", rsna_folder / "test.csv", "--out", out / "s.csv"]
    submitted = CliRunner().invoke(main, ["submission", *map(str, where)], catch_exceptions=False)
    assert submitted.exit_code == 0, submitted.output
    assert "8 rows written" in submitted.output

    refused = CliRunner().invoke(main, ["predict", "--data", str(out), "--out", str(out)])
    assert refused.exit_code == 1
    assert "There is no folder of a study in" in refused.output


def test_masks_and_attention_are_summed_up_over_the_levels_that_are_there() -> None:
    def answer(masks: dict[str, object] | None, alignment: dict[str, tuple[float, float]]) -> dict[str, object]:
        seconds = {"read": 1.0, "analyse": 2.0, "all": 3.0}
        return {
            "masks": masks,
            "alignment": alignment,
            "seconds": seconds,
            "num_slices": 100,
            "peak_memory_bytes": 5,
            "device": "cpu",
        }

    both = {
        "dice": {"C1": 0.9, "C2": 0.7},
        "hd95_mm": {"C1": 1.0, "C2": 3.0},
        "surface_distance_mm": {"C1": 0.5, "C2": 1.5},
        "identified": {"C1": True, "C2": True},
        "invented": ["C7"],
    }
    missed = {
        "dice": {"C1": 0.0},
        "hd95_mm": {"C1": None},
        "surface_distance_mm": {"C1": None},
        "identified": {"C1": False},
        "invented": [],
    }
    answers = {
        "1": answer(both, {"C1": (0.6, 0.2), "C2": (0.4, 0.4)}),
        "2": answer(missed, {}),
        "3": answer({"problem": "It belongs to another CT."}, {}),
        "4": answer(None, {}),
    }
    run = Run(model={}, answers=answers, failures={})
    found = measure_run(run, SETTINGS, {})

    of_one_patient = measure_run(run, SETTINGS, dict.fromkeys(answers, "the same"))
    assert found["masks"]["mean_dice_ci"] == pytest.approx([0, 0.8])
    assert of_one_patient["masks"]["mean_dice_ci"] is None
    # Three levels of two patients are no three trials: both resamples of one patient alone are among the middle 95 %.
    assert found["masks"]["identification_rate_ci"] == [0, 1]
    assert of_one_patient["masks"]["identification_rate_ci"] is None
    assert found["masks"]["levels"]["C1"]["identification_rate_ci"] == pytest.approx([0.095, 0.905], abs=1e-3)
    assert of_one_patient["attention"]["alignment_ci"] is None
    assert found["masks"]["num_studies"] == 2
    assert found["masks"]["mean_dice"] == pytest.approx((0.8 + 0) / 2)
    assert found["masks"]["levels"]["C1"]["dice"] == 0.45
    assert found["masks"]["levels"]["C1"]["hd95_mm_median"] == 1
    assert found["masks"]["levels"]["C3"]["dice"] is None
    assert found["masks"]["identification_rate"] == pytest.approx(2 / 3)
    assert (found["masks"]["num_not_drawn"], found["masks"]["num_invented"]) == (1, 1)
    assert list(found["masks"]["problems"]) == ["3"]
    assert found["attention"]["alignment"] == pytest.approx(0.5)
    assert found["attention"]["even"] == pytest.approx(0.3)
    json.dumps(found, allow_nan=False)


def test_what_a_model_said_is_written_so_that_evaluate_and_submission_can_read_it(tmp_path: Path) -> None:
    said: dict[str, float | None] = dict.fromkeys(OUTPUTS, 0.25)
    answer = {
        "probabilities": said | {"C1": None},
        "challenge": dict.fromkeys(OUTPUTS, 0.4),
        "regions": [[10, 20, 30, 40, 7, 0.25]],
    }
    write_tables(Run(model={}, answers={"1.2": answer}, failures={}), tmp_path)

    assert np.isnan(read_predictions(tmp_path / "predictions.csv").values[0]).tolist() == [False, True] + [False] * 6
    assert (read_predictions(tmp_path / "predictions_metric.csv").values == 0.4).all()
    box = Box(x=10, y=20, width=30, height=40, slice_number=7, score=0.25)
    assert read_boxes(tmp_path / "regions.csv", scored=True) == {"1.2": [box]}


def test_the_operating_points_of_a_model_are_taken_unless_others_are_given() -> None:
    own = points_of(None)
    assert list(own) == list(OUTPUTS)
    given = operating_points(["C2=0.125"], own)
    assert given == own | {"C2": 0.125}
