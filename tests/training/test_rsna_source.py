"""The tables and folders of the data set, and the folds made of them."""

from collections import Counter
from pathlib import Path

import pytest

from model import LEVELS
from training.evaluation import InputError
from training.evaluation.froc import read_boxes
from training.rsna import SourceError, read_source
from training.rsna.folds import Member, assign_folds

HEADER = f"StudyInstanceUID,patient_overall,{','.join(LEVELS)}\n"


def write_tables(
    folder: Path, rows: str = "1.2,1,0,1,0,0,0,0,0\n1.3,0,0,0,0,0,0,0,0\n", boxes: str | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.csv").write_text(HEADER + rows)
    if boxes is not None:
        (folder / "train_bounding_boxes.csv").write_text("StudyInstanceUID,x,y,width,height,slice_number\n" + boxes)
    return folder


@pytest.mark.parametrize(("images", "mask"), [("train_images", "1.2.nii"), ("images", "1.2.nii.gz"), ("", "1.2.nii")])
def test_known_layouts_are_found_also_one_folder_below(tmp_path: Path, images: str, mask: str) -> None:
    root = write_tables(tmp_path / "rsna-2022-cervical-spine-fracture-detection", boxes="1.2,10.5,20,30,40.25,7\n")
    for path in (root / images / "1.2", root / images / "1.3", root / "segmentations"):
        path.mkdir(parents=True)
    (root / "segmentations" / mask).touch()

    source = read_source(tmp_path)

    study = source.studies["1.2"]
    assert study.files == root / images / "1.2"
    assert study.mask == root / "segmentations" / mask
    assert [level for level in LEVELS if study.labels[level]] == ["C2"]
    assert [(box.slice_number, box.x, box.height) for box in study.boxes] == [(7, 10.5, 40.25)]
    assert source.studies["1.3"].mask is None
    assert not source.problems


def test_a_patient_whose_levels_say_otherwise_is_named(tmp_path: Path) -> None:
    source = read_source(write_tables(tmp_path, "1.2,0,0,1,0,0,0,0,0\n1.3,1,0,0,0,0,0,0,0\n", boxes=""))

    assert source.problems == (
        "1.2 has patient_overall 0, and its levels say otherwise.",
        "1.3 has patient_overall 1, and its levels say otherwise.",
    )


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER.replace("C6", "C7") + "1.2,0,0,0,0,0,0,0,0\n")
    with pytest.raises(SourceError, match="column C7 more than once"):
        read_source(tmp_path)


def test_rows_and_masks_of_unknown_studies_are_counted(tmp_path: Path) -> None:
    root = write_tables(tmp_path, boxes="9.9,1,2,3,4,5\n9.9,1,2,3,4,6\n")
    (root / "segmentations").mkdir()
    (root / "segmentations" / "8.8.nii").touch()

    assert read_source(root).problems == (
        "2 boxes belong to no study of train.csv.",
        "Mask 8.8.nii belongs to no study of train.csv.",
    )


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("1.2,1,0,1,0,0,0,0,0,0\n", "line 2: 1 cells more than the header"),
        ("1.2,1,0,1,0,0,maybe,0,0\n", "has C5 'maybe' in line 2; expected 0 or 1"),
        ("1.2,1,0,1,0,0,0,0,0\n1.2,1,0,1,0,0,0,0,0\n", "has StudyInstanceUID '1.2' in line 3, a second time"),
        ("../x,1,0,1,0,0,0,0,0\n", "not a UID"),
        ("..,1,0,1,0,0,0,0,0\n", "not a UID"),
        ("", "has no rows"),
    ],
)
def test_labels_that_cannot_be_are_refused_with_their_line(tmp_path: Path, rows: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        read_source(write_tables(tmp_path, rows))


def test_tables_that_a_spreadsheet_saved_with_blanks_and_empty_rows_are_read(tmp_path: Path) -> None:
    header = HEADER.replace(",", " , ")
    rows = " 1.2 , 1,0,1 ,0,0,0,0,0\r\n,,,,,,,,\r\n"
    write_tables(tmp_path, boxes=" 1.2 ,10,20,30,40,7.0\n,,,,,\n")
    (tmp_path / "train.csv").write_text("\ufeff" + header + rows, encoding="utf-8")

    source = read_source(tmp_path)

    assert [level for level in LEVELS if source.studies["1.2"].labels[level]] == ["C2"]
    assert [box.slice_number for box in source.studies["1.2"].boxes] == [7]
    assert not source.problems


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ("1,2,3,4,inf", "slice_number is 'inf', which is no number. Correct the line."),
        ("nan,2,3,4,5", "x is 'nan', which is no number. Correct the line."),
        ("1,2,3,,5", "height is '', which is no number. Correct the line."),
        ("1,2,3,4,5.7", "slice_number is 5.7; it is the n of n.dcm, a whole number."),
        ("1,2,0,4,5", "a box of 0 x 4 pixels has no area. Remove the line."),
        ("1,2,3,-4,5", "a box of 3 x -4 pixels has no area. Remove the line."),
    ],
)
def test_a_box_that_is_nowhere_is_refused_with_its_line_by_preparation_and_evaluation_alike(
    tmp_path: Path, box: str, reason: str
) -> None:
    write_tables(tmp_path, boxes=f"1.2,{box}\n")
    path = tmp_path / "train_bounding_boxes.csv"
    with pytest.raises(SourceError) as prepared:
        read_source(tmp_path)
    with pytest.raises(InputError) as evaluated:
        read_boxes(path, scored=False)
    assert str(prepared.value) == str(evaluated.value) == f"{path}, line 2: {reason}"


def test_a_table_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    (tmp_path / "train.csv").write_text(HEADER + "1.2,1,0,1,0,0,0,0,0\n", encoding="utf-16")

    with pytest.raises(SourceError, match=r"train\.csv is not a CSV file in UTF-8"):
        read_source(tmp_path)


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    (tmp_path / "train.csv").write_text("StudyInstanceUID,patient_overall\n1.2,1\n")

    with pytest.raises(SourceError, match="lacks the column C1, C2, C3, C4, C5, C6, C7"):
        read_source(tmp_path)


def test_folds_keep_patients_together_and_kinds_apart_in_equal_parts() -> None:
    studies = {
        f"1.{n}": Member(patient=f"p{n // 2 if n < 20 else n}", is_fractured=n % 2 == 0, has_mask=n % 9 == 0)
        for n in range(400)
    }

    folds = assign_folds(studies, seed=1)

    by_patient = {member.patient: set() for member in studies.values()}
    for uid, member in studies.items():
        by_patient[member.patient].add(folds[uid])
    assert all(len(found) == 1 for found in by_patient.values())
    for kind in ((True, True), (True, False), (False, True), (False, False)):
        of_kind = Counter(folds[uid] for uid, m in studies.items() if (m.is_fractured, m.has_mask) == kind)
        assert max(of_kind.values()) - min(of_kind[fold] for fold in range(5)) <= 6
    assert folds == assign_folds(dict(reversed(studies.items())), seed=1)
    assert folds != assign_folds(studies, seed=2)
