"""The door to encoding: an Analysis becomes DICOM objects that an archive files beside the CT.

Whatever some destination's profile asks for (`node/profiles.py`), each under its agreed name. It reads the headers of
the source Instances and writes files; it sends nothing and does not write findings.json. Called by `node/analyse.py`.
"""

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from model import Analysis, Volume
from node.encode import sr
from node.encode.identity import NodeIdentity, ResultUids
from node.encode.seg import FRACTURES, VERTEBRAE, make_segmentation, marked_planes, save
from node.encode.source import read_source
from node.encode.sr import conclude
from node.profiles import Kind, Profile

__all__ = ["NodeIdentity", "ResultObject", "conclude", "encode_results"]


@dataclass(frozen=True, kw_only=True)
class ResultObject:
    """A DICOM object that was written. kind: "vertebrae.seg", "fractures.seg" or "report.sr"."""

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
) -> tuple[ResultObject, ...]:
    """Writes every object that some profile asks for into `out_dir`, and says what was written.

    A Segmentation whose mask is empty is left out. The same input Instances and model version give the same UIDs and,
    dates aside, the same bytes. volume: the Series that was analysed.

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
        return tuple(_encode(analysis, volume, out_dir, node, profiles))


def _encode(
    analysis: Analysis, volume: Volume, out_dir: Path, node: NodeIdentity, profiles: Collection[Profile]
) -> Iterator[ResultObject]:
    findings = analysis.findings
    uids = ResultUids.of((item.sop_instance_uid for item in volume.slices), findings.model)
    wanted = {kind for profile in profiles for kind in profile.objects}
    masks = {
        kind: mask
        for kind, mask in ((VERTEBRAE, analysis.vertebrae), (FRACTURES, analysis.fractures))
        if kind.kind in wanted
    }
    planes = sorted({z for mask in masks.values() for z in marked_planes(mask)})
    source = read_source(volume.slices, volume.grid, planes)
    made = {
        kind: seg
        for kind, mask in masks.items()
        if (seg := make_segmentation(kind, mask, source, findings.model, uids, node)) is not None
    }
    for kind, seg in made.items():
        yield _result(kind.name, seg, save(seg, out_dir, kind.file_name))
    # In the order of `Kind`, one plain call each: `if Kind.SALIENCY_MAP in wanted:` and so on; the report comes last.
    if Kind.REPORT_SR in wanted:
        report = sr.make_report(findings, source, list(made.values()), made.get(VERTEBRAE), uids, node)
        yield _result(sr.NAME, report, save(report, out_dir, sr.FILE_NAME))


def _result(kind: str, ds: Dataset, path: Path) -> ResultObject:
    return ResultObject(
        kind=kind,
        path=path,
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
    )
