"""Is each vertebra fractured, and where? The networks on a stack of slices per vertebra, back to Instances.

Called by `model/pipeline.py`; `training/` cuts its samples with the same functions.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from model.bundle import Bundle, ClassifySettings, Networks
from model.findings import Region, SliceWeight
from model.geometry import FloatArray, Grid
from model.levels import LEVELS
from model.memory import answer
from model.networks import FractureAnswer, FractureNet, RegionAnswer, StudyAnswer
from model.pose import about_long_axis
from model.resample import AIR_HU, average_pool, crop_to_box, index_range, pool_factors, pooled_grid, sample
from model.segment import Vertebra
from model.volume import SliceSource, Volume

NUM_NEIGHBOURS = 2
"""Neighbouring planes read on each side of a slice."""

REGION_MARGIN_MM = 3.0
"""How far outside its vertebra a fracture region may reach."""

MIN_REGION_MM2 = 3.0
"""Smaller specks of a slice get no box."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The networks' answer for one vertebra.

    logit: of "fractured", not calibrated. attention: float `(num_slices,)`, sums to 1. regions: probability of
    fracture, float32 `(num_slices, Y, X)`, on `grid`.
    """

    logit: float
    attention: NDArray[np.float32]
    regions: Tensor
    grid: Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """The networks' answer for a patient: verdicts by label, and the logit of "any of them", None if there are none."""

    verdicts: dict[int, Verdict]
    patient_logit: float | None


def stack_grid(middle_lps_mm: FloatArray, height_mm: float, settings: ClassifySettings, twist_deg: float = 0.0) -> Grid:
    """Planes over a vertebra's box, along the patient's axes, half a slice step apart and foot to head.

    middle_lps_mm, height_mm: of the box, as of a `Vertebra`. twist_deg: of the patient; the planes are turned with it,
    so that the front is at their top.
    Slice j of the network is plane `NUM_NEIGHBOURS + 2 * j`; its neighbours are the planes beside it.
    """
    num_planes = 2 * (settings.num_slices - 1) + 1 + 2 * NUM_NEIGHBOURS
    half_step_mm = max(height_mm / (2 * (settings.num_slices - 1)), 0.5)
    planes = Grid.axial(
        shape=(num_planes, settings.num_pixels, settings.num_pixels),
        spacing_mm=(half_step_mm, settings.pixel_mm, settings.pixel_mm),
    )
    affine = about_long_axis(twist_deg) @ planes.affine
    affine[:3, 3] += middle_lps_mm
    return Grid(shape=planes.shape, affine=affine)


def slice_grid(planes: Grid) -> Grid:
    """The grid of the network's slices within a `stack_grid`."""
    affine = planes.affine.copy()
    affine[:3, 3] = planes.to_lps_mm(np.array([NUM_NEIGHBOURS, 0, 0], float))
    affine[:3, 0] *= 2
    num_slices = (planes.shape[0] - 1 - 2 * NUM_NEIGHBOURS) // 2 + 1
    return Grid(shape=(num_slices, planes.shape[1], planes.shape[2]), affine=affine)


def sample_planes(voxels_hu: NDArray[np.int16], grid: Grid, planes: Grid) -> Tensor:
    """HU, float32, on the planes of a `stack_grid`; air outside the field of view."""
    part, part_grid = crop_to_box(voxels_hu, grid, *_box(planes))
    factors = pool_factors(part_grid, min(planes.spacing_mm))
    pooled = average_pool(part, factors)
    return sample((pooled - AIR_HU)[None], pooled_grid(part_grid, factors), planes)[0] + AIR_HU


def sample_mask(labels: NDArray[np.uint8], grid: Grid, slices: Grid, label: int) -> Tensor:
    """Where the source has a label, float32 0..1, interpolated on the slices of a stack."""
    part, part_grid = crop_to_box(labels, grid, *_box(slices))
    return sample(torch.from_numpy(part == label).float()[None], part_grid, slices)[0]


