"""`cspine-train cut`: each vertebra's stack of slices at full resolution, with its mask and its fracture, once.

Cut by the functions that the pipeline itself uses (`model.classify`), so that training and analysis cannot disagree.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache as remember
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from model import LEVELS, Grid, SeriesError, Volume, load_pipeline, read_bundle
from model.bundle import ClassifySettings
from model.classify import NUM_NEIGHBOURS, sample_mask, sample_planes, stack_grid
from model.pipeline import Pipeline
from model.pose import middle_of_box, turned_by_deg
from model.segment import CUT_AREA_MM2, MIN_VOLUME_MM3
from training.files import locked, remove_unfinished, write_json
from training.rsna.cache import FORMAT, Cache, CacheError, Study, digest
from training.rsna.processes import in_processes
from training.rsna.stacks import CutSettings, Stacks, stacks_fingerprint, write_stacks

CUT_FORMAT = 2
"""Version of how stacks are cut; those of another one are cut again. 2: who lies turned is cut facing forward."""

MIN_VISIBLE = 0.3
"""With less of a vertebra in the field of view its label says nothing: who read the CT judged what they saw."""

BONE_MARGIN_MM = 3.0
"""A fracture's box counts this far around its vertebra: displaced fragments, and what a mask leaves out of a gap."""

USUAL_CM3 = (9.3, 15.4, 9.0, 9.2, 9.6, 10.9, 12.7)
"""Volumes of C1..C7 of the mean phantom; where a vertebra is whole only their ratios matter."""


def cut(
    cache: Cache,
    name: str,
    settings: CutSettings | ClassifySettings,
    masks: str | Path = "truth",
    *,
    num_workers: int = 1,
) -> Iterator[tuple[Study, str | None]]:
    """Cuts every study that has labels; gives each study as it is done, and why it has no stacks, None if it has.

    masks: "truth" or a label set of the cache; or the folder of a model bundle, which then finds the vertebrae, unless
    it refuses the study. What was cut with the same labels and settings is kept; stacks of studies that no longer have
    labels are removed. `cut.json` is written at the end: without it nothing reads a cut.

    Raises:
        BusyError: another run makes this cut, or `prepare` is at work.
        BundleError: the bundle cannot be read.
        CacheError: the DICOM files are gone.
        ProcessDiedError: a process died.
    """
    folder = cache.folder / "cuts" / name
    size = CutSettings(num_slices=settings.num_slices, num_pixels=settings.num_pixels, pixel_mm=settings.pixel_mm)
    if isinstance(masks, Path):
        masks = masks.absolute()  # later steps may run elsewhere
        read_bundle(masks)  # refused here rather than in every process
    with locked(cache.folder / "studies", shared=True), locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        (folder / "cut.json").unlink(missing_ok=True)
        studies = {study.study_instance_uid: study for study in cache.studies()}
        labels = _labels_digest(list(studies.values()), str(masks))
        jobs = {uid: (study, name, size, masks) for uid, study in studies.items()}
        left_out = {}
        for uid, reason in in_processes(_cut_into_cache, jobs, num_workers):
            if reason is not None:
                left_out[uid] = reason
            yield studies[uid], reason
        made = {uid: stacks_fingerprint(study.stacks_folder(name)) for uid, study in studies.items()}
        write_json(
            folder / "cut.json",
            {
                **asdict(size),
                "masks": str(masks),
                "labels": labels,
                "cache": cache.fingerprint,
                "fingerprint": digest(made),
                "left_out": dict(sorted(left_out.items())),
            },
        )


def cut_settings(cache: Cache, name: str) -> CutSettings:
    """The settings of a cut.

    Raises:
        CacheError: there is no such cut, or it is not finished.
    """
    content = _read_cut(cache, name)
    return CutSettings(**{field.name: content[field.name] for field in fields(CutSettings)})


