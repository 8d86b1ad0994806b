"""What the answer rests on, voxel by voxel, as a Parametric Map on the source grid.

The value of a voxel is `Analysis.saliency`: the probability that it belongs to a fracture, times the attention its
slice received, as a share of the most attended slice of its level. It is 0 at levels that are not suspected, which says
nothing about them. Slices without any are left out.
"""

import numpy as np
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from node import codes
from node.encode.equipment import processing_equipment
from node.encode.maker import Maker

FILE_NAME = "saliency.pm.dcm"
SERIES_NUMBER = 9006


def make_saliency_map(saliency: NDArray[np.uint8], maker: Maker) -> ParametricMap | None:
    """The map; None when nothing is salient. saliency: uint8 `(Z, Y, X)`, 0..255 for 0..1.

    16 bits a voxel, as the Standard asks, with a Real World Value Mapping to 0..1. Reference: PS3.3 C.8.32.2.
    """
    source, name = maker.source, FILE_NAME.removesuffix(".dcm")
    marked = np.flatnonzero(saliency.reshape(len(saliency), -1).max(axis=1))
    planes = [z for z in marked.tolist() if not source.slices[z].is_interpolated]
    if not planes:
        return None
    images = [source.image(z) for z in planes]
    first = Dataset()
    first.update(source.header)
    first.update(images[0])
    description = f"What {maker.model.name[:40]} rests on"
    ds = ParametricMap(
        source_images=[first, *images[1:]],
        pixel_array=saliency[planes].astype(np.uint16),
        real_world_value_mappings=[
            RealWorldValueMapping(
                lut_label="SALIENCY",
                lut_explanation="Probability of a fracture here times share of attention, 0 to 1",
                unit=codes.UNIT,
                value_range=(0, 255),
                slope=1 / 255,
                intercept=0.0,
                quantity_definition=codes.SALIENCY,
            )
        ],
        voi_lut_transformations=[VOILUTTransformation(window_center=127.5, window_width=255)],
        contains_recognizable_visual_features=False,
        series_number=SERIES_NUMBER,
        series_description="AI saliency (research)",
        content_label="SALIENCY",
        content_description=description,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=source.character_set_for(description),
        contributing_equipment=[processing_equipment(maker.node)],
        **maker.identification(name),
    )
    ds.BodyPartExamined = "CSPINE"
    # highdicom's is random; the same input is to give the same bytes.
    for item in (*ds.DimensionOrganizationSequence, *ds.DimensionIndexSequence):
        item.DimensionOrganizationUID = maker.uids.uid(f"{name} dimensions")
    if source.is_multi_frame:
        _refer_to_frames(ds, planes, maker)
    return ds


def _refer_to_frames(ds: ParametricMap, planes: list[int], maker: Maker) -> None:
    """Turns references to a `Source`'s single-frame images into references to frames of Enhanced CT Instances."""
    source = maker.source
    slices = {str(source.image(z).SOPInstanceUID): source.slices[z] for z in planes}
    references = [
        item.DerivationImageSequence[0].SourceImageSequence[0] for item in ds.PerFrameFunctionalGroupsSequence
    ]
    for reference in references:
        found = slices[reference.ReferencedSOPInstanceUID]
        reference.ReferencedSOPClassUID = source.sop_class_uid
        reference.ReferencedSOPInstanceUID = found.sop_instance_uid
        reference.ReferencedFrameNumber = found.frame_number
    instances = {}
    for item in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        item.ReferencedSOPClassUID = source.sop_class_uid
        item.ReferencedSOPInstanceUID = slices[item.ReferencedSOPInstanceUID].sop_instance_uid
        instances[item.ReferencedSOPInstanceUID] = item
    ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence = list(instances.values())
    if "SourceImageSequence" in ds:
        ds.SourceImageSequence = list(instances.values())