def network_input(
    planes_hu: Tensor, masks: Tensor, window_hu: tuple[float, float] = ClassifySettings.window_hu
) -> Tensor:
    """The network's input `(B, S, 6, Y, X)`: each slice with its neighbours in a bone window, and the mask.

    planes_hu: `(B, planes, Y, X)` on a `stack_grid`. masks: `(B, S, Y, X)`, 0..1, on its `slice_grid`; blurred here, so
    that it says which vertebra is meant and no more. Of sharp masks the network took a wrong edge for a fracture.
    window_hu: becomes -2..3.
    """
    masks = F.avg_pool2d(masks, 7, 1, 3, count_include_pad=False)
    lower, upper = window_hu
    windowed = ((planes_hu - lower) * 5 / (upper - lower) - 2).clamp(-2, 3)
    num_slices = masks.shape[-3]
    channels = [windowed[..., k : k + 2 * num_slices - 1 : 2, :, :] for k in range(2 * NUM_NEIGHBOURS + 1)]
    return torch.stack([*channels, masks], dim=-3)


def judge(
    volume: Volume,
    labels: NDArray[np.uint8],
    vertebrae: list[Vertebra],
    networks: Networks,
    bundle: Bundle,
    device: torch.device,
) -> Judgement:
    """What all networks together say of these vertebrae; all are judged at once if memory allows.

    labels: as `find_vertebrae` gives them. Folds count the same: logits are averaged.
    """
    if not vertebrae:
        return Judgement(verdicts={}, patient_logit=None)
    settings = bundle.classify
    planes = [
        stack_grid(vertebra.middle_lps_mm, vertebra.height_mm, settings, vertebra.twist_deg) for vertebra in vertebrae
    ]
    slices = [slice_grid(grid) for grid in planes]
    planes_hu = torch.stack([sample_planes(volume.voxels_hu, volume.grid, grid) for grid in planes])
    masks = torch.stack(
        [
            sample_mask(labels, volume.grid, grid, label=vertebra.label)
            for vertebra, grid in zip(vertebrae, slices, strict=True)
        ]
    )
    stacks = network_input(planes_hu, masks, settings.window_hu)
    levels = torch.tensor([vertebra.label - 1 for vertebra in vertebrae])
    folds = [ask(network, stacks, levels, device, mirrored=settings.mirrored) for network in networks.fracture_nets]
    logits, patient_logit = _as_study(folds, levels, networks, device)
    if networks.region_net is None or bundle.regions is None:
        regions = _mean([fold.regions.sigmoid() for fold in folds])
    else:
        opinion = RegionAnswer(*answer(networks.region_net, stacks, device))
        logits = torch.lerp(logits, opinion.logits.float(), bundle.regions.weight)
        regions = opinion.regions.float().sigmoid()
    regions = regions * _dilated(masks, settings.pixel_mm)
    attention = _mean([fold.attention for fold in folds])
    verdicts = {
        vertebra.label: Verdict(
            logit=float(logits[i]), attention=attention[i].numpy(), regions=regions[i], grid=slices[i]
        )
        for i, vertebra in enumerate(vertebrae)
    }
    return Judgement(
        verdicts=verdicts, patient_logit=float(logits.max()) if patient_logit is None else float(patient_logit)
    )


def ask(
    network: FractureNet, stacks: Tensor, levels: Tensor, device: torch.device, *, mirrored: bool
) -> FractureAnswer:
    """One network's answer to `network_input`, float32. levels: `(B,)`, 0..6. mirrored: see `ClassifySettings`."""
    said = FractureAnswer(*answer(network, stacks, device, levels))
    if not mirrored:
        return said
    image = FractureAnswer(*answer(network, stacks.flip(-1), device, levels))
    image = image._replace(regions=image.regions.flip(-1))
    return FractureAnswer(*(torch.lerp(one, other, 0.5) for one, other in zip(said, image, strict=True)))


