"""Findings as a structured report: TID 1500, all seven levels, negatives included.

The patient's group comes first, then C1..C7, each followed by its fracture findings. A level or finding that has a
segment gets a TID 1411 group that refers to it, any other a TID 1501 group. What a person must read beside the numbers
stands under "Qualitative Evaluations" (TID 1500 rows 12 to 14). Nobody has verified the report, and it says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
from highdicom.sr import (
    CodeContentItem,
    Comprehensive3DSR,
    ComprehensiveSR,
    ContainerContentItem,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceImageForMeasurement,
    SourceSeriesForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from highdicom.sr.value_types import ContentSequence
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from model import BodyHeights, Finding, Findings, LevelFinding
from node import codes
from node.encode.equipment import algorithm_template, device_observer, processing_equipment
from node.encode.keyslices import MAX_KEY_SLICES, key_planes
from node.encode.maker import Maker
from node.encode.regions import FractureRegion
from node.encode.seg import segment_numbers
from node.encode.source import UTF_8, Source
from node.profiles import Profile

SERIES_NUMBER = 9003

LIMITS_OF_USE = (
    "Research use only, not a medical device. Found by software and not reviewed by a person; must not be used for "
    "diagnosis."
)

HEIGHTS_CAVEAT = "Heights of bodies are measured on the segmentation and no better than it; not validated on patients."

_Group = MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What reports of a case say, whatever their form.

    heights: of the bodies of the levels where they could be measured. not_analysed: why there are no findings, "" if
    there are. previous_dir: the folder of earlier results of the Series, None if there are none.
    """

    findings: Findings
    regions: Sequence[FractureRegion] = ()
    heights: Mapping[str, BodyHeights] = field(default_factory=dict)
    not_analysed: str = ""
    previous_dir: Path | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Context:
    """What every group of one report needs. segmentations: those it refers to."""

    content: Content
    segmentations: Sequence[Dataset]
    maker: Maker

    def tracking(self, what: str) -> TrackingIdentifier:
        return TrackingIdentifier(uid=self.maker.uids.tracking_uid(what), identifier=what)

    def referenced_segment(self, label: str) -> ReferencedSegment | None:
        for seg in self.segmentations:
            number = segment_numbers(seg).get(label)
            if number is not None:
                return ReferencedSegment(
                    sop_class_uid=seg.SOPClassUID,
                    sop_instance_uid=seg.SOPInstanceUID,
                    segment_number=number,
                    source_series=SourceSeriesForSegmentation(self.maker.source.header.SeriesInstanceUID),
                )
        return None


def make_report(
    content: Content, segmentations: Sequence[Dataset], file_name: str, profile: Profile, maker: Maker
) -> Dataset:
    """The report; its evidence is every Instance of the Series and the Segmentations that levels and findings refer to.

    Reference: PS3.16 TID 1500, TID 1411, TID 1501.
    """
    context = _Context(content=content, segmentations=segmentations, maker=maker)
    groups = [_patient_group(context)]
    for name, level in content.findings.levels.items():
        groups.append(_level_group(context, name, level))
        groups += [_region_group(context, region) for region in content.regions if region.level == name]
    report = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=codes.DEVICE, observer_identifying_attributes=device_observer(maker.node)
            )
        ),
        procedure_reported=codes.CT,
        imaging_measurements=groups,
    )
    report[0].ContentSequence.append(_evaluations(content))
    references = maker.source.references()
    references[0] = maker.source.header  # patient and study are taken from the first
    identification = maker.identification(file_name.removesuffix(".dcm"))
    kind = Comprehensive3DSR if profile.report == "comprehensive-3d" else ComprehensiveSR
    return kind(
        evidence=[*references, *segmentations],
        content=report,
        series_number=SERIES_NUMBER,
        series_description="AI cervical spine fracture report (research)",
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=_predecessors(content, file_name, identification["sop_instance_uid"]) or None,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=_character_set(content, maker.source),
        contributing_equipment=[processing_equipment(maker.node)],
        **identification,
    )


