"""Findings as a structured report: TID 1500 in a Comprehensive 3D SR, all seven levels, negatives included.

The patient's group comes first, then C1..C7. A level that has a segment gets a TID 1411 group that refers to it, any
other a TID 1501 group. What a person must read beside the numbers stands under "Qualitative Evaluations" (TID 1500
rows 12 to 14). Nobody has verified the report, and it says so.
"""

from dataclasses import dataclass
from typing import Any

from highdicom.seg import Segmentation
from highdicom.sr import (
    Comprehensive3DSR,
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

from model import Finding, Findings, LevelFinding
from node import codes
from node.encode.equipment import algorithm_template, device_observer, processing_equipment
from node.encode.identity import NodeIdentity, ResultUids
from node.encode.seg import segment_numbers
from node.encode.source import UTF_8, Source

NAME = "report.sr"
FILE_NAME = "report.sr.dcm"

LIMITS_OF_USE = (
    "Research use only, not a medical device. Found by software and not reviewed by a person; must not be used for "
    "diagnosis."
)

MAX_KEY_SLICES = 3
"""Instances a level refers to; the first is where to look."""

_Group = MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations

_ANSWERS = {
    Finding.PRESENT: codes.PRESENT,
    Finding.ABSENT: codes.ABSENT,
    Finding.UNDETERMINED: codes.UNDETERMINED,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Context:
    """What every group of one report needs."""

    findings: Findings
    source: Source
    uids: ResultUids
    vertebrae: Segmentation | None


def make_report(
    findings: Findings,
    source: Source,
    segmentations: list[Segmentation],
    vertebrae: Segmentation | None,
    uids: ResultUids,
    node: NodeIdentity,
) -> Comprehensive3DSR:
    """The report; its evidence is every Instance of the Series and the Segmentations.

    vertebrae: the one of `segmentations` that the levels refer to; None when no vertebra was found.

    Reference: PS3.16 TID 1500, TID 1411, TID 1501.
    """
    context = _Context(findings=findings, source=source, uids=uids, vertebrae=vertebrae)
    report = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=codes.DEVICE, observer_identifying_attributes=device_observer(node)
            )
        ),
        procedure_reported=codes.CT,
        imaging_measurements=[
            _patient_group(context),
            *(_level_group(context, name, level) for name, level in findings.levels.items()),
        ],
    )
    report[0].ContentSequence.append(_evaluations(findings))
    references = source.references()
    references[0] = source.header  # patient and study are taken from the first
    return Comprehensive3DSR(
        evidence=[*references, *segmentations],
        content=report,
        series_instance_uid=uids.uid(f"{NAME} series"),
        series_number=9003,
        sop_instance_uid=uids.uid(f"{NAME} instance"),
        instance_number=1,
        manufacturer=node.manufacturer,
        manufacturer_model_name=node.manufacturer_model_name,
        software_versions=node.software_version,
        device_serial_number=node.ae_title,
        series_description="AI cervical spine fracture report (research)",
        is_complete=True,
        is_final=False,
        is_verified=False,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=_character_set(findings, source),
        contributing_equipment=[processing_equipment(node)],
    )


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


def _character_set(findings: Findings, source: Source) -> str:
    """The source's character set if what we add needs no other than ASCII, or else UTF-8."""
    model = findings.model
    texts = (model.name, model.version, model.trained_on, *findings.warnings)
    return source.character_set if all(text.isascii() for text in texts) else UTF_8


def _patient_group(context: _Context) -> MeasurementsAndQualitativeEvaluations:
    overall = context.findings.patient_overall
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(context, "C1-C7"),
        finding_type=codes.FRACTURE,
        finding_sites=[FindingSite(codes.CERVICAL_SPINE)],
        algorithm_id=algorithm_template(context.findings.model),
        measurements=_certainty(overall.probability),
        qualitative_evaluations=[_answer(overall.finding)],
    )


