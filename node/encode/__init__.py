"""The door to encoding: an Analysis becomes DICOM objects that an archive files beside the CT.

Whatever some destination's profile asks for (`node/profiles.py`), each under its agreed name. It reads the headers of
the source Instances and writes files; it sends nothing and does not write findings.json. Called by `node/analyse.py`.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from model import (
    LEVELS,
    Analysis,
    BodyHeights,
    Finding,
    Findings,
    Grid,
    LevelFinding,
    ModelInfo,
    PatientFinding,
    Volume,
    body_heights,
)
from node.encode import keyslices, saliency, sr
from node.encode.frames import Marked, marked_part
from node.encode.identity import NodeIdentity, ResultUids
from node.encode.keyslices import make_key_objects
from node.encode.maker import Maker
from node.encode.regions import FractureRegion, find_regions
from node.encode.saliency import make_saliency_map
from node.encode.seg import FRACTURES, VERTEBRA_SEGMENTS, VERTEBRAE, Mask, SegPart, make_segmentation, plan, save
from node.encode.source import Source, read_refused, read_source
from node.encode.sr import conclude
from node.profiles import Kind, Profile, object_names

__all__ = ["NodeIdentity", "ResultObject", "conclude", "encode_refusal", "encode_results"]


@dataclass(frozen=True, kw_only=True)
class ResultObject:
    """A DICOM object that was written. kind: the name of its file without ".dcm", for example "vertebrae.seg"."""

    kind: str
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str


def encode_results(
    analysis: Analysis,
    volume: Volume,
    out_dir: Path,
    *,
    node: NodeIdentity,
    profiles: Collection[Profile] = (Profile(),),
    previous_dir: Path | None = None,
) -> tuple[ResultObject, ...]:
    """Writes every object that some profile asks for into `out_dir`, and says what was written.

    A Segmentation whose mask is empty is left out. The same input Instances and model version give the same UIDs and,
    dates aside, the same bytes. volume: the Series that was analysed. previous_dir: folder of earlier results of the
    Series, whose report is superseded; None if there are none.

    Raises:
        ValueError: masks and volume do not have the same shape.
        OSError: a source cannot be read or a result cannot be written.
    """
    shapes = {analysis.vertebrae.shape, analysis.fractures.shape, volume.grid.shape}
    if len(shapes) > 1 or len(volume.slices) != volume.grid.shape[0]:
        raise ValueError(
            f"Masks, grid and slices differ: {sorted(shapes)} and {len(volume.slices)} slices. "
            "Give the masks on the grid of the volume they were made from."
        )
    # highdicom warns about names with a single component, and pydicom about odd values, by quoting them: patient data
    # that must not reach a log. Values are copied as the source has them.
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        return tuple(_encode(analysis, volume, out_dir, node, profiles, previous_dir))


def encode_refusal(
    reason: str,
    paths: Sequence[Path],
    out_dir: Path,
    *,
    model: ModelInfo,
    node: NodeIdentity,
    profiles: Collection[Profile] = (Profile(),),
    previous_dir: Path | None = None,
) -> tuple[ResultObject, ...]:
    """Writes the reports that say that a Series was not analysed, and why, for the profiles that ask for a report.

    paths: the files of the Series. The rest is as for `encode_results`, and so are the file names.

    Raises:
        OSError: a source cannot be read or a result cannot be written.
    """
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        source = read_refused(paths)
        uids = replace(ResultUids.of((item.sop_instance_uid for item in source.slices), model), refusal=reason)
        unseen = LevelFinding(
            in_field_of_view=False, probability=None, finding=Finding.UNDETERMINED, reason="Not analysed"
        )
        findings = Findings(
            study_instance_uid=source.header.StudyInstanceUID,
            series_instance_uid=source.header.SeriesInstanceUID,
            model=model,
            patient_overall=PatientFinding(probability=None, finding=Finding.UNDETERMINED),
            levels=dict.fromkeys(LEVELS, unseen),
        )
        content = sr.Content(findings=findings, not_analysed=reason, previous_dir=previous_dir)
        maker = Maker(source=source, model=model, uids=uids, node=node)
        parts_of: dict[Profile, Sequence[SegPart]] = dict.fromkeys(profiles, ())
        return tuple(_reports(content, parts_of, {}, out_dir, maker))


def _encode(
    analysis: Analysis,
    volume: Volume,
    out_dir: Path,
    node: NodeIdentity,
    profiles: Collection[Profile],
    previous_dir: Path | None,
) -> Iterator[ResultObject]:
    maker = Maker(
        source=read_source(volume.slices, volume.grid),
        model=analysis.findings.model,
        uids=ResultUids.of((item.sop_instance_uid for item in volume.slices), analysis.findings.model),
        node=node,
    )
    vertebrae, fractures = marked_part(analysis.vertebrae), marked_part(analysis.fractures)
    masks: dict[Kind, Mask] = {}
    regions: Sequence[FractureRegion] = ()
    if vertebrae:
        masks[Kind.VERTEBRAE_SEG] = Mask(kind=VERTEBRAE, marked=vertebrae, segments=VERTEBRA_SEGMENTS)
    if fractures:
        marked, regions = find_regions(fractures, vertebrae, volume.grid)
        masks[Kind.FRACTURES_SEG] = Mask(kind=FRACTURES, marked=marked, segments=regions)
    parts_of = {profile: _parts(profile, masks, maker.source) for profile in profiles}
    segs: dict[str, Dataset] = {}  # by file name
    for profile, parts in parts_of.items():
        for part in parts:
            if part.file_name not in segs:
                seg = segs[part.file_name] = make_segmentation(part, profile, maker)
                yield _write(seg, out_dir, part.file_name)
                del seg.PixelData  # the reports need the rest
    wanted = {kind for profile in profiles for kind in profile.objects}
    for file_name, ds in _explanations(analysis, volume, wanted, maker):
        yield _write(ds, out_dir, file_name)
    heights = _heights(vertebrae, analysis.findings, volume.grid)
    content = sr.Content(findings=analysis.findings, regions=regions, heights=heights, previous_dir=previous_dir)
    yield from _reports(content, parts_of, segs, out_dir, maker)


def _reports(
    content: sr.Content,
    parts_of: Mapping[Profile, Sequence[SegPart]],
    segs: Mapping[str, Dataset],
    out_dir: Path,
    maker: Maker,
) -> Iterator[ResultObject]:
    """A report for each profile that asks for one and differs in form, referring to the Segmentations it gets."""
    written = set()
    for profile, parts in parts_of.items():
        names = object_names(profile, Kind.REPORT_SR)
        file_name = names[0] if any(part.is_split for part in parts) else names[-1]
        if Kind.REPORT_SR in profile.objects and file_name not in written:
            written.add(file_name)
            report = sr.make_report(content, [segs[part.file_name] for part in parts], file_name, profile, maker)
            yield _write(report, out_dir, file_name)


def _explanations(
    analysis: Analysis, volume: Volume, wanted: Collection[Kind], maker: Maker
) -> Iterator[tuple[str, Dataset]]:
    """What shows the findings to people: each object that is wanted and has something to show, with its file name."""
    if Kind.SALIENCY_MAP in wanted and (saliency_map := make_saliency_map(analysis.saliency, maker)):
        yield saliency.FILE_NAME, saliency_map
    if Kind.KEY_OBJECTS in wanted and (key_objects := make_key_objects(analysis.findings, maker)):
        yield keyslices.FILE_NAME, key_objects
    images, pdf = Kind.SUMMARY_IMAGES in wanted, Kind.SUMMARY_PDF in wanted
    if not (images or pdf):
        return
    from node.encode import summary  # loads matplotlib, which most nodes do without

    drawn = summary.draw_summary(analysis, volume, maker, images=images, pdf=pdf)
    if images:
        for number, page in enumerate(summary.make_images(drawn, maker), start=1):
            yield summary.page_file_name(number), page
    if pdf:
        yield summary.PDF_FILE_NAME, summary.make_pdf(drawn, maker)


def _parts(profile: Profile, masks: dict[Kind, Mask], source: Source) -> list[SegPart]:
    """The Segmentations of a profile."""
    return [part for kind in profile.segmentations if kind in masks for part in plan(masks[kind], profile, source)]


def _heights(vertebrae: Marked | None, findings: Findings, grid: Grid) -> dict[str, BodyHeights]:
    """Heights of the bodies of C3..C7 that are not cut: C1 has none, and the dens leaves that of C2 no upper end."""
    heights = {}
    for label, level in enumerate(LEVELS, start=1):
        if vertebrae is None or level in ("C1", "C2") or findings.levels[level].finding is Finding.UNDETERMINED:
            continue
        box = marked_part((vertebrae.labels == label).view(np.uint8))
        if box is None:
            continue
        corner = np.add(vertebrae.corner, box.corner)
        if (measured := body_heights(box.labels > 0, grid.part(corner, box.labels.shape))) is not None:
            heights[level] = measured
    return heights


def _write(ds: Dataset, out_dir: Path, file_name: str) -> ResultObject:
    return ResultObject(
        kind=file_name.removesuffix(".dcm"),
        path=save(ds, out_dir, file_name),
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
    )
