"""The cache: where `prepare` puts each study, and how training reads it again.

```
cache.json                       format, source folder, settings, the fold of each study
report.json, report.txt          what became of each study, and why
studies/<UID>/study.json         labels, grids, boxes, what was changed; or why the study was left out
studies/<UID>/neck.npy           HU of the neck on an isotropic grid
studies/<UID>/truth.npz          labels of the vertebrae, on the CT's grid and on the neck's; where there is a mask
labels/<set>/<UID>.npz           further labels on the neck's grid, such as pseudo-labels of a round
cuts/<name>/<UID>/               stacks of slices by vertebra (`training.rsna.stacks`)
```
A folder or file appears under its name when it is whole. Voxels at full resolution stay in the DICOM files: they take a
few seconds to read, are needed once for each cut, and would be some 200 GB beside the 340 of the download.
"""

import hashlib
import json
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError

from model import LEVELS, PARSE_ERRORS, Grid, SeriesError, SeriesRules, Volume, read_series
from training.files import dicom_files, replacing_file
from training.rsna.boxes import Box, draw_boxes
from training.rsna.stacks import Stacks, read_stacks

FORMAT = 1
"""Version of the layout; another one is built again."""

NUM_FOLDS = 5

RULES = SeriesRules(max_bridged_gaps=5, max_odd_slices=10, assume_ct=True)
"""A study for training may be less perfect than one to be reported on."""


class CacheError(Exception):
    """There is no cache here, or not one that can be read; the message says what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """One usable study. Small: voxels are read when they are asked for, so it can go to other processes.

    patient: a hash; studies of one patient share it, and the fold. levels: fractured or not, C1..C7.
    grid: of the CT, as `model.read_series` gives it. neck_grid: of `neck_hu` and `labels`, isotropic, along the
    patient's axes, around the body. fingerprint: of what the study was made from.
    Labels are 0 background, 1..7 = C1..C7, 8.. = T1...
    """

    study_instance_uid: str
    patient: str
    fold: int
    levels: tuple[bool, ...]
    patient_overall: bool
    grid: Grid
    neck_grid: Grid
    boxes: tuple[Box, ...]
    has_mask: bool
    fingerprint: str
    files: Path
    cache: Path

    def neck_hu(self) -> NDArray[np.int16]:
        """HU `(Z, Y, X)` on `neck_grid`, memory-mapped, read-only."""
        voxels: NDArray[np.int16] = np.load(self._folder / "neck.npy", mmap_mode="r")
        return voxels

    def labels(self, name: str = "truth") -> NDArray[np.uint8] | None:
        """Labels `(Z, Y, X)` on `neck_grid`: the mask's, or those of a set that was written; None if it has none.

        Labels that were written for a neck of another spacing count as none.
        """
        if name == "truth":
            return _array(self._folder / "truth.npz", "neck") if self.has_mask else None
        path = self._labels_path(name)
        labels = _array(path, "labels") if path.exists() else None
        return labels if labels is not None and labels.shape == self.neck_grid.shape else None

    def write_labels(self, name: str, labels: NDArray[np.uint8], *, drawn_by: str = "") -> None:
        """Puts labels `(Z, Y, X)` on `neck_grid` into a set, in place of what it had for this study.

        drawn_by: names the network, for `labels_drawn_by`.

        Raises:
            ValueError: another shape, or the name of the mask's own labels.
        """
        if name == "truth" or labels.shape != self.neck_grid.shape:
            raise ValueError(
                f"Labels {name!r} have shape {labels.shape}; expected {self.neck_grid.shape}, and a name that is not "
                "'truth', which is the mask's."
            )
        with replacing_file(self._labels_path(name)) as unfinished:
            np.savez_compressed(unfinished, labels=labels.astype(np.uint8), drawn_by=np.array(drawn_by))

    def labels_drawn_by(self, name: str) -> str | None:
        """Who drew this study's labels of a set, None if `labels` has none."""
        if self.labels(name) is None:
            return None
        with np.load(self._labels_path(name)) as arrays:
            return str(arrays["drawn_by"]) if "drawn_by" in arrays else ""

    def mask(self) -> NDArray[np.uint8] | None:
        """Labels `(Z, Y, X)` on `grid`, None without a mask."""
        return _array(self._folder / "truth.npz", "ct") if self.has_mask else None

    def volume(self) -> Volume:
        """The CT at full resolution, from its DICOM files.

        Raises:
            CacheError: they are no longer where they were.
        """
        if not self.files.is_dir():
            raise CacheError(
                f"The DICOM files of study {self.study_instance_uid} are no longer in {self.files}. "
                "Run `cspine-train prepare` with the folder they are in now; nothing is built twice."
            )
        return read_volume(dicom_files(self.files))

    def stacks(self, cut: str) -> Stacks | None:
        """The study's stacks of a cut, None if it has none there."""
        folder = self.stacks_folder(cut)
        return read_stacks(folder) if folder.exists() else None

    def stacks_folder(self, cut: str) -> Path:
        """Where a cut keeps this study's stacks."""
        return self.cache / "cuts" / cut / self.study_instance_uid

    def labels_fingerprint(self, name: str) -> str | None:
        """Changes when the labels of a set do, and not when the same are written again; None if it has none."""
        path, array = (self._folder / "truth.npz", "ct") if name == "truth" else (self._labels_path(name), "labels")
        if not path.exists():
            return None
        with zipfile.ZipFile(path) as archive:
            return f"{name} {archive.getinfo(f'{array}.npy').CRC:08x}"

    def boxes_on(self, grid: Grid) -> NDArray[np.bool_]:
        """Which voxels `(Z, Y, X)` of any grid lie in a box.

        A box is as thick as its slice, or as the grid's voxels are high where they are higher: none falls between.
        """
        return draw_boxes(self.boxes, self.grid, grid)

    @cached_property
    def _folder(self) -> Path:
        return self.cache / "studies" / self.study_instance_uid

    def _labels_path(self, name: str) -> Path:
        return self.cache / "labels" / name / f"{self.study_instance_uid}.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cache:
    """A cache that `prepare` has finished. folder: its own. source: the data set's. spacing_mm: of the neck's grid.
    fingerprint: of its studies and their folds."""

    folder: Path
    source: Path
    spacing_mm: float
    folds: dict[str, int]
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """The cache in a folder.

        Raises:
            CacheError: there is none, it is not finished, or of another version.
        """
        path = folder / "cache.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CacheError(
                f"There is no finished cache in {folder}. Make it with `cspine-train prepare --cache {folder}`; "
                "one that was interrupted goes on where it stopped."
            ) from None
        except ValueError:
            content = None
        if not isinstance(content, dict) or "format" not in content:
            raise CacheError(f"{path} is damaged. Run `cspine-train prepare` again: what is still right is kept.")
        if content["format"] != FORMAT or "fingerprint" not in content:
            raise CacheError(
                f"The cache in {folder} was made by another version (format {content['format']}; this one reads "
                f"format {FORMAT}). Run `cspine-train prepare` again: what is still right is kept."
            )
        return cls(
            folder=folder.absolute(),
            source=Path(content["source"]),
            spacing_mm=content["spacing_mm"],
            folds=content["folds"],
            fingerprint=content["fingerprint"],
        )

    def studies(self, folds: Collection[int] | None = None, has_mask: bool | None = None) -> list[Study]:
        """Usable studies, ordered by UID: of these folds, and with or without a mask; None takes all."""
        return [
            study
            for uid, fold in sorted(self.folds.items())
            if (folds is None or fold in folds)
            and (study := self.study(uid))
            and (has_mask is None or study.has_mask == has_mask)
        ]

    def study(self, study_instance_uid: str) -> Study:
        """One usable study.

        Raises:
            CacheError: no such study here, or it was left out.
        """
        if study_instance_uid not in self.folds:
            raise CacheError(
                f"Study {study_instance_uid} is not among the usable ones of {self.folder}; its report.txt says why."
            )
        record = read_record(self.folder, study_instance_uid)
        if record is None:
            raise CacheError(
                f"Study {study_instance_uid} is missing from the cache in {self.folder}. Run `cspine-train prepare` "
                "again: it makes what is missing."
            )
        return Study(
            study_instance_uid=study_instance_uid,
            patient=record["patient"],
            fold=self.folds[study_instance_uid],
            levels=tuple(record["labels"][level] for level in LEVELS),
            patient_overall=record["labels"]["patient_overall"],
            grid=grid_from_dict(record["grid"]),
            neck_grid=grid_from_dict(record["neck_grid"]),
            boxes=tuple(Box(**box) for box in record["boxes"]),
            has_mask=record["mask"] is not None,
            fingerprint=record["fingerprint"],
            files=self.source / record["files"],
            cache=self.folder,
        )


