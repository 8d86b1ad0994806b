"""What the vertebra U-Nets learn from, as files: drawn necks, phantoms, and real necks with what is known of them.

Every file is an npz with `hu`, `share`, `level` and `aux` as of `synthetic.Neck`; of real necks and phantoms also
`certainty` (`openkbp.RealNeck`), and of real ones `spine`, points along the canal in voxels `(n, 3)`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import ClassifySettings
from model.geometry import Grid
from model.phantom import render
from model.resample import average_pool
from model.volume import Volume
from training.files import write_npz
from training.inserted import insert, inserted_stacks
from training.necks.atlas import Atlas, load_atlas
from training.necks.openkbp import OUTLINE_KNOWN, OUTLINE_UNKNOWN, RealNeck, read_contours, weak_labels
from training.necks.stacks import FindVertebrae, write_neck_stacks
from training.necks.synthetic import AUX_UNKNOWN, draw_neck
from training.samples import pooled_truth, random_patient, whole_neck_grid

COARSE_MM, FINE_MM = 3.0, 1.0
PATIENT_COPIES, PATIENT_BOOST, PATIENT_NEGATIVES = 3, 6.0, 0.3
"""How often a real neck is broken anew, times RSNA's prevalence (in pixels of 4 mm few of them can be seen, and what
cannot is not broken), and things that are no fracture at each vertebra."""

COARSE_SHAPE, FINE_SHAPE = (96, 80, 80), (128, 112, 96)


@cache
def _atlas(path: Path) -> Atlas:
    return load_atlas(Path(), path)


def write_drawn(path: Path, seed: int, atlas: Path, fine: bool) -> None:
    """A neck of the atlas (as `load_atlas` cached it) for the coarse or the fine network."""
    if path.exists():
        return
    rng = np.random.default_rng([seed, 43 if fine else 41])
    spacing_mm, shape = (FINE_MM, FINE_SHAPE) if fine else (COARSE_MM, COARSE_SHAPE)
    neck = draw_neck(_atlas(atlas), rng, spacing_mm=spacing_mm, shape=shape, oversample=1 if fine else 2)
    write_npz(path, hu=neck.hu, share=neck.share, level=neck.level, aux=neck.aux)


def write_stacks_of_drawn(path: Path, seed: int, atlas: Path, classify: ClassifySettings, find: FindVertebrae) -> None:
    """The broken and whole vertebrae of a neck of the atlas, for the fracture network."""
    write_neck_stacks(path, seed, _atlas(atlas), classify, find)


def write_patient_stacks(path: Path, patient: Path, find: FindVertebrae, classify: ClassifySettings) -> None:
    """The vertebrae of an OpenKBP patient, taken as intact, and some of them broken, for the fracture network.

    Both, or the network would learn that blurred bone is whole. None is written if none is whole.
    """
    if path.exists():
        return
    contours = read_contours(patient)
    volume = Volume(
        study_instance_uid=contours.name,
        series_instance_uid=contours.name,
        voxels_hu=contours.hu,
        grid=contours.grid,
        slices=(),
    )
    with torch.inference_mode():
        labels, vertebrae = find(volume)
    whole = {vertebra.label for vertebra in vertebrae if not vertebra.is_cut}
    copies = []
    for seed in range(PATIENT_COPIES):
        rng = np.random.default_rng([seed, 61, *contours.name.encode()])
        inserted = insert(contours.hu, labels, contours.grid, rng, boost=PATIENT_BOOST, negatives=PATIENT_NEGATIVES)
        eligible = tuple(label for label in inserted.eligible if label in whole)
        if eligible:
            copies.append(inserted_stacks(replace(inserted, eligible=eligible), labels, contours.grid, classify))
    if copies:
        write_npz(path, **{name: np.concatenate([copy[name] for copy in copies]) for name in copies[0]})


def write_phantom(path: Path, seed: int, fine: bool) -> None:
    """A procedural phantom for the coarse or the fine network; what lies below T1 is not named in it."""
    if path.exists():
        return
    anatomy, rng = random_patient(seed)
    if fine:
        boxes = np.array([(place.lower_lps_mm, place.upper_lps_mm) for place in anatomy.places.values()])
        lower, upper = boxes[:, 0].min(axis=0) - 12, boxes[:, 1].max(axis=0) + 12
        z, y, x = (int(n) for n in np.ceil((upper - lower)[::-1] / FINE_MM))
        middle = tuple(((lower + upper) / 2).tolist())
        grid, factor = Grid.axial(shape=(z, y, x), spacing_mm=(FINE_MM,) * 3, centre_lps_mm=middle), 1
    else:
        grid, factor = whole_neck_grid(anatomy, rng, COARSE_MM / 2), 2
    noise_hu, blur_mm = rng.uniform(5, 50), rng.uniform(0.4, 2.0)
    phantom = render(anatomy, grid, noise_hu=noise_hu, blur_mm=blur_mm, seed=int(rng.integers(1 << 31)))
    share, mean_level = pooled_truth(phantom, factor)
    level = mean_level.round().to(torch.uint8).numpy()
    certainty = np.full(level.shape, OUTLINE_KNOWN, np.uint8)
    thoracic = np.flatnonzero((level == 8).any(axis=(1, 2)))
    certainty[: thoracic[0] + 1 if len(thoracic) else 0] = OUTLINE_UNKNOWN
    write_npz(
        path,
        hu=average_pool(phantom.voxels_hu, (factor,) * 3).round().to(torch.int16).numpy(),
        share=(share * 255).round().to(torch.uint8).numpy(),
        level=level,
        aux=np.full(level.shape, AUX_UNKNOWN, np.uint8),
        certainty=certainty,
    )


def read_real(path: Path, multiple: int) -> RealNeck:
    """One patient of OpenKBP on the coarse grid, with what contours and HU say of it."""
    return weak_labels(read_contours(path), COARSE_MM, multiple)


def write_real(path: Path, neck: RealNeck, spine_lps_mm: NDArray[np.float64]) -> None:
    """A real neck with weak or pseudo-labels. spine_lps_mm: points of the canal around which crops are cut."""
    write_npz(
        path,
        hu=neck.hu,
        share=neck.share,
        level=neck.level,
        aux=neck.aux,
        certainty=neck.certainty,
        spine=neck.grid.to_index(spine_lps_mm),
    )