def _predecessors(content: Content, file_name: str, sop_instance_uid: str) -> list[Dataset]:
    """The report that this one supersedes: that of earlier results of the Series, in this form if there is one.

    A report that is made again keeps the predecessor it had, so that it has the same bytes.
    """
    if content.previous_dir is None:
        return []
    paths = [content.previous_dir / file_name, *sorted(content.previous_dir.glob("*.sr.dcm"))]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return []
    earlier = pydicom.dcmread(path)
    if earlier.SOPInstanceUID != sop_instance_uid:
        return [earlier]
    kept = []
    for study in earlier.get("PredecessorDocumentsSequence", []):
        for series in study.ReferencedSeriesSequence:
            for item in series.ReferencedSOPSequence:
                ds = Dataset()
                ds.StudyInstanceUID, ds.SeriesInstanceUID = study.StudyInstanceUID, series.SeriesInstanceUID
                ds.SOPClassUID, ds.SOPInstanceUID = item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID
                kept.append(ds)
    return kept


def conclude(findings: Findings) -> str:
    """The findings in a sentence or two for a person."""
    overall = findings.patient_overall
    suspected = [
        f"{name} ({_percent(level.probability):g} %)"
        for name, level in findings.levels.items()
        if level.finding is Finding.PRESENT and level.probability is not None
    ]
    unjudged = [name for name, level in findings.levels.items() if level.finding is Finding.UNDETERMINED]
    if overall.probability is None:
        return "Undetermined: no level could be judged."
    if suspected:
        sentence = f"Fracture suspected: {', '.join(suspected)}."
    elif overall.finding is Finding.PRESENT:
        sentence = f"Fracture suspected ({_percent(overall.probability):g} %), at no certain level."
    else:
        sentence = "No fracture suspected in the levels that were judged."
    return sentence + (f" Not judged: {', '.join(unjudged)}." if unjudged else "")


def _character_set(content: Content, source: Source) -> str:
    """The source's character set if what we add needs no other than ASCII, or else UTF-8."""
    model = content.findings.model
    texts = (model.name, model.version, model.trained_on, *content.findings.warnings, content.not_analysed)
    return source.character_set if all(text.isascii() for text in texts) else UTF_8


def _patient_group(context: _Context) -> _Group:
    overall = context.content.findings.patient_overall
    return _group(
        context,
        "C1-C7",
        FindingSite(codes.CERVICAL_SPINE),
        measurements=_certainty(overall.probability),
        qualitative_evaluations=[_answer(overall.finding)],
    )


def _level_group(context: _Context, name: str, level: LevelFinding) -> _Group:
    measurements = _certainty(level.probability, _key_slices(context, level))
    if level.volume_mm3 is not None:
        measurements.append(_volume(level.volume_mm3))
    if heights := context.content.heights.get(name):
        measurements += _heights(heights)
    group = _group(
        context,
        name,
        FindingSite(codes.LEVEL_CODES[name]),
        measurements=measurements,
        qualitative_evaluations=[_answer(level.finding)],
    )
    if level.finding is Finding.UNDETERMINED:
        group[0].ContentSequence.append(_text(codes.COMMENT, f"{level.reason}."))
    return group


def _region_group(context: _Context, region: FractureRegion) -> _Group:
    """Where in a level the fracture is suspected, how large it is, and on which slices it shows best."""
    slices = [context.maker.source.slices[z] for z in region.planes]
    frames = [(item.sop_instance_uid, item.frame_number) for item in slices if not item.is_interpolated]
    return _group(
        context,
        region.name,
        FindingSite(codes.LEVEL_CODES[region.level], laterality=region.laterality),
        measurements=[_volume(region.volume_mm3, _images(context, frames[:MAX_KEY_SLICES]))],
    )


def _group(context: _Context, name: str, site: FindingSite, **arguments: Any) -> _Group:
    """TID 1411 with the segment of that name if there is one, TID 1501 otherwise."""
    arguments |= {
        "tracking_identifier": context.tracking(name),
        "finding_type": codes.FRACTURE,
        "finding_sites": [site],
        "algorithm_id": algorithm_template(context.maker.model),
    }
    segment = context.referenced_segment(name)
    if segment:
        return VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **arguments)
    return MeasurementsAndQualitativeEvaluations(**arguments)


def _certainty(
    probability: float | None, key_slices: list[SourceImageForMeasurement] | None = None
) -> list[Measurement]:
    """The probability that the finding, a fracture, is there, in percent; nothing when it was not judged."""
    if probability is None:
        return []
    return [
        Measurement(
            name=codes.CERTAINTY_OF_FINDING,
            value=_percent(probability),
            unit=codes.PERCENT,
            referenced_images=key_slices or None,
        )
    ]


