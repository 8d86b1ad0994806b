"""Masks as DICOM Segmentations, on the grid and the Instances they were made from.

One segment a vertebra in one object, one segment a fracture finding in another; BINARY or a label map, whole or split
by segments over several Series. highdicom makes everything but the frames (`frames.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.spatial import get_volume_positions
from pydicom.charset import convert_encodings
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from model import LEVELS, ModelInfo
from node import codes
from node.encode.colours import FRACTURE_RGB, LEVEL_RGB
from node.encode.equipment import algorithm_sequence, processing_equipment
from node.encode.frames import (
    Frame,
    Marked,
    binary_pixels,
    find_frames,
    functional_groups,
    items,
    label_pixels,
    referenced_series,
    references,
    renumbered,
)
from node.encode.identity import ResultUids
from node.encode.maker import Maker
from node.encode.source import Source
from node.profiles import Kind, Profile, object_names

_SYNTAXES = {"explicit-vr-le": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg-ls": JPEGLSLossless}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What a label of a mask stands for. name: the segment's label and tracking identifier, unique in a result."""

    label: int
    level: str
    name: str


@dataclass(frozen=True, kw_only=True)
class SegKind:
    """What tells the two kinds of Segmentation apart. series_number: of the first part; that of the next is 10 more."""

    kind: Kind
    series_number: int
    series_description: str
    content_label: str

    def describe(self, number: int, segment: Segment, model: ModelInfo, uids: ResultUids) -> SegmentDescription:
        """A segment with this number."""
        level = codes.LEVEL_CODES[segment.level]
        is_fracture = self.kind is Kind.FRACTURES_SEG
        return SegmentDescription(
            segment_number=number,
            segment_label=segment.name,
            segmented_property_category=codes.ABNORMAL_STRUCTURE if is_fracture else codes.ANATOMICAL_STRUCTURE,
            # The level's own code is the type, so that no reader has to combine "Vertebra" with an anatomic region.
            segmented_property_type=codes.FRACTURE if is_fracture else level,
            anatomic_regions=[level] if is_fracture else None,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm_sequence(model),
            tracking_id=segment.name,
            tracking_uid=uids.tracking_uid(segment.name),
            display_color=CIELabColor.from_rgb(*(FRACTURE_RGB if is_fracture else LEVEL_RGB[segment.level])),
        )


