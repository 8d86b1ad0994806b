"""The door to encoding: an Analysis becomes DICOM objects that an archive files beside the CT.

A Segmentation of the vertebrae, one of the fracture regions when there are any, and a structured report that always
exists. It reads the headers of the source Instances and writes files; it sends nothing and does not write
findings.json. Called by `node/analyse.py`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from model import Analysis, Grid, SliceSource
from node.encode import sr
from node.encode.identity import NodeIdentity, ResultUids
from node.encode.seg import FRACTURES, VERTEBRAE, make_segmentation, marked_planes, save
from node.encode.source import read_source
from node.encode.sr import conclude

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
    analysis: Analysis, volume_slices: Sequence[SliceSource], grid: Grid, out_dir: Path, *, node: NodeIdentity
) -> tuple[ResultObject, ...]:
    """Writes vertebrae.seg.dcm, fractures.seg.dcm and report.sr.dcm into `out_dir`, and says what was written.

    A Segmentation whose mask is empty is left out. The same input Instances and model version give the same UIDs and,
    dates aside, the same bytes. volume_slices: one per Z index of the masks, on `grid`.

    Raises:
        ValueError: masks, slices and grid do not have the same shape.
        OSError: a source cannot be read or a result cannot be written.
    """
    shapes = {analysis.vertebrae.shape, analysis.fractures.shape, grid.shape}
    if len(shapes) > 1 or len(volume_slices) != grid.shape[0]:
        raise ValueError(
            f"Masks, grid and slices differ: {sorted(shapes)} and {len(volume_slices)} slices. "
            "Give the masks on the grid of the volume they were made from."
        )
    # highdicom warns about names with a single component, and pydicom about odd values, by quoting them: patient data
    # that must not reach a log. Values are copied as the source has them.
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        return _encode(analysis, volume_slices, grid, out_dir, node)


def _encode(
    analysis: Analysis, volume_slices: Sequence[SliceSource], grid: Grid, out_dir: Path, node: NodeIdentity
) -> tuple[ResultObject, ...]:
    findings = analysis.findings
    uids = ResultUids.of((item.sop_instance_uid for item in volume_slices), findings.model)
    masks = ((VERTEBRAE, analysis.vertebrae), (FRACTURES, analysis.fractures))
    planes = sorted({z for _, mask in masks for z in marked_planes(mask)})
    source = read_source(volume_slices, grid, planes)
    made = {
        kind: seg
        for kind, mask in masks
        if (seg := make_segmentation(kind, mask, source, findings.model, uids, node)) is not None
    }
    report = sr.make_report(findings, source, list(made.values()), made.get(VERTEBRAE), uids, node)
    written = [_result(kind.name, seg, save(seg, out_dir, kind.file_name)) for kind, seg in made.items()]
    return (*written, _result(sr.NAME, report, save(report, out_dir, sr.FILE_NAME)))


def _result(kind: str, ds: Dataset, path: Path) -> ResultObject:
    return ResultObject(
        kind=kind,
        path=path,
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
    )
