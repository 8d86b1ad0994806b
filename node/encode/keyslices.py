"""The slices that carry the answer: which they are, for pages and reports too, and a Key Object Selection of them."""

from collections.abc import Sequence

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from highdicom.sr import ObserverContext
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from model import Finding, Findings, LevelFinding, SliceSource
from node import codes
from node.encode.equipment import device_observer, processing_equipment
from node.encode.maker import Maker
from node.encode.source import Source

FILE_NAME = "key-slices.kos.dcm"
SERIES_NUMBER = 9007

MAX_KEY_SLICES = 3
"""Slices shown, selected and referred to for a level; the first is where to look."""


def key_planes(level: LevelFinding, slices: Sequence[SliceSource]) -> list[int]:
    """Z indices of the slices with the largest suspicious regions of a level, then the most attended; best first.

    Empty for a level that was not judged. Interpolated slices have no Instance to look at and are left out.
    """
    planes = _planes(slices)
    attention = attention_by_plane(level, slices)
    areas = dict.fromkeys(attention, 0)
    for region in level.regions:
        if (z := planes.get((region.sop_instance_uid, region.frame_number))) is not None:
            areas[z] = areas.get(z, 0) + region.width * region.height
    return sorted(areas, key=lambda z: (-areas[z], -attention.get(z, 0.0), z))[:MAX_KEY_SLICES]


def attention_by_plane(level: LevelFinding, slices: Sequence[SliceSource]) -> dict[int, float]:
    """Shares of a level's attention by Z index; that of an interpolated slice counts for the one it is named after."""
    planes = _planes(slices)
    shares: dict[int, float] = {}
    for item in level.attention:
        if (z := planes.get((item.sop_instance_uid, item.frame_number))) is not None:
            shares[z] = shares.get(z, 0.0) + item.weight
    return shares


def _planes(slices: Sequence[SliceSource]) -> dict[tuple[str, int], int]:
    """Z index of each Frame, by SOP Instance UID and frame number."""
    return {(s.sop_instance_uid, s.frame_number): z for z, s in enumerate(slices) if not s.is_interpolated}


def make_key_objects(findings: Findings, maker: Maker) -> KeyObjectSelectionDocument | None:
    """A selection "Of Interest" of the key slices of every level whose finding is present; None when there is none.

    Reference: PS3.3 A.35.4, PS3.16 TID 2010.
    """
    source = maker.source
    planes = {
        name: key_planes(level, source.slices)
        for name, level in findings.levels.items()
        if level.finding is Finding.PRESENT
    }
    selected = sorted({z for chosen in planes.values() for z in chosen})
    if not selected:
        return None
    images = _images(source, selected)
    description = _description(findings, [name for name, chosen in planes.items() if chosen])
    content = KeyObjectSelection(
        document_title=codes.OF_INTEREST,
        referenced_objects=list(images.values()),
        observer_device_context=ObserverContext(
            observer_type=codes.DEVICE, observer_identifying_attributes=device_observer(maker.node)
        ),
        description=description,
    )
    if source.is_multi_frame:
        for item in content[0].ContentSequence:
            if item.ValueType == "IMAGE":
                (reference,) = item.ReferencedSOPSequence
                reference.ReferencedFrameNumber = [
                    source.slices[z].frame_number
                    for z in selected
                    if source.slices[z].sop_instance_uid == reference.ReferencedSOPInstanceUID
                ]
    first = Dataset()
    first.update(source.header)  # patient and study are taken from the first
    first.update(next(iter(images.values())))
    ds = KeyObjectSelectionDocument(
        evidence=[first, *list(images.values())[1:]],
        content=content,
        series_number=SERIES_NUMBER,
        series_description="AI key slices (research)",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=source.character_set_for(description),
        contributing_equipment=[processing_equipment(maker.node)],
        **maker.identification(FILE_NAME.removesuffix(".dcm")),
    )
    ds.copy_patient_and_study_information(source.header)
    return ds


def _description(findings: Findings, names: list[str]) -> str:
    model = findings.model
    return (
        f"Slices on which the suspicion of a fracture rests: {', '.join(names)}. Chosen by software, research use, not "
        f"reviewed by a person. Model {model.name} {model.version}."
    )


def _images(source: Source, planes: Sequence[int]) -> dict[str, Dataset]:
    """The Instances of these slices by UID, each as an image, which highdicom tells by its Rows and Columns."""
    wanted = {source.slices[z].sop_instance_uid for z in planes}
    images = {uid: ds for ds in source.references() if (uid := str(ds.SOPInstanceUID)) in wanted}
    for ds in images.values():
        ds.Rows, ds.Columns = source.header.Rows, source.header.Columns
    return images