def cut_fingerprint(cache: Cache, name: str) -> str:
    """Of all stacks of a cut: another one when any of them was cut anew.

    Raises:
        CacheError: there is no such cut, it is not finished, or its studies or labels have changed since it was made.
    """
    content = _read_cut(cache, name)
    changed = []
    if content["cache"] != cache.fingerprint:
        changed.append("the cache")
    if content["labels"] != _labels_digest(cache.studies(), content["masks"]):
        changed.append(f"the labels {content['masks']!r}")
    if changed:
        raise CacheError(
            f"Since the cut {name!r} was made, {' and '.join(changed)} changed. Run `cspine-train cut "
            f"--cache {cache.folder} --name {name} --masks {content['masks']}` again: only what changed is cut anew."
        )
    return str(content["fingerprint"])


def _read_cut(cache: Cache, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((cache.folder / "cuts" / name / "cut.json").read_text(encoding="utf-8"))
        if "fingerprint" in content:
            return content
    except FileNotFoundError:
        pass
    raise CacheError(
        f"There is no finished cut {name!r} in {cache.folder}. Run `cspine-train segment` for each fold (or with "
        f"--label-all), then `cspine-train cut --name {name} --masks ...`; what is cut already is kept."
    )


def _labels_digest(studies: list[Study], masks: str) -> str:
    """Of the labels that a cut reads; of a bundle's, which are not kept, the same always."""
    is_bundle = Path(masks).is_absolute()
    return digest(masks if is_bundle else [study.labels_fingerprint(masks) for study in studies])


def _cut_into_cache(study: Study, name: str, settings: CutSettings, masks: str | Path) -> str | None:
    """In a process of the pool: makes a study's stacks unless they are there; why they are not there now."""
    folder = study.stacks_folder(name)
    if isinstance(masks, str) and study.labels(masks) is None:
        shutil.rmtree(folder, ignore_errors=True)
        return f"It has no labels {masks!r}."
    made_from = (masks / "bundle.json").read_text() if isinstance(masks, Path) else study.labels_fingerprint(masks)
    content = [FORMAT, CUT_FORMAT, study.fingerprint, asdict(settings), made_from]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if stacks_fingerprint(folder) == fingerprint:
        return None
    try:
        volume = study.volume()
        labels, grid = _labels(study, volume, masks)
    except (SeriesError, OSError) as error:  # files changed or damaged since; or a bundle's rules, which are stricter
        shutil.rmtree(folder, ignore_errors=True)
        return str(error)
    write_stacks(folder, cut_study(study, volume, labels, grid, settings), fingerprint)
    return None


def _labels(study: Study, volume: Volume, masks: str | Path) -> tuple[NDArray[np.uint8], Grid]:
    """Labels of a study that has them, and their grid."""
    if isinstance(masks, Path):
        return _pipeline(masks).segment(volume)[0], volume.grid
    labels = study.mask() if masks == "truth" else study.labels(masks)
    assert labels is not None
    return labels, study.grid if masks == "truth" else study.neck_grid


@remember
def _pipeline(bundle: Path) -> Pipeline:
    return load_pipeline(bundle, device="cpu")


def cut_study(
    study: Study, volume: Volume, labels: NDArray[np.uint8], labels_grid: Grid, settings: CutSettings | ClassifySettings
) -> Stacks:
    """The stacks of one study. volume: its CT. labels: uint8 `(Z, Y, X)` on any grid, 1..7 = C1..C7, others ignored.

    Those of a patient who lies turned are turned with the patient, as the pipeline's are.
    """
    num_planes = 2 * (settings.num_slices - 1) + 1 + 2 * NUM_NEIGHBOURS
    shape = (len(LEVELS), num_planes, settings.num_pixels, settings.num_pixels)
    planes_hu, masks, regions = np.zeros(shape, np.int16), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    visible = visible_shares(labels, labels_grid, volume.grid)
    judged = visible >= MIN_VISIBLE
    fractured = np.array(study.levels) & judged
    voxels = _voxels(labels)
    twist_deg = turned_by_deg(labels, labels_grid)
    for i in np.flatnonzero(judged):
        label = int(i) + 1
        points = labels_grid.to_lps_mm(voxels[i].astype(float))
        middle_lps_mm, height_mm = middle_of_box(points, twist_deg), float(np.ptp(points[:, 2]))
        planes = stack_grid(middle_lps_mm, height_mm, settings, twist_deg)  # type: ignore[arg-type]  # it reads what both have
        mask = sample_mask(labels, labels_grid, planes, label)
        planes_hu[i] = sample_planes(volume.voxels_hu, volume.grid, planes).round().numpy()
        masks[i] = (mask * 255).round().numpy()
        if fractured[i]:
            regions[i] = 255 * (study.boxes_on(planes) & _grown(mask, planes).numpy())
    return Stacks(
        planes_hu=planes_hu,
        masks=masks,
        regions=regions,
        fractured=fractured,
        judged=judged,
        regions_known=judged & (~fractured | regions.any(axis=(1, 2, 3))),
        visible=visible,
    )


def visible_shares(labels: NDArray[np.uint8], grid: Grid, field_of_view: Grid) -> NDArray[np.float32]:
    """How much of C1..C7 lies in the field of view, float32 `(7,)`: 0 what has no label, 1 what is not cut.

    Of a vertebra that reaches the border, its volume beside that of a usual one, which the whole vertebrae of the same
    neck scale.
    """
    voxels = _voxels(labels)
    sizes = np.array([len(indices) for indices in voxels]) * grid.voxel_volume_mm3
    found = sizes >= MIN_VOLUME_MM3
    is_cut = np.array([_reaches_border(indices, grid, field_of_view) for indices in voxels]) & found
    usual_mm3 = np.array(USUAL_CM3) * 1000
    whole = found & ~is_cut
    scale = float(np.median(sizes[whole] / usual_mm3[whole])) if whole.any() else 1.0
    shares = np.where(is_cut, np.minimum(sizes / (scale * usual_mm3), 1), 1.0)
    return np.where(found, shares, 0).astype(np.float32)


def _voxels(labels: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Indices `(n, 3)` of the voxels of each of C1..C7."""
    boxes = ndimage.find_objects(labels, max_label=len(LEVELS))
    return [
        np.argwhere(labels[box] == label) + [part.start for part in box] if box else np.empty((0, 3), np.int64)
        for label, box in enumerate(boxes, start=1)
    ]


def _reaches_border(voxels: NDArray[np.int64], grid: Grid, field_of_view: Grid) -> bool:
    """Whether more than CUT_AREA_MM2 of a vertebra lies at one of the six sides of the field of view."""
    indices = field_of_view.to_index(grid.to_lps_mm(voxels.astype(float)))
    for axis, (size, spacing_mm) in enumerate(zip(field_of_view.shape, field_of_view.spacing_mm, strict=True)):
        layer_mm = max(spacing_mm, min(grid.spacing_mm))
        from_border_mm = np.minimum(indices[:, axis] + 0.5, size - 0.5 - indices[:, axis]) * spacing_mm
        if (from_border_mm < layer_mm).sum() * grid.voxel_volume_mm3 / layer_mm > CUT_AREA_MM2:
            return True
    return False


def _grown(mask: Tensor, planes: Grid) -> Tensor:
    """A mask `(P, Y, X)`, 0..1, grown by BONE_MARGIN_MM; bool."""
    z, y, x = (2 * round(BONE_MARGIN_MM / spacing_mm) + 1 for spacing_mm in planes.spacing_mm)
    grown = F.max_pool3d(mask[None], (1, y, x), 1, (0, y // 2, x // 2))
    return F.max_pool3d(grown, (z, 1, 1), 1, (z // 2, 0, 0))[0] > 0.25
