"""`cspine-train evaluate` and `submission` as a user calls them: files in, files out, faults in sentences."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.training.evaluation_data import HEADER, draw_patients, write_csv, write_table
from training.cli import main
from training.evaluation.tables import InputError, read_predictions, read_truth

NUM = 60


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def write_files(folder: Path) -> dict[str, Path]:
    """Predictions of 60 patients and the truth of 61, 59 of them the same."""
    truth, predicted = draw_patients(NUM + 2)
    uids = [f"1.2.3.{number}" for number in range(NUM + 2)]
    rows = dict(zip(uids, truth.astype(int), strict=True))
    del rows["1.2.3.0"]
    return {
        "predictions": write_table(folder / "p.csv", dict(zip(uids[:NUM], predicted.round(6), strict=False))),
        "truth": write_table(folder / "train.csv", rows),
        "out": folder / "result",
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Result]:
    """An evaluation for all tests that only look at what came out."""
    files = write_files(tmp_path_factory.mktemp("evaluation"))
    return files, evaluate(files, "--operating-point", "C2=0.25", "--operating-point", "0.4")


def evaluate(files: dict[str, Path], *more: object) -> Result:
    options = [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", path)]
    return run("evaluate", *options, "--resamples", 20, *more)


def metrics_of(files: dict[str, Path]) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (files["out"] / "metrics.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_two_csvs_become_metrics_and_a_report(done: tuple[dict[str, Path], Result]) -> None:
    files, result = done

    assert result.exit_code == 0, result.output
    metrics = metrics_of(files)
    assert metrics["num_studies"] == NUM - 1
    assert 0 < metrics["weighted_log_loss"] < metrics["baselines"]["best_constants"]["weighted_log_loss"]
    assert f"{metrics['weighted_log_loss']:.4f}" in result.output
    for answers in (metrics["patient_overall"], metrics["all_levels"], metrics["levels"]["C7"]):
        lower, upper = answers["brier_ci"]
        assert lower <= answers["brier"] <= upper
        assert answers["auc"] > 0.8
    assert list(metrics["levels"]) == ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]
    assert sorted(path.name for path in files["out"].iterdir()) == ["metrics.json", "report.html"]


def test_an_operating_point_for_one_wins_over_that_for_all(done: tuple[dict[str, Path], Result]) -> None:
    metrics = metrics_of(done[0])
    assert metrics["settings"]["operating_points"]["C2"] == metrics["levels"]["C2"]["operating_point"] == 0.25
    assert metrics["patient_overall"]["operating_point"] == 0.4


def test_studies_in_only_one_file_are_counted_and_named_everywhere(done: tuple[dict[str, Path], Result]) -> None:
    files, result = done
    metrics, report = metrics_of(files), (files["out"] / "report.html").read_text(encoding="utf-8")

    assert metrics["num_only_in_predictions"] == 1
    assert metrics["only_in_predictions"] == ["1.2.3.0"]
    assert metrics["num_only_in_truth"] == 2
    assert metrics["only_in_truth"] == [f"1.2.3.{NUM}", f"1.2.3.{NUM + 1}"]
    for uid in (*metrics["only_in_predictions"], *metrics["only_in_truth"]):
        assert f"  {uid}\n" in result.output
        assert f"<code>{uid}</code>" in report


def test_the_report_loads_nothing_and_runs_nothing(done: tuple[dict[str, Path], Result]) -> None:
    report = (done[0]["out"] / "report.html").read_text(encoding="utf-8")

    assert report.count("<svg") >= 5
    assert "not a medical device" in report
    assert not re.search(r"<script|<link|<img|@import|src=|url\((?!#)|\son\w+=\"", report)
    assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)\"", report))
    assert "nan" not in re.sub(r"<[^>]+>", " ", report).lower().split()


def test_a_level_nobody_broke_is_null_with_a_reason_in_both_files(files: dict[str, Path], tmp_path: Path) -> None:
    with files["truth"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["C3"] = "0"
    files["truth"] = write_csv(tmp_path / "t.csv", HEADER, ([row[name] for name in HEADER] for row in rows))

    assert evaluate(files).exit_code == 0

    level = metrics_of(files)["levels"]["C3"]
    assert level["auc"] is level["auc_ci"] is level["sensitivity"] is None
    assert "needs fractured" in level["reasons"]["auc"]
    assert "Not computed (needs fractured and intact ones): C3 auc." in (files["out"] / "report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("text", ["1.5", "C9=0.5", "C1=", "high", "=0.3"])
def test_an_operating_point_that_is_none_is_refused(files: dict[str, Path], text: str) -> None:
    result = evaluate(files, "--operating-point", text)
    assert result.exit_code == 1
    assert repr(text) in result.output


def test_subgroups_and_regions_add_their_sections(files: dict[str, Path], tmp_path: Path) -> None:
    with files["truth"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    uids = [row["StudyInstanceUID"] for row in rows]
    files["subgroups"] = write_csv(
        tmp_path / "groups.csv",
        ("StudyInstanceUID", "scanner <b>"),
        ((uid, "A&B $^{" if number % 2 else "C") for number, uid in enumerate(uids)),
    )
    columns = ("StudyInstanceUID", "x", "y", "width", "height", "slice_number")
    boxed = [row["StudyInstanceUID"] for row in rows if row["patient_overall"] == "1"][:8]
    files["true_boxes"] = write_csv(tmp_path / "boxes.csv", columns, ((uid, 10, 10, 20, 20, 7) for uid in boxed))
    files["predicted_regions"] = write_csv(
        tmp_path / "regions.csv", (*columns, "score"), ((uid, 12, 10, 20, 20, 7, 0.9) for uid in boxed[:4])
    )

    result = evaluate(files)

    assert result.exit_code == 0, result.output
    metrics, report = metrics_of(files), (files["out"] / "report.html").read_text(encoding="utf-8")
    assert metrics["froc"]["sensitivity_at_1_fp"] == 4 / 8
    assert metrics["froc"]["fractures"]["sensitivity_at_0_5_fp"] == 4 / 8
    assert set(metrics["subgroups"]["scanner <b>"]) == {"A&B $^{", "C"}
    assert "scanner <b>" not in report
    assert "scanner &lt;b&gt;" in report
    assert "Fracture regions" in report


def test_patients_of_some_studies_only_are_pointed_out_however_the_column_is_spelled(
    files: dict[str, Path], tmp_path: Path
) -> None:
    rows = [("1.2.3.1", "a"), ("1.2.3.2", "a")]
    files["subgroups"] = write_csv(tmp_path / "groups.csv", ("StudyInstanceUID", "patientid"), rows)

    result = evaluate(files)

    assert f"PatientID says nothing of {NUM - 3} Studies: each counts as a patient of its own." in result.output
    assert metrics_of(files)["num_patients"] == NUM - 2


def test_a_table_of_true_boxes_without_rows_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    columns = ("StudyInstanceUID", "x", "y", "width", "height", "slice_number")
    files["true_boxes"] = write_csv(tmp_path / "boxes.csv", columns, [])
    files["predicted_regions"] = write_csv(tmp_path / "regions.csv", (*columns, "score"), [])
    assert "boxes.csv has a header and no rows. It needs at least one." in evaluate(files).output


def test_a_figure_without_an_interval_has_no_brackets(files: dict[str, Path]) -> None:
    """Two Studies of one patient: every resample is the same."""
    answer = [1, 1, 0, 0, 0, 0, 0, 0]
    write_table(files["truth"], {"1.2.3.1": answer, "1.2.3.2": [0] * 8})
    write_table(files["predictions"], {"1.2.3.1": answer, "1.2.3.2": answer})
    files["subgroups"] = write_csv(
        files["truth"].with_name("g.csv"), ("StudyInstanceUID", "PatientID"), [("1.2.3.1", "a"), ("1.2.3.2", "a")]
    )

    assert evaluate(files).exit_code == 0

    report = (files["out"] / "report.html").read_text(encoding="utf-8")
    assert "sensitivity 1.000, specificity 0.000." in report
    assert "()" not in report


def test_predictions_that_say_nothing_are_measured_and_reported_as_such(files: dict[str, Path], tmp_path: Path) -> None:
    nothing = ["", *[""] * 7, " ".join(HEADER[1:])]
    write_table(files["predictions"], {"1.2.3.1": nothing, "1.2.3.2": nothing}, (*HEADER, "undetermined"))
    columns = ("StudyInstanceUID", "x", "y", "width", "height", "slice_number")
    files["true_boxes"] = write_csv(tmp_path / "boxes.csv", columns, [("9.9", 1, 1, 5, 5, 1)])
    files["predicted_regions"] = write_csv(tmp_path / "regions.csv", (*columns, "score"), [])

    result = evaluate(files)

    assert result.exit_code == 0, result.output
    metrics = metrics_of(files)
    assert metrics["weighted_log_loss"] == metrics["baselines"]["base_rates"]["weighted_log_loss"]
    assert metrics["patient_overall"]["num"] == 0
    assert metrics["froc"]["boxes_of_other_studies"] == ["9.9"]
    assert "no true box" in metrics["froc"]["reasons"]["all"]


def test_a_result_that_cannot_be_written_is_one_sentence(files: dict[str, Path]) -> None:
    files["out"] = files["truth"] / "result"  # in a file, not a folder
    result = evaluate(files)
    assert result.exit_code == 1
    assert "cannot be written" in result.output
    assert "Traceback" not in result.output


def test_a_full_disk_is_one_sentence(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: object) -> None:
        raise OSError("7314000 requested and 51136 written")  # as numpy does, without a name

    monkeypatch.setattr("training.evaluation.evaluate.evaluate", write)
    result = evaluate(files)
    assert result.exit_code == 1
    assert "51136 written). Is the disk full?" in result.output
    assert "Traceback" not in result.output


def test_regions_without_boxes_are_a_usage_error(files: dict[str, Path], tmp_path: Path) -> None:
    regions = write_csv(tmp_path / "r.csv", ("StudyInstanceUID",), [("1",)])
    result = evaluate(files, "--predicted-regions", regions)
    assert result.exit_code == 2
    assert "belong together" in result.output


GOOD = ["0.5"] * 8


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        ("", ["is empty", "StudyInstanceUID"]),
        ("StudyInstanceUID,patient_overall,C1,C2,C3,C4,C5,C6\n", ["no column C7"]),
        (",".join(HEADER) + "\n", ["no rows"]),
        (";".join(HEADER) + "\n1;1\n", ["Separate columns by commas"]),
        (",".join((*HEADER, "C1")) + "\n", ["column C1 more than once"]),
        ("1.2," + ",".join(GOOD) + "\n1.2," + ",".join(GOOD), ["line 3", "Study 1.2 stands in line 2 already"]),
        ("1.2," + ",".join(["nan", *GOOD[1:]]), ["line 2", "Study 1.2", "patient_overall", "nan is no finite number"]),
        ("1.2," + ",".join([*GOOD[1:], ""]), ["column C7: the cell is empty", "undetermined"]),
        ("1.2," + ",".join([*GOOD[1:], "1.01"]), ["1.01 is no probability", "from 0 to 1"]),
        ("1.2," + ",".join([*GOOD[1:], "-0.1"]), ["-0.1 is no probability"]),
        ("1.2," + ",".join([*GOOD[1:], "inf"]), ["inf is no finite number"]),
        ("1.2," + ",".join([*GOOD[1:], "high"]), ["'high' is no number"]),
        ("," + ",".join(GOOD), ["line 2: StudyInstanceUID is empty"]),
        ("1.2,0.5,0.5", ["line 2: 3 cells", "9 columns"]),
        ("9.9," + ",".join(GOOD), ["no StudyInstanceUID in common", "9.9"]),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ["is not a CSV file"]),
        ("row_id,fractured\n1.2_C1,0.5\n", ["is a submission", "one row a Study"]),
        ("{}\n", ["no column StudyInstanceUID", "its header is '{}'"]),
    ],
)
def test_unusable_predictions_are_refused_in_a_sentence_and_old_results_stay(
    files: dict[str, Path], content: str | bytes, sentences: list[str]
) -> None:
    files["out"].mkdir()
    (files["out"] / "metrics.json").write_text("old")
    if isinstance(content, str) and content.startswith(("1.2,", "9.9,", ",")):
        content = ",".join(HEADER) + "\n" + content
    files["predictions"].write_bytes(content.encode() if isinstance(content, str) else content)

    result = evaluate(files)

    assert result.exit_code == 1
    for sentence in (*sentences, str(files["predictions"]) if "common" not in sentences[0] else "Predictions"):
        assert sentence in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in files["out"].iterdir()] == ["metrics.json"]
    assert (files["out"] / "metrics.json").read_text() == "old"


@pytest.mark.parametrize("label", ["2", "0.5", "", "yes"])
def test_a_label_that_is_neither_0_nor_1_is_refused(files: dict[str, Path], label: str) -> None:
    write_table(files["truth"], {"1.2.3.1": ["0", "1", label, "0", "0", "0", "0", "0"]})
    result = evaluate(files)
    assert result.exit_code == 1
    assert "column C2" in result.output


def test_five_faults_are_shown_and_the_rest_counted(files: dict[str, Path]) -> None:
    write_table(files["predictions"], {f"1.2.3.{number}": ["2"] * 8 for number in range(2)})
    result = evaluate(files)
    assert result.output.count("2 is no probability") == 5
    assert "and 11 more" in result.output


def test_labels_that_contradict_each_other_are_measured_and_pointed_out(files: dict[str, Path]) -> None:
    write_table(files["truth"], {"1.2.3.1": [1, 0, 0, 0, 0, 0, 0, 0], "1.2.3.2": [0, 0, 0, 0, 0, 0, 0, 0]})
    result = evaluate(files)
    assert result.exit_code == 0
    assert "not the OR of C1..C7, the first is 1.2.3.1" in result.output


def test_excels_bom_labels_as_floats_blanks_and_further_columns_are_understood(files: dict[str, Path]) -> None:
    before = read_truth(files["truth"])
    text = files["truth"].read_text(encoding="utf-8").replace("\n", ",x,,\n").replace(",1,", ", 1.0 ,")
    files["truth"].write_text(text.replace("C7,x", "C7,hospital") + "\n", encoding="utf-8-sig")
    after = read_truth(files["truth"])
    assert after.studies == before.studies
    assert (after.values == before.values).all()


def test_an_output_named_undetermined_may_be_empty_and_only_then(tmp_path: Path) -> None:
    header, row = (*HEADER, "undetermined"), [0.5, "", 0.5, 0.5, 0.5, 0.5, 0.5, "", "C1 C7"]
    path = write_table(tmp_path / "p.csv", {"1.2": row, "1.3": [0.5] * 8 + [""]}, header)
    assert np.flatnonzero(np.isnan(read_predictions(path).values)).tolist() == [1, 7]

    write_table(path, {"1.2": [0.5, 0.5, *row[2:]]}, header)
    with pytest.raises(InputError, match=r"column C1: '0\.5' stands here"):
        read_predictions(path)
    write_table(path, {"1.2": [*row[:8], "C8"]}, header)
    with pytest.raises(InputError, match="there is no output 'C8'"):
        read_predictions(path)


# ---- submission ----


@pytest.fixture
def test_table(tmp_path: Path) -> Path:
    rows = [(f"1.2.3.{number}_{name}", f"1.2.3.{number}", name) for number in (5, 3) for name in ("C2", *HEADER[1:2])]
    return write_csv(tmp_path / "test.csv", ("row_id", "StudyInstanceUID", "prediction_type"), rows)


def test_a_submission_answers_every_row_in_the_order_of_test_csv(test_table: Path, tmp_path: Path) -> None:
    predictions = write_table(
        tmp_path / "p.csv",
        {
            "1.2.3.3": [0.3, 0.1, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1, ""],
            "1.2.3.5": [0.9, 0.1, "", 0.1, 0.1, 0.1, 0.1, 0.1, "C2"],
        },
        (*HEADER, "undetermined"),
    )
    result = run("submission", "--predictions", predictions, "--test", test_table, "--out", tmp_path / "submission.csv")

    assert result.exit_code == 0, result.output
    assert (tmp_path / "submission.csv").read_text().splitlines() == [
        "row_id,fractured",
        "1.2.3.5_C2,0.141",  # undetermined: as often as in the public data
        "1.2.3.5_patient_overall,0.9",
        "1.2.3.3_C2,0.25",
        "1.2.3.3_patient_overall,0.3",
    ]
    assert "1 undetermined" in result.output


def test_rows_without_an_answer_are_named_and_nothing_is_written(test_table: Path, tmp_path: Path) -> None:
    predictions = write_table(tmp_path / "p.csv", {"1.2.3.5": [0.5] * 8})
    result = run("submission", "--predictions", predictions, "--test", test_table, "--out", tmp_path / "submission.csv")

    assert result.exit_code == 1
    assert "no answer for 2 of 4 rows" in result.output
    assert "1.2.3.3_patient_overall" in result.output
    assert not (tmp_path / "submission.csv").exists()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (("1.2_C9", "1.2", "C9"), "prediction_type is 'C9'"),
        (("1.2_C1", "1.3", "C1"), "row_id is '1.2_C1', not 1.3_C1"),
    ],
)
def test_another_file_than_test_csv_is_refused(tmp_path: Path, row: tuple[str, ...], sentence: str) -> None:
    test = write_csv(tmp_path / "test.csv", ("row_id", "StudyInstanceUID", "prediction_type"), [row])
    predictions = write_table(tmp_path / "p.csv", {"1.2": [0.5] * 8})
    result = run("submission", "--predictions", predictions, "--test", test, "--out", tmp_path / "s.csv")
    assert result.exit_code == 1
    assert sentence in result.output
