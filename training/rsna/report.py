"""What became of each study: `report.json` for programs, `report.txt` for people, `subgroups.csv` for `evaluate`."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.files import replacing_file, write_json
from training.rsna.cache import grid_from_dict

Record = dict[str, Any]


def write_report(
    cache: Path, records: Mapping[str, Record], folds: Mapping[str, int], problems: tuple[str, ...]
) -> None:
    """Writes all three. records: as `prepare_study` gives them. problems: of the tables."""
    summary = summarise(records)
    studies = {
        uid: {"left_out": record["left_out"], "notes": record.get("notes", []), "mask": record.get("mask")}
        for uid, record in sorted(records.items())
    }
    write_json(cache / "report.json", {"summary": summary, "problems": list(problems), "studies": studies})
    with replacing_file(cache / "report.txt") as unfinished:
        unfinished.write_text("\n".join(_lines(summary, problems, studies)) + "\n", encoding="utf-8")
    with replacing_file(cache / "subgroups.csv") as unfinished, unfinished.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["StudyInstanceUID", "PatientID", "slice_spacing", "num_slices", "direction", "fold"])
        table.writerows(_subgroups(uid, records[uid], fold) for uid, fold in sorted(folds.items()))


def summarise(records: Mapping[str, Record]) -> dict[str, int]:
    """The counts that a run ends with."""
    usable = [record for record in records.values() if not record["left_out"]]
    masks = [record["mask"] for record in usable if record["mask"]]
    return {
        "studies": len(records),
        "left_out": len(records) - len(usable),
        "usable": len(usable),
        "fractured": sum(record["labels"]["patient_overall"] for record in usable),
        "with_mask": len(masks),
        "masks_righted": sum(mask["was_reversed"] for mask in masks),
        "with_boxes": sum(bool(record["boxes"]) for record in usable),
        "boxes": sum(len(record["boxes"]) for record in usable),
    }


def _lines(summary: dict[str, int], problems: tuple[str, ...], studies: Mapping[str, Any]) -> list[str]:
    """The report for people: the counts, what was left out, what was changed; the rest was taken as it is."""
    left_out = [f"{uid}  {study['left_out']}" for uid, study in studies.items() if study["left_out"]]
    changed = [f"{uid}  {' '.join(study['notes'])}" for uid, study in studies.items() if study["notes"]]
    counts = [f"{count:6,d} {name.replace('_', ' ')}" for name, count in summary.items()]
    sections = (("Tables", list(problems)), ("Left out", left_out), ("Taken, but", changed))
    return counts + [line for title, lines in sections if lines for line in ("", f"{title} ({len(lines)})", *lines)]


def _subgroups(uid: str, record: Record, fold: int) -> list[object]:
    """A study's row: a hash for the patient, and what its images may be grouped by."""
    spacing_mm = grid_from_dict(record["grid"]).spacing_mm[0]
    limits = ((0.7, "up to 0.7 mm"), (1.1, "0.7 to 1.1 mm"), (float("inf"), "more than 1.1 mm"))
    numbers = [int(stem) for name in record["slices"] if (stem := Path(name).stem).isdigit()]
    direction = "unknown"
    if len(numbers) > 1:
        direction = "from the feet" if numbers[-1] > numbers[0] else "from the head"
    return [
        uid,
        record["patient"],
        next(name for limit, name in limits if spacing_mm <= limit),
        len(record["slices"]),
        direction,
        fold,
    ]
