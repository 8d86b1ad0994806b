"""One study of the source into the cache: the straight line, in a process of its own. Called by `prepare`."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError

from model import PARSE_ERRORS, SeriesError, Volume
from model.resample import body_volume
from training.files import dicom_files, replacing_folder, write_json
from training.rsna.boxes import Box
from training.rsna.cache import FORMAT, grid_to_dict, read_record, read_volume
from training.rsna.masks import Mask, MaskError, labels_on, read_mask
from training.rsna.source import SourceStudy

UNUSABLE_STUDIES = ("43.20574", "43.29952")
"""Ends of the StudyInstanceUIDs of two studies of RSNA 2022 that the participants of the challenge found unusable."""

BONE_HU, MIN_BONE_CM3 = 200, 30.0
"""A neck has some 100 cm3 of vertebrae, and skull and ribs beside: with less bone than this it is no neck."""


class UnusableStudy(Exception):  # noqa: N818 - a finding about the study, not a failure
    """This study cannot be trained on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What shapes the cache. spacing_mm: of the neck's grid."""

    spacing_mm: float = 1.0


def prepare_study(source_folder: Path, study: SourceStudy, cache: Path, settings: Settings) -> dict[str, Any]:
    """The record of a study, made and written unless the cache has it from the same files and settings.

    A study that cannot be used has `left_out`, a sentence, and no voxels.
    """
    files = dicom_files(study.files)
    fingerprint = source_fingerprint(study, files, asdict(settings))
    record = read_record(cache, study.study_instance_uid)
    if record and record["fingerprint"] == fingerprint:
        return record
    record = {
        "study_instance_uid": study.study_instance_uid,
        "fingerprint": fingerprint,
        "patient": _patient(study, files),
        "labels": study.labels,
        "files": str(study.files.relative_to(source_folder)),
        "left_out": None,
    }
    arrays: dict[str, NDArray[Any]] = {}
    try:
        more, arrays = _made(study, files, settings)
        record |= more
    except (SeriesError, UnusableStudy) as error:
        record["left_out"] = str(error)
    except OSError as error:
        # It may be read the next time: no fingerprint is like this one.
        record |= {"left_out": f"A file cannot be read ({error}).", "fingerprint": ""}
    with replacing_folder(cache / "studies" / study.study_instance_uid) as folder:
        if "neck_hu" in arrays:
            np.save(folder / "neck.npy", arrays["neck_hu"])
        if "neck" in arrays:
            np.savez_compressed(folder / "truth.npz", ct=arrays["ct"], neck=arrays["neck"])
        write_json(folder / "study.json", record)
    return record


def _made(study: SourceStudy, files: list[Path], settings: Settings) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The rest of the record of a usable study, and its arrays."""
    if study.study_instance_uid.endswith(UNUSABLE_STUDIES):
        raise UnusableStudy("It is on the list of studies that were found to be unusable.")
    if not files:
        raise UnusableStudy(f"There are no files in {study.files}.")
    volume = read_volume(files)
    neck_hu, neck_grid = body_volume(volume.voxels_hu, volume.grid, settings.spacing_mm, multiple=1)
    bone_cm3 = float((neck_hu > BONE_HU).sum()) * settings.spacing_mm**3 / 1000
    if bone_cm3 < MIN_BONE_CM3:
        raise UnusableStudy(f"It holds {bone_cm3:.0f} cm3 of bone; at least {MIN_BONE_CM3:.0f} are expected of a neck.")
    notes = list(volume.warnings)
    arrays: dict[str, NDArray[Any]] = {"neck_hu": neck_hu.round().to(torch.int16).numpy()}
    mask = _mask(study, volume, notes)
    if mask is not None:
        arrays |= {"ct": mask.labels, "neck": labels_on(mask.labels, volume.grid, neck_grid)}
    more = {
        "series_instance_uid": volume.series_instance_uid,
        "grid": grid_to_dict(volume.grid),
        "neck_grid": grid_to_dict(neck_grid),
        "slices": [source.path.name for source in volume.slices],
        "boxes": [asdict(box) for box in _boxes(study, volume, notes)],
        "mask": _describe(mask) if mask else None,
        "notes": notes,
    }
    return more, arrays


def _mask(study: SourceStudy, volume: Volume, notes: list[str]) -> Mask | None:
    if study.mask is None:
        return None
    try:
        mask = read_mask(study.mask, volume)
    except MaskError as error:
        notes.append(f"The mask was left out: {error}")
        return None
    if mask.was_reversed:
        notes.append(
            f"The mask was upside down and was righted: {mask.bone_share:.0%} of it lies on bone, "
            f"{mask.other_bone_share:.0%} did."
        )
    if mask.num_stray_voxels:
        notes.append(f"{mask.num_stray_voxels} stray voxels were removed from the mask.")
    return mask


def _describe(mask: Mask) -> dict[str, Any]:
    return {
        "levels": [int(label) for label in np.unique(mask.labels) if label],
        "was_reversed": mask.was_reversed,
        "bone_share": round(mask.bone_share, 3),
        "other_bone_share": round(mask.other_bone_share, 3),
        "num_stray_voxels": mask.num_stray_voxels,
    }


def _boxes(study: SourceStudy, volume: Volume, notes: list[str]) -> list[Box]:
    """The boxes in the slices they were drawn in, which are named by the number of their file."""
    at = {source.path.stem: z for z, source in enumerate(volume.slices) if not source.is_interpolated}
    boxes = [
        Box(z=at[str(box.slice_number)], x=box.x, y=box.y, width=box.width, height=box.height)
        for box in study.boxes
        if str(box.slice_number) in at
    ]
    if len(boxes) < len(study.boxes):
        notes.append(f"{len(study.boxes) - len(boxes)} of {len(study.boxes)} boxes lie in slices that are not here.")
    return sorted(boxes, key=lambda box: (box.z, box.y, box.x))


def _patient(study: SourceStudy, files: list[Path]) -> str:
    """A hash that studies of one patient share: of PatientID where the files have one, of the study's UID otherwise."""
    patient_id = ""
    try:
        if files:
            ds = pydicom.dcmread(files[0], specific_tags=["PatientID"], stop_before_pixels=True)
            patient_id = str(ds.get("PatientID") or "").strip()
    except (InvalidDicomError, OSError, *PARSE_ERRORS):
        patient_id = ""
    return hashlib.sha256((patient_id or study.study_instance_uid).encode()).hexdigest()[:16]


def source_fingerprint(study: SourceStudy, files: list[Path], settings: dict[str, Any]) -> str:
    """Changes when anything does that the study is made from: files (name, size, time), tables, settings, layout."""
    stats = [(path, path.stat()) for path in (*files, *([study.mask] if study.mask else []))]
    content = {
        "format": FORMAT,
        "settings": settings,
        "files": [(path.name, stat.st_size, int(stat.st_mtime)) for path, stat in stats],
        "labels": study.labels,
        "boxes": [asdict(box) for box in study.boxes],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
