"""Masks as DICOM Segmentations: one segment per level, BINARY, on the grid and the Instances they were made from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from model import LEVELS, ModelInfo
from node import codes
from node.encode.colours import FRACTURE_RGB, LEVEL_RGB
from node.encode.equipment import algorithm_sequence, processing_equipment
from node.encode.identity import NodeIdentity, ResultUids
from node.encode.source import Source
from node.profiles import Kind


@dataclass(frozen=True, kw_only=True)
class SegKind:
    """What tells the two Segmentations apart.

    kind: in profiles. name: of the result object. describe: the segment of a level, given its number in the object.
    """

    kind: Kind
    name: str
    file_name: str
    series_number: int
    series_description: str
    content_label: str
    describe: Callable[[int, str, ModelInfo, ResultUids], SegmentDescription]


def _describe_vertebra(number: int, level: str, model: ModelInfo, uids: ResultUids) -> SegmentDescription:
    # The level's own code is the type, so that no reader has to combine "Vertebra" with an anatomic region.
    return SegmentDescription(
        segment_number=number,
        segment_label=level,
        segmented_property_category=codes.ANATOMICAL_STRUCTURE,
        segmented_property_type=codes.LEVEL_CODES[level],
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm_sequence(model),
        tracking_id=level,
        tracking_uid=uids.tracking_uid(level),
        display_color=CIELabColor.from_rgb(*LEVEL_RGB[level]),
    )


def _describe_fracture(number: int, level: str, model: ModelInfo, uids: ResultUids) -> SegmentDescription:
    return SegmentDescription(
        segment_number=number,
        segment_label=f"{level} fracture",
        segmented_property_category=codes.ABNORMAL_STRUCTURE,
        segmented_property_type=codes.FRACTURE,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm_sequence(model),
        tracking_id=level,
        tracking_uid=uids.tracking_uid(level),
        anatomic_regions=[codes.LEVEL_CODES[level]],
        display_color=CIELabColor.from_rgb(*FRACTURE_RGB),
    )


VERTEBRAE = SegKind(
    kind=Kind.VERTEBRAE_SEG,
    name="vertebrae.seg",
    file_name="vertebrae.seg.dcm",
    series_number=9001,
    series_description="AI C1-C7 segmentation (research)",
    content_label="VERTEBRAE",
    describe=_describe_vertebra,
)
FRACTURES = SegKind(
    kind=Kind.FRACTURES_SEG,
    name="fractures.seg",
    file_name="fractures.seg.dcm",
    series_number=9002,
    series_description="AI fracture regions (research)",
    content_label="FRACTURES",
    describe=_describe_fracture,
)


def marked_planes(mask: NDArray[np.uint8]) -> range:
    """Z indices from the first to the last plane of `mask` `(Z, Y, X)` that has a voxel; empty if none has."""
    marked = np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1))
    return range(int(marked[0]), int(marked[-1]) + 1) if marked.size else range(0)


def make_segmentation(
    kind: SegKind, mask: NDArray[np.uint8], source: Source, model: ModelInfo, uids: ResultUids, node: NodeIdentity
) -> Segmentation | None:
    """The Segmentation of a mask; None when it is empty, because a SEG without a segment is not valid.

    mask: uint8 `(Z, Y, X)` on the source grid, 1..7 = C1..C7. Segments are numbered from 1 without gaps, as highdicom
    asks, so a segment's label and code say its level, not its number. Voxels of an interpolated slice are left out:
    there is no Instance they could lie on.

    Reference: PS3.3 A.51; IHE AIR for the contributing equipment.
    """
    planes = [z for z in marked_planes(mask) if z in source.images]
    marked = mask[planes]
    labels = [label for label in range(1, len(LEVELS) + 1) if (marked == label).any()]
    if not labels:
        return None
    for number, label in enumerate(labels, start=1):
        if number != label:
            marked[marked == label] = number
    images = [source.images[z] for z in planes]
    first = Dataset()
    first.update(source.header)
    first.update(images[0])
    seg = Segmentation(
        source_images=[first, *images[1:]],
        pixel_array=marked,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            kind.describe(number, LEVELS[label - 1], model, uids) for number, label in enumerate(labels, start=1)
        ],
        series_instance_uid=uids.uid(f"{kind.name} series"),
        series_number=kind.series_number,
        sop_instance_uid=uids.uid(f"{kind.name} instance"),
        instance_number=1,
        manufacturer=node.manufacturer,
        manufacturer_model_name=node.manufacturer_model_name,
        software_versions=node.software_version,
        device_serial_number=node.ae_title,
        series_description=kind.series_description,
        content_label=kind.content_label,
        content_description=kind.series_description,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=source.character_set,
        contributing_equipment=[processing_equipment(node)],
    )
    _organise(seg, uids.uid(f"{kind.name} dimensions"))
    if source.is_multi_frame:
        _refer_to_frames(seg, source)
    return seg


def segment_numbers(seg: Segmentation) -> dict[str, int]:
    """Segment number of each level in a Segmentation of vertebrae."""
    return {str(item.SegmentLabel): int(item.SegmentNumber) for item in seg.SegmentSequence}


def save(ds: Dataset, folder: Path, file_name: str) -> Path:
    """Writes a DICOM file and returns its path."""
    path = folder / file_name
    ds.save_as(path, enforce_file_format=True)
    return path


def _organise(seg: Segmentation, uid: str) -> None:
    """Replaces highdicom's random Dimension Organization UID, so that the same input gives the same bytes."""
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _refer_to_frames(seg: Segmentation, source: Source) -> None:
    """Turns references to the single-frame images of a `Source` into references to frames of Enhanced CT Instances."""
    slices = {str(image.SOPInstanceUID): source.slices[z] for z, image in source.images.items()}
    references = [
        item.DerivationImageSequence[0].SourceImageSequence[0] for item in seg.PerFrameFunctionalGroupsSequence
    ]
    for reference in {id(item): item for item in references}.values():  # segments on one plane share theirs
        found = slices[reference.ReferencedSOPInstanceUID]
        reference.ReferencedSOPClassUID = source.sop_class_uid
        reference.ReferencedSOPInstanceUID = found.sop_instance_uid
        reference.ReferencedFrameNumber = found.frame_number
    instances = {}
    for item in seg.SourceImageSequence:
        item.ReferencedSOPClassUID = source.sop_class_uid
        item.ReferencedSOPInstanceUID = slices[item.ReferencedSOPInstanceUID].sop_instance_uid
        instances[item.ReferencedSOPInstanceUID] = item
    seg.SourceImageSequence = list(instances.values())
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = list(instances.values())