def _level_group(context: _Context, name: str, level: LevelFinding) -> _Group:
    """TID 1411 with the level's segment if it has one, TID 1501 otherwise."""
    measurements = _certainty(level.probability, _key_slices(context, level))
    if level.volume_mm3 is not None:
        volume_cm3 = round(level.volume_mm3 / 1000, 2)
        measurements.append(Measurement(name=codes.VOLUME, value=volume_cm3, unit=codes.CUBIC_CENTIMETER))
    arguments: dict[str, Any] = {
        "tracking_identifier": _tracking(context, name),
        "finding_type": codes.FRACTURE,
        "finding_sites": [FindingSite(codes.LEVEL_CODES[name])],
        "algorithm_id": algorithm_template(context.findings.model),
        "measurements": measurements,
        "qualitative_evaluations": [_answer(level.finding)],
    }
    segment = _referenced_segment(context, name)
    group: _Group
    if segment:
        group = VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **arguments)
    else:
        group = MeasurementsAndQualitativeEvaluations(**arguments)
    if level.finding is Finding.UNDETERMINED:
        reason = (
            "Not judged: cut by the field of view." if level.in_field_of_view else "Not found in the field of view."
        )
        group[0].ContentSequence.append(_text(codes.COMMENT, reason))
    return group


def _tracking(context: _Context, what: str) -> TrackingIdentifier:
    return TrackingIdentifier(uid=context.uids.tracking_uid(what), identifier=what)


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


def _percent(probability: float | None) -> float:
    """0..100 with one decimal."""
    return round(100 * (probability or 0.0), 1)


def _answer(finding: Finding) -> QualitativeEvaluation:
    """ "Fracture: Present", "Absent" or "Undetermined"."""
    return QualitativeEvaluation(name=codes.FRACTURE, value=_ANSWERS[finding])


def _key_slices(context: _Context, level: LevelFinding) -> list[SourceImageForMeasurement]:
    """The Instances to look at: those with the largest suspicious regions, or else the most attended."""
    weights: dict[str, float] = {}
    for region in level.regions:
        weights[region.sop_instance_uid] = weights.get(region.sop_instance_uid, 0) + region.width * region.height
    if not weights:
        weights = {item.sop_instance_uid: item.weight for item in level.attention}
    known = {item.sop_instance_uid for item in context.source.slices}
    uids = sorted(weights.keys() & known, key=lambda uid: (-weights[uid], uid))[:MAX_KEY_SLICES]
    return [SourceImageForMeasurement(context.source.sop_class_uid, uid) for uid in uids]


def _referenced_segment(context: _Context, level: str) -> ReferencedSegment | None:
    seg = context.vertebrae
    number = segment_numbers(seg).get(level) if seg else None
    if seg is None or number is None:
        return None
    return ReferencedSegment(
        sop_class_uid=seg.SOPClassUID,
        sop_instance_uid=seg.SOPInstanceUID,
        segment_number=number,
        source_series=SourceSeriesForSegmentation(context.source.header.SeriesInstanceUID),
    )


def _evaluations(findings: Findings) -> Dataset:
    """ "Qualitative Evaluations": the conclusion, the limits of use, the model's training data, the warnings."""
    container = ContainerContentItem(
        name=codes.QUALITATIVE_EVALUATIONS, relationship_type=RelationshipTypeValues.CONTAINS
    )
    model = findings.model
    container.ContentSequence = ContentSequence(
        [
            _text(codes.CONCLUSION, conclude(findings)),
            _text(codes.COMMENT, LIMITS_OF_USE),
            _text(codes.COMMENT, f"Model {model.name} {model.version}: {model.trained_on}"),
            *(_text(codes.COMMENT, warning) for warning in findings.warnings),
        ]
    )
    return container


def _text(name: Code, value: str) -> TextContentItem:
    return TextContentItem(name=name, value=value, relationship_type=RelationshipTypeValues.CONTAINS)