def read_volume(files: Sequence[Path]) -> Volume:
    """The CT in a study's files. One that was cut off before it says of which Series it is counts as missing.

    Raises:
        SeriesError, OSError: see `model.read_series`.
    """
    try:
        return read_series(files, RULES)
    except SeriesError:
        damaged = [path for path in files if _is_of_no_series(path)]
        if len(damaged) in (0, len(files)):
            raise
    names = ", ".join([*(path.name for path in damaged[:5]), *(["..."] if len(damaged) > 5 else [])])
    sentence = f"Damaged, without a SeriesInstanceUID, and counted as missing: {len(damaged)} files ({names})."
    try:
        volume = read_series([path for path in files if path not in damaged], RULES)
    except SeriesError as error:
        raise SeriesError(f"{error} {sentence}") from error
    return replace(volume, warnings=(*volume.warnings, sentence))


def _is_of_no_series(path: Path) -> bool:
    try:
        ds = pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"], stop_before_pixels=True)
        return not ds.get("SeriesInstanceUID")
    except (InvalidDicomError, *PARSE_ERRORS):  # which `read_series` knows
        return False


def read_record(cache: Path, study_instance_uid: str) -> dict[str, Any] | None:
    """What `study.json` says of a study, None if it is not in the cache."""
    path = cache / "studies" / study_instance_uid / "study.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def digest(content: Any) -> str:
    """Of anything that JSON can hold, in a few letters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def grid_to_dict(grid: Grid) -> dict[str, Any]:
    """JSON-ready; `grid_from_dict` is its inverse, bit by bit."""
    return {"shape": list(grid.shape), "affine": grid.affine.tolist()}


def grid_from_dict(values: dict[str, Any]) -> Grid:
    """The grid of a dict made by `grid_to_dict`."""
    z, y, x = values["shape"]
    return Grid(shape=(z, y, x), affine=np.array(values["affine"], float))


def _array(path: Path, name: str) -> NDArray[np.uint8]:
    with np.load(path) as arrays:
        array: NDArray[np.uint8] = arrays[name]
        return array
