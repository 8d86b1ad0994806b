"""The RSNA 2022 folder as downloaded: its tables, and which files belong to a study. Reads no voxels.

Known layouts: Kaggle's (`train_images/<UID>/<n>.dcm`, `segmentations/<UID>.nii`), and a plain one with `images/<UID>/`
or `<UID>/` beside `train.csv`. Masks may be `.nii` or `.nii.gz`; tables and masks other than `train.csv` may be absent.
"""

import csv
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from model import LEVELS
from training.drawn_boxes import BOX_COLUMNS, DrawnBox, parse_box

TARGETS = ("patient_overall", *LEVELS)

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")  # folders are named by it: ".." would lead out of the cache, and replace it


class SourceError(Exception):
    """This folder is not the data set, or its tables cannot be read; the message says what is expected."""


@dataclass(frozen=True, kw_only=True)
class SourceStudy:
    """What the folder has of one study.

    labels: by target; of a study to predict none. files: folder of its DICOM files. mask: its NIfTI file, or None.
    """

    study_instance_uid: str
    labels: dict[str, bool]
    files: Path
    mask: Path | None
    boxes: tuple[DrawnBox, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data set. problems: sentences about rows of its tables that say nothing usable."""

    folder: Path
    studies: dict[str, SourceStudy]
    problems: tuple[str, ...]


def read_source(folder: Path) -> Source:
    """The data set in a folder, or in the one folder inside it that has a `train.csv`.

    Raises:
        SourceError: there is no `train.csv`, or a table lacks a column or has a value that cannot be.
    """
    inside = [path.parent for path in (folder / "train.csv", *sorted(folder.glob("*/train.csv"))) if path.is_file()]
    if not inside:
        raise SourceError(
            f"There is no train.csv in {folder}. Expected is the RSNA 2022 data as downloaded: train.csv, "
            "train_bounding_boxes.csv, train_images/<StudyInstanceUID>/<n>.dcm, segmentations/<StudyInstanceUID>.nii."
        )
    root = inside[0]
    images = next((root / name for name in ("train_images", "images") if (root / name).is_dir()), root)
    masks = {path.name.removesuffix(".gz").removesuffix(".nii"): path for path in root.glob("segmentations/*.nii*")}
    labels = _read_labels(root / "train.csv")
    boxes, problems = _read_boxes(root / "train_bounding_boxes.csv", labels)
    for uid, values in labels.items():
        if values[TARGETS[0]] != any(values[level] for level in LEVELS):
            problems.append(f"{uid} has {TARGETS[0]} {values[TARGETS[0]]:d}, and its levels say otherwise.")
    problems += [f"Mask {masks[uid].name} belongs to no study of train.csv." for uid in sorted(masks.keys() - labels)]
    studies = {
        uid: SourceStudy(
            study_instance_uid=uid,
            labels=values,
            files=images / uid,
            mask=masks.get(uid),
            boxes=tuple(boxes[uid]),
        )
        for uid, values in labels.items()
    }
    return Source(folder=root, studies=studies, problems=tuple(problems))


def read_images(folder: Path) -> Source:
    """The studies in a folder such as the challenge's `test_images`, of which nothing is known but their files.

    Raises:
        SourceError: it has no folder that is named like a study.
    """
    studies = {
        path.name: SourceStudy(study_instance_uid=path.name, labels={}, files=path, mask=None, boxes=())
        for path in sorted(folder.iterdir())
        if path.is_dir() and _UID.fullmatch(path.name)
    }
    if not studies:
        raise SourceError(
            f"There is no folder of a study in {folder}. Name the folder, such as test_images, in which each study has "
            "one that is named by its StudyInstanceUID."
        )
    return Source(folder=folder, studies=studies, problems=())


def _read_labels(path: Path) -> dict[str, dict[str, bool]]:
    labels: dict[str, dict[str, bool]] = {}
    for number, row in _rows(path, ("StudyInstanceUID", *TARGETS)):
        uid = row["StudyInstanceUID"]
        if not _UID.fullmatch(uid) or uid in labels:
            raise SourceError(f"{path} has StudyInstanceUID {uid!r} in line {number}, a second time or not a UID.")
        wrong = [f"{name} {row[name]!r}" for name in TARGETS if row[name] not in ("0", "1", "0.0", "1.0")]
        if wrong:
            raise SourceError(f"{path} has {', '.join(wrong)} in line {number}; expected 0 or 1.")
        labels[uid] = {name: row[name].startswith("1") for name in TARGETS}
    if not labels:
        raise SourceError(f"{path} has no rows; a study each is expected.")
    return labels


def _read_boxes(path: Path, labels: dict[str, dict[str, bool]]) -> tuple[dict[str, list[DrawnBox]], list[str]]:
    boxes: dict[str, list[DrawnBox]] = defaultdict(list)
    num_foreign = 0
    if not path.exists():
        return boxes, [f"There is no {path.name}: no fracture has a box."]
    for number, row in _rows(path, ("StudyInstanceUID", *BOX_COLUMNS)):
        try:
            box = parse_box(row)
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: {error}") from None
        if row["StudyInstanceUID"] in labels:
            boxes[row["StudyInstanceUID"]].append(box)
        else:
            num_foreign += 1
    return boxes, [f"{num_foreign} boxes belong to no study of train.csv."] if num_foreign else []


def _rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table that has these columns, cells stripped; rows without any are left out."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            twice = [name for name in columns if reader.fieldnames.count(name) > 1]
            if twice:
                raise SourceError(f"{path} has the column {', '.join(twice)} more than once. Keep one of each.")
            missing = [name for name in columns if name not in reader.fieldnames]
            if missing:
                raise SourceError(f"{path} lacks the column {', '.join(missing)}; it has {reader.fieldnames}.")
            rows = []
            for row in reader:
                if surplus := row.get(None):  # where DictReader keeps them
                    raise SourceError(
                        f"{path}, line {reader.line_num}: {len(surplus)} cells more than the header. Check its commas."
                    )
                rows.append((reader.line_num, {name: (row[name] or "").strip() for name in columns}))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} is not a CSV file in UTF-8 ({error}). Save it as comma-separated text.") from error
    return [(number, row) for number, row in rows if any(row.values())]