VERTEBRAE = SegKind(
    kind=Kind.VERTEBRAE_SEG,
    series_number=9001,
    series_description="AI C1-C7 segmentation (research)",
    content_label="VERTEBRAE",
)
FRACTURES = SegKind(
    kind=Kind.FRACTURES_SEG,
    series_number=9002,
    series_description="AI fracture regions (research)",
    content_label="FRACTURES",
)
VERTEBRA_SEGMENTS = tuple(Segment(label=i, level=level, name=level) for i, level in enumerate(LEVELS, start=1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """A mask with what its labels stand for."""

    kind: SegKind
    marked: Marked
    segments: Sequence[Segment]


@dataclass(frozen=True, kw_only=True, eq=False)
class SegPart:
    """One Segmentation to be made of a mask: all of it, or some of its segments when it has to be split.

    number: from 1. Each part is a Series of its own: viewers load one Instance of a SEG Series.
    """

    mask: Mask
    file_name: str
    segments: Sequence[Segment]
    number: int
    is_split: bool


def plan(mask: Mask, profile: Profile, source: Source) -> list[SegPart]:
    """The Segmentations of a mask in the form of a profile; none when no segment has a frame: that were not valid.

    A segment is never split, so a part of a single one may have more frames than the profile's maximum.
    """
    groups: list[list[Segment]] = []
    planes: list[int] = []  # of the frames of the last group
    for segment in mask.segments:
        its_planes = [frame.z for frame in find_frames(mask.marked, [segment.label], source)]
        if not its_planes:
            continue
        joined = [*planes, *its_planes]
        num_frames = len(joined if profile.segmentation == "binary" else set(joined))
        if groups and (not profile.max_frames or num_frames <= profile.max_frames):
            groups[-1].append(segment)
            planes = joined
        else:
            groups.append([segment])
            planes = its_planes
    *split, whole = object_names(profile, mask.kind.kind)
    is_split = len(groups) > 1
    return [
        SegPart(
            mask=mask,
            file_name=split[0].replace("*", str(number)) if is_split else whole,
            segments=segments,
            number=number,
            is_split=is_split,
        )
        for number, segments in enumerate(groups, start=1)
    ]


def segment_numbers(seg: Dataset) -> dict[str, int]:
    """Segment number of each segment label of a Segmentation."""
    return {str(item.SegmentLabel): int(item.SegmentNumber) for item in seg.SegmentSequence}


def save(ds: Dataset, folder: Path, file_name: str) -> Path:
    """Writes a DICOM file and returns its path."""
    path = folder / file_name
    ds.save_as(path, enforce_file_format=True)
    return path


def make_segmentation(part: SegPart, profile: Profile, maker: Maker) -> Dataset:
    """A Segmentation. Segments are numbered from 1 without gaps, so a label or code says what one is, not its number.

    Reference: PS3.3 A.51; IHE AIR for the contributing equipment.
    """
    source, segments = maker.source, part.segments
    marked = renumbered(part.mask.marked, [segment.label for segment in segments])
    # In a label map segments share frames, which are those of number 0.
    numbers = range(1, len(segments) + 1) if profile.segmentation == "binary" else [0]
    frames = find_frames(marked, numbers, source)
    ds = _without_frames(part, frames[0], profile, maker)
    rows, columns = source.grid.shape[1:]
    if profile.segmentation == "binary":
        ds.PixelData = binary_pixels(frames, marked, (rows, columns))
    else:
        syntax = _SYNTAXES[profile.transfer_syntax]
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = label_pixels(frames, marked, (rows, columns), syntax)
        ds["PixelData"].is_undefined_length = syntax.is_encapsulated
    ds.NumberOfFrames = len(frames)
    if _is_volume(frames, len(segments), source):
        ds.DimensionOrganizationType = "3D"
    _set_items(ds, "PerFrameFunctionalGroupsSequence", items(*functional_groups(frames, len(segments), source)))
    _set_items(ds, "SourceImageSequence", items(*references(frames, source)))
    _set_items(ds, "ReferencedSeriesSequence", items(referenced_series(frames, source)))
    # So that pydicom writes these bytes as they are. It then takes every VR as it is, too.
    ds.set_original_encoding(False, True, convert_encodings(_character_set(maker)))
    return ds


def _character_set(maker: Maker) -> str:
    return maker.source.character_set_for(maker.model.name, maker.model.version)


def _is_volume(frames: Sequence[Frame], num_segments: int, source: Source) -> bool:
    """Whether frames differ by their place only, and lie at equal distances."""
    if len(frames) < 2 or (frames[0].number and num_segments > 1):
        return False
    positions = [[float(text) for text in source.position_texts(frame.z)] for frame in frames]
    spacing, _ = get_volume_positions(positions, source.orientation, sort=False)
    return spacing is not None and spacing > 0


def _set_items(ds: Dataset, keyword: str, value: bytes) -> None:
    """Puts a sequence into a dataset as bytes; pydicom parses them when it is asked for an item."""
    tag = Tag(keyword)
    ds[tag] = RawDataElement(tag, "SQ", len(value), value, 0, False, True)


def _without_frames(part: SegPart, first: Frame, profile: Profile, maker: Maker) -> Dataset:
    """All of a Segmentation but its frames: what highdicom makes of a single plane that shows every segment."""
    source, kind, name = maker.source, part.mask.kind, part.file_name.removesuffix(".dcm")
    image = Dataset()
    image.update(source.header)
    image.update(source.image(first.z))
    plane = np.zeros((1, image.Rows, image.Columns), np.uint8)
    plane.flat[: len(part.segments)] = range(1, len(part.segments) + 1)
    description = kind.series_description + (f", part {part.number}" if part.is_split else "")
    seg = Segmentation(
        source_images=[image],
        pixel_array=plane,
        segmentation_type=profile.segmentation.upper(),
        segment_descriptions=[
            kind.describe(number, segment, maker.model, maker.uids)
            for number, segment in enumerate(part.segments, start=1)
        ],
        series_number=kind.series_number + 10 * (part.number - 1),
        series_description=description,
        content_label=kind.content_label,
        content_description=description,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=_character_set(maker),
        contributing_equipment=[processing_equipment(maker.node)],
        **maker.identification(name),
    )
    # highdicom's is random; the same input is to give the same bytes.
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = maker.uids.uid(f"{name} dimensions")
    ds = Dataset(seg)
    ds.file_meta = seg.file_meta
    return correct_ambiguous_vr(ds, is_little_endian=True)
