"""A data set as RSNA 2022 is downloaded, from the phantom: its files, its tables, and every trap of the real one.

Which study has which trap its number decides (`traits`), so that eight studies have them all. For trying and testing
what reads the real data; a network trained on it knows phantoms.
"""

import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import gdcm
import nibabel
import numpy as np
import pydicom
from scipy import ndimage

from model import LEVELS, Grid
from model.phantom import Anatomy, Fracture, Phantom, default_grid, kinds_at, render, write_series
from training.evaluation.loss import LEVEL_PREVALENCE
from training.rsna.processes import in_processes
from training.rsna.source import TARGETS

NEIGHBOUR_BREAKS = 0.3
"""Fractures come in neighbours."""


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """Distance of slices and size of pixels, mm: one of the values, or one between two."""

    slice_mm: tuple[float, ...]
    pixel_mm: tuple[float, float]


FINE = Scanner(slice_mm=(0.8, 1.0, 1.25), pixel_mm=(0.5, 0.75))
COARSE = Scanner(slice_mm=(1.25, 1.5), pixel_mm=(0.9, 1.1))
SMALL = Scanner(slice_mm=(3.0,), pixel_mm=(1.6, 1.8))
SCANNERS = {"fine": FINE, "coarse": COARSE, "small": SMALL}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What is special about a study.

    from_feet: file 1 is the lowest slice, not the highest. is_stripped: no SOPClassUID and no Modality in its datasets.
    is_sagittal: its slices are sagittal, so that it cannot be used. lacks_slice: one in the middle.
    has_odd_slice: the highest one has fewer rows. shares_patient: with the study four before it.
    """

    is_fractured: bool
    is_jpeg: bool
    from_feet: bool
    is_stripped: bool
    is_sagittal: bool
    lacks_slice: bool
    has_odd_slice: bool
    shares_patient: bool
    has_mask: bool
    mask_is_sagittal: bool
    mask_is_reversed: bool
    mask_has_stray_voxels: bool
    mask_is_zipped: bool
    has_boxes: bool


def traits(number: int) -> Traits:
    """The traits of a study, by its number from 0."""
    return Traits(
        is_fractured=number % 2 == 0,
        is_jpeg=number % 3 != 2,
        from_feet=number % 5 in (1, 4),
        is_stripped=number % 4 in (1, 2),
        is_sagittal=number == 3,
        lacks_slice=number == 2,
        has_odd_slice=number == 4,
        shares_patient=number == 6,
        has_mask=number % 5 in (0, 1, 4),
        mask_is_sagittal=number % 5 == 0,
        mask_is_reversed=number == 5,
        mask_has_stray_voxels=number == 1,
        mask_is_zipped=number % 10 == 6,
        has_boxes=number % 4 != 2,
    )


def study_uid(number: int, seed: int) -> str:
    """StudyInstanceUID of a study. Reference: PS3.5 B.2."""
    return f"2.25.{uuid5(NAMESPACE_OID, f'C-Spine Node demo/{seed}/{number}').int}"


def generate(
    folder: Path, num_studies: int, *, num_test: int, scanner: Scanner, seed: int = 0, num_workers: int = 1
) -> Iterator[str]:
    """Writes the data set into a folder, which must not have one; gives the UID of each study as it is written.

    The studies of `test.csv` follow on those of `train.csv` in number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(num_studies + num_test)
    jobs = {study_uid(n, seed): (folder, n, seed, scanner, n >= num_studies) for n in numbers}
    written = {}
    for uid, result in in_processes(write_study, jobs, num_workers):
        written[uid] = result
        yield uid
    train, boxes = [], []
    for uid in list(jobs)[:num_studies]:
        fractured, drawn = written[uid]
        train.append([uid, int(any(fractured)), *map(int, fractured)])
        boxes += [[uid, *box] for box in drawn]
    _write_table(folder / "train.csv", ("StudyInstanceUID", *TARGETS), train)
    columns = ("StudyInstanceUID", "x", "y", "width", "height", "slice_number")
    _write_table(folder / "train_bounding_boxes.csv", columns, boxes)
    rows = [[f"{uid}_{kind}", uid, kind] for uid in list(jobs)[num_studies:] for kind in TARGETS]
    _write_table(folder / "test.csv", ("row_id", "StudyInstanceUID", "prediction_type"), rows)


def draw_study(number: int, seed: int, scanner: Scanner) -> Phantom:
    """The phantom of a study, with its truth."""
    rng = np.random.default_rng([seed, number, 5])
    fractures = _fractures(rng) if traits(number).is_fractured else ()
    anatomy = Anatomy.random(1000 * seed + number, fractures, variation=float(rng.uniform(0.6, 1.4)))
    pixel_mm = float(rng.uniform(*scanner.pixel_mm))
    grid = default_grid(anatomy, (float(rng.choice(scanner.slice_mm)), pixel_mm, pixel_mm))
    if traits(number).is_sagittal:
        grid = Grid(shape=(grid.shape[2], grid.shape[1], grid.shape[0]), affine=grid.affine[:, [2, 1, 0, 3]])
    return render(anatomy, grid, noise_hu=float(rng.uniform(8, 25)), blur_mm=float(rng.uniform(0.4, 0.9)), seed=number)