def _volume(volume_mm3: float, images: list[SourceImageForMeasurement] | None = None) -> Measurement:
    return Measurement(
        name=codes.VOLUME,
        value=round(volume_mm3 / 1000, 2),
        unit=codes.CUBIC_CENTIMETER,
        referenced_images=images or None,
    )


def _heights(heights: BodyHeights) -> list[Measurement]:
    """The heights of a vertebral body and their ratio."""
    at = (
        (codes.ANTERIOR, heights.anterior_mm),
        (codes.CENTRAL, heights.middle_mm),
        (codes.POSTERIOR, heights.posterior_mm),
    )
    measured = [
        Measurement(
            name=codes.HEIGHT,
            value=round(value, 1),
            unit=codes.MILLIMETER,
            finding_sites=[FindingSite(codes.VERTEBRAL_BODY, topographical_modifier=place)],
        )
        for place, value in at
    ]
    ratio = Measurement(name=codes.BODY_HEIGHT_RATIO, value=round(heights.ratio, 2), unit=codes.RATIO)
    return [*measured, ratio]


def _percent(probability: float | None) -> float:
    """0..100 with one decimal."""
    return round(100 * (probability or 0.0), 1)


def _answer(finding: Finding) -> QualitativeEvaluation:
    """ "Fracture: Present", "Absent" or "Undetermined"."""
    return QualitativeEvaluation(name=codes.FRACTURE, value=codes.FINDING_CODES[finding])


def _key_slices(context: _Context, level: LevelFinding) -> list[SourceImageForMeasurement]:
    """The Frames to look at."""
    slices = context.maker.source.slices
    chosen = [slices[z] for z in key_planes(level, slices)]
    return _images(context, [(item.sop_instance_uid, item.frame_number) for item in chosen])


def _images(context: _Context, frames: Sequence[tuple[str, int]]) -> list[SourceImageForMeasurement]:
    """References to frames, given as SOP Instance UID and frame number."""
    source = context.maker.source
    return [
        SourceImageForMeasurement(source.sop_class_uid, uid, [number] if source.is_multi_frame else None)
        for uid, number in frames
    ]


def _evaluations(content: Content) -> Dataset:
    """ "Qualitative Evaluations": what became of the analysis, coded and in words, the limits of use, the warnings."""
    container = ContainerContentItem(
        name=codes.QUALITATIVE_EVALUATIONS, relationship_type=RelationshipTypeValues.CONTAINS
    )
    findings, model = content.findings, content.findings.model
    conclusion = f"Not analysed: {content.not_analysed}" if content.not_analysed else conclude(findings)
    container.ContentSequence = ContentSequence(
        [
            CodeContentItem(codes.FINDINGS_SUMMARY, _summary(findings), RelationshipTypeValues.CONTAINS),
            _text(codes.CONCLUSION, conclusion),
            _text(codes.COMMENT, LIMITS_OF_USE),
            _text(codes.COMMENT, f"Model {model.name} {model.version}: {model.trained_on}"),
            *([_text(codes.COMMENT, HEIGHTS_CAVEAT)] if content.heights else []),
            *(_text(codes.COMMENT, warning) for warning in findings.warnings),
        ]
    )
    return container


def _summary(findings: Findings) -> Code:
    """How much was judged, and whether something was found. Reference: PS3.16 CID 6047."""
    answers = {level.finding for level in findings.levels.values()}
    if answers == {Finding.UNDETERMINED}:
        return codes.NONE_SUCCEEDED
    is_found = findings.patient_overall.finding is Finding.PRESENT
    if Finding.UNDETERMINED in answers:
        return codes.NOT_ALL_SUCCEEDED_WITH_FINDINGS if is_found else codes.NOT_ALL_SUCCEEDED_WITHOUT_FINDINGS
    return codes.ALL_SUCCEEDED_WITH_FINDINGS if is_found else codes.ALL_SUCCEEDED_WITHOUT_FINDINGS


def _text(name: Code, value: str) -> TextContentItem:
    return TextContentItem(name=name, value=value, relationship_type=RelationshipTypeValues.CONTAINS)