def _as_study(
    folds: list[FractureAnswer], levels: Tensor, networks: Networks, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The mean logit of each vertebra over the folds, and of the patient; None without study networks.

    levels: which of C1..C7 the vertebrae are, 0..6.
    """
    if not networks.study_nets:
        return _mean([fold.logits for fold in folds]), None
    present = torch.zeros(1, len(LEVELS), dtype=torch.bool)
    present[0, levels] = True
    studies = []
    for fold, network in zip(folds, networks.study_nets, strict=True):
        contexts, logits = torch.zeros(1, len(LEVELS), fold.context.shape[1]), torch.zeros(1, len(LEVELS))
        contexts[0, levels], logits[0, levels] = fold.context, fold.logits
        studies.append(StudyAnswer(*answer(network, contexts, device, logits, present)))
    return _mean([study.logits[0, levels] for study in studies]), _mean([study.patient[0] for study in studies])


def _mean(folds: list[Tensor]) -> Tensor:
    return torch.stack(folds).mean(0)


def attention_by_instance(
    verdict: Verdict, centroid_lps_mm: FloatArray, grid: Grid, sources: tuple[SliceSource, ...]
) -> tuple[SliceWeight, ...]:
    """The attention of each slice, given to the Instance that runs through the vertebra there; weights sum to 1."""
    num_slices = len(verdict.attention)
    points = np.repeat(centroid_lps_mm[None], num_slices, axis=0)
    heads = verdict.grid.to_lps_mm(np.stack([np.arange(num_slices), *np.zeros((2, num_slices))], axis=1))
    points[:, 2] = heads[:, 2]
    indices = np.clip(np.rint(grid.to_index(points)[:, 0]).astype(int), 0, len(sources) - 1)
    weights: dict[int, float] = defaultdict(float)
    for index, weight in zip(indices, verdict.attention.astype(float), strict=True):
        weights[int(index)] += float(weight)
    total = sum(weights.values())
    return tuple(
        SliceWeight(
            sop_instance_uid=sources[index].sop_instance_uid,
            weight=weights[index] / total,
            frame_number=sources[index].frame_number,
        )
        for index in sorted(weights)
    )


def draw_regions(
    fractures: NDArray[np.uint8],
    saliency: NDArray[np.uint8],
    label: int,
    verdict: Verdict,
    grid: Grid,
    threshold: float,
) -> dict[int, list[tuple[int, int, int, int]]]:
    """Marks a vertebra's fracture regions and its saliency (see `Analysis`) on the source grid.

    Gives the regions' boxes `(x, y, width, height)` by Z index.
    """
    first, last = index_range(grid, *_box(verdict.grid), margin=0)
    part = np.s_[first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    share = torch.from_numpy(verdict.attention / verdict.attention.max())[:, None, None]
    channels = torch.stack([verdict.regions, verdict.regions * share])
    probabilities, salient = sample(channels, verdict.grid, grid.part(first, fractures[part].shape))
    np.maximum(saliency[part], (salient * 255).round().to(torch.uint8).numpy(), out=saliency[part])
    mask = (probabilities >= threshold).numpy()
    pixel_mm2 = grid.spacing_mm[1] * grid.spacing_mm[2]
    boxes: dict[int, list[tuple[int, int, int, int]]] = {}
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        components, _ = ndimage.label(mask[index], structure=np.ones((3, 3)))
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), start=1):
            speck = components[rows, columns] == number
            if speck.sum() * pixel_mm2 < MIN_REGION_MM2:
                mask[index, rows, columns][speck] = False
                continue
            boxes.setdefault(int(first[0] + index), []).append(
                (
                    int(first[2] + columns.start),
                    int(first[1] + rows.start),
                    columns.stop - columns.start,
                    rows.stop - rows.start,
                )
            )
    fractures[part][mask] = label
    return boxes


def as_regions(
    boxes: dict[int, list[tuple[int, int, int, int]]], sources: tuple[SliceSource, ...]
) -> tuple[Region, ...]:
    """Boxes by Z index as regions of the Instances they lie in."""
    return tuple(
        Region(
            sop_instance_uid=sources[index].sop_instance_uid,
            x=x,
            y=y,
            width=width,
            height=height,
            frame_number=sources[index].frame_number,
        )
        for index in sorted(boxes)
        for x, y, width, height in boxes[index]
    )


def _box(grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Lower and upper LPS corner of the box around a grid."""
    corners = grid.to_lps_mm(np.array(list(product(*((0, n - 1) for n in grid.shape))), float))
    return corners.min(axis=0), corners.max(axis=0)


def _dilated(masks: Tensor, pixel_mm: float) -> Tensor:
    """The masks grown by REGION_MARGIN_MM within each slice and by one slice up and down, 0 or 1."""
    pixels = 2 * round(REGION_MARGIN_MM / pixel_mm) + 1
    grown = masks[:, None]
    for size in ((3, 1, 1), (1, pixels, 1), (1, 1, pixels)):  # the same as a box at once, in less time
        grown = F.max_pool3d(grown, size, 1, tuple(side // 2 for side in size))
    return (grown[:, 0] > 0.25).float()