def _fractures(rng: np.random.Generator) -> tuple[Fracture, ...]:
    first = int(rng.choice(len(LEVELS), p=LEVEL_PREVALENCE / LEVEL_PREVALENCE.sum()))
    broken = {first} | {n for n in (first - 1, first + 1) if 0 <= n < len(LEVELS) and rng.random() < NEIGHBOUR_BREAKS}
    return tuple(
        Fracture(level=LEVELS[n], kind=str(rng.choice(kinds_at(LEVELS[n]))), width_mm=float(rng.uniform(0.8, 3.0)))
        for n in sorted(broken)
    )


def write_study(
    folder: Path, number: int, seed: int, scanner: Scanner, is_test: bool
) -> tuple[list[bool], list[tuple[int, ...]]]:
    """Writes one study's files; which of C1..C7 are fractured, and its boxes `(x, y, width, height, slice_number)`."""
    has, uid = traits(number), study_uid(number, seed)
    phantom = draw_study(number, seed, scanner)
    num_slices = phantom.grid.shape[0]
    file_numbers = range(1, num_slices + 1) if has.from_feet else range(num_slices, 0, -1)
    images = folder / ("test_images" if is_test else "train_images") / uid
    images.mkdir(parents=True)
    patient_id = study_uid(number - 4 if has.shares_patient else number, seed)
    with tempfile.TemporaryDirectory() as written:
        paths = write_series(phantom, Path(written), study_instance_uid=uid, patient_id=patient_id[-16:])
        for z, (path, file_number) in enumerate(zip(paths, file_numbers, strict=True)):
            if has.lacks_slice and z == num_slices // 2:
                continue
            is_odd = has.has_odd_slice and z == num_slices - 1
            _as_in_rsna(path, images / f"{file_number}.dcm", file_number, has, is_odd)
    if has.has_mask and not is_test:
        _write_mask(folder / "segmentations", uid, phantom, has)
    fractured = [bool((phantom.fractures == label).any()) for label in range(1, len(LEVELS) + 1)]
    return fractured, _boxes(phantom, file_numbers) if has.has_boxes else []


def _as_in_rsna(path: Path, target: Path, file_number: int, has: Traits, is_odd: bool) -> None:
    """Rewrites a file of the phantom as the data set has it."""
    ds = pydicom.dcmread(path)
    ds.InstanceNumber = file_number
    if is_odd:
        ds.PixelData, ds.Rows = ds.PixelData[: -16 * ds.Columns], ds.Rows - 8
    ds.save_as(path)
    if has.is_jpeg:
        _compress(path)
        ds = pydicom.dcmread(path)
    if has.is_stripped:
        del ds.SOPClassUID, ds.Modality
    ds.save_as(target)


def _compress(path: Path) -> None:
    """Rewrites an uncompressed file as JPEG Lossless, Process 14, Selection Value 1, which pydicom cannot encode."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    if not reader.Read():
        raise OSError(f"GDCM cannot read {path}.")
    change.SetInput(reader.GetImage())
    if not change.Change():
        raise OSError(f"GDCM cannot encode {path} as JPEG Lossless.")
    writer.SetFileName(str(path))  # not before it is read: this empties the file
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    if not writer.Write():
        raise OSError(f"GDCM cannot write {path}.")


def _write_mask(folder: Path, uid: str, phantom: Phantom, has: Traits) -> None:
    """The phantom's vertebrae as NIfTI, whose affine leads to RAS."""
    folder.mkdir(exist_ok=True)
    labels = phantom.vertebrae.copy()
    if has.mask_has_stray_voxels:
        labels[2:4, 2:6, 2:6] = 3
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ phantom.grid.affine
    if has.mask_is_reversed:
        labels = labels[::-1]
    # Axial: (X, Y, Z) as dcm2niix writes it. Sagittal: slices of (Y, Z), which begin at the head.
    order = (1, 0, 2) if has.mask_is_sagittal else (2, 1, 0)
    stored, affine = labels.transpose(order), affine[:, [*order, 3]]
    if has.mask_is_sagittal:
        stored = stored[:, ::-1]
        affine = affine @ np.array([[1, 0, 0, 0], [0, -1, 0, stored.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    name = f"{uid}.nii.gz" if has.mask_is_zipped else f"{uid}.nii"
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(stored), affine), folder / name)


def _boxes(phantom: Phantom, file_numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """A box around each piece of a fracture in each slice, a few pixels wider, as a person draws it."""
    boxes: list[tuple[int, ...]] = []
    for z, file_number in enumerate(file_numbers):
        pieces, _ = ndimage.label(phantom.fractures[z] > 0, np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(pieces):
            x, y = columns.start - 2, rows.start - 2
            boxes.append((x, y, columns.stop - columns.start + 4, rows.stop - rows.start + 4, file_number))
    return boxes


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(rows)
