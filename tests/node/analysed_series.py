"""A small analysed Series for tests of `node/encode`, and readers of what was made of it.

The masks are drawn by a function of the place in the patient, so a test asks of every stored voxel: is this the level
that belongs at these LPS coordinates?
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import LegacyConvertedEnhancedCTImageStorage
from scipy.spatial.transform import Rotation

from model import (
    LEVELS,
    Analysis,
    Finding,
    Findings,
    LevelFinding,
    ModelInfo,
    PatientFinding,
    Region,
    SeriesRules,
    SliceSource,
    SliceWeight,
    Volume,
    read_series,
)
from node.encode import NodeIdentity, ResultObject, encode_results
from node.profiles import Profile
from tests.factories import make_ct_series, make_enhanced_ct

NODE = NodeIdentity(ae_title="TESTNODE", software_version="9.9")
MODEL = ModelInfo(name="test-model", version="1.2.3", trained_on="Trained on phantoms only.", operating_point=0.5)
RULES = SeriesRules(min_slices=4, min_extent_mm=5.0)
LEVEL_CODES = dict(
    zip(LEVELS, ("14806007", "39976000", "113205007", "5329002", "36978003", "36054005", "87391001"), strict=True)
)

OBLIQUE = tuple(Rotation.from_euler("xyz", [18, -9, 12], degrees=True).as_matrix().T[:2].ravel().tolist())

SINGLE_FRAME: dict[str, dict[str, Any]] = {
    "axial": {},
    "head to foot": {"reverse": True},
    "oblique": {"orientation": OBLIQUE},
    # Rows run to the patient's right, so the slices are stored head to foot along their normal.
    "flipped in plane": {"orientation": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "origin_lps_mm": (14.0, -7.0, 11.0)},
    "feet first prone": {"orientation": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)},
    "tilted gantry": {"tilt_deg": 15.0},
}


def series(folder: Path, kind: str = "axial", **changes: Any) -> Volume:
    """A small Series of one way to scan, written and read."""
    if kind.startswith("enhanced"):
        order = (3, 0, 4, 1, 9, 2, 8, 5, 7, 6) if kind == "enhanced, frames out of order" else None
        paths = [make_enhanced_ct(folder / "enhanced.dcm", num_frames=10, frame_order=order, **changes)]
        if kind == "enhanced, legacy converted":
            ds = dcmread(paths[0])
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = LegacyConvertedEnhancedCTImageStorage
            ds.save_as(paths[0])
    else:
        paths = make_ct_series(folder / "ct", num_slices=10, **SINGLE_FRAME[kind], **changes)
    return read_series(paths, RULES)


def level_at(points_lps_mm: NDArray[np.float64], middle_lps_mm: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Label at LPS points: seven slabs from head to foot, each narrower to the left and the front than the last."""
    x, y, z = np.moveaxis(points_lps_mm - middle_lps_mm, -1, 0)
    label = np.clip(np.floor(4.03 - z / 1.1), 1, 7)
    inside = (x > -4.6) & (x < 5.3 - 0.7 * label) & (y > -3.4 + 0.4 * label) & (y < 3.7) & (np.abs(z) < 3.9)
    return np.where(inside, label, 0).astype(np.uint8)


def grid_points(volume: Volume) -> NDArray[np.float64]:
    """LPS mm `(Z, Y, X, 3)` of every voxel."""
    return volume.grid.to_lps_mm(np.stack(np.indices(volume.grid.shape), axis=-1).astype(float))


def middle(volume: Volume) -> NDArray[np.float64]:
    """LPS mm of the centre of a volume."""
    return volume.grid.to_lps_mm((np.array(volume.grid.shape) - 1) / 2)


def analysis_of(volume: Volume, *, seen: tuple[str, ...] = LEVELS, fractured: tuple[str, ...] = ("C5",)) -> Analysis:
    """An analysis with these levels in view and these of them fractured, the masks drawn by `level_at`."""
    vertebrae = level_at(grid_points(volume), middle(volume))
    wanted = np.array([0] + [label if name in seen else 0 for label, name in enumerate(LEVELS, 1)], np.uint8)
    vertebrae = wanted[vertebrae]
    fractures = np.zeros_like(vertebrae)
    unseen = LevelFinding(
        in_field_of_view=False, probability=None, finding=Finding.UNDETERMINED, reason="Not found in the field of view"
    )
    levels = dict.fromkeys(LEVELS, unseen)
    for label, name in enumerate(LEVELS, start=1):
        if name not in seen:
            continue
        places = np.argwhere(vertebrae == label)
        slices = [volume.slices[z] for z in np.unique(places[:, 0])]
        is_fractured = name in fractured
        if is_fractured:
            fractures[tuple(places[: len(places) // 2].T)] = label
        levels[name] = LevelFinding(
            in_field_of_view=True,
            probability=0.875 if is_fractured else 0.04,
            finding=Finding.PRESENT if is_fractured else Finding.ABSENT,
            centroid_lps_mm=(0.0, 0.0, 0.0),
            volume_mm3=1000.0 + label,
            attention=tuple(
                SliceWeight(sop_instance_uid=s.sop_instance_uid, frame_number=s.frame_number, weight=1 / len(slices))
                for s in slices
            ),
            regions=(_region(slices[-1]),) if is_fractured else (),
        )
    judged = [level.probability for level in levels.values() if level.probability is not None]
    overall = PatientFinding(
        probability=max(judged) if judged else None,
        finding=Finding.PRESENT
        if judged and max(judged) >= 0.5
        else Finding.ABSENT
        if len(judged) == len(LEVELS)
        else Finding.UNDETERMINED,
    )
    findings = Findings(
        study_instance_uid=volume.study_instance_uid,
        series_instance_uid=volume.series_instance_uid,
        model=MODEL,
        patient_overall=overall,
        levels=levels,
        warnings=("Slices are 1.0 mm apart.",),
    )
    saliency = np.where(fractures > 0, 128, 0).astype(np.uint8)
    return Analysis(findings=findings, vertebrae=vertebrae, fractures=fractures, saliency=saliency)


def _region(source: SliceSource) -> Region:
    return Region(
        sop_instance_uid=source.sop_instance_uid, frame_number=source.frame_number, x=1, y=2, width=3, height=4
    )


def encode(
    volume: Volume, analysis: Analysis, folder: Path, *profiles: Profile, previous_dir: Path | None = None
) -> dict[str, ResultObject]:
    """What was written for these profiles, or for the default one, by kind."""
    folder.mkdir(exist_ok=True)
    written = encode_results(
        analysis, volume, folder, node=NODE, profiles=profiles or (Profile(),), previous_dir=previous_dir
    )
    return {made.kind: made for made in written}


def code_of(sequence: Any) -> tuple[str, str]:
    """(code, scheme) of a single-item code sequence."""
    (item,) = sequence
    return item.CodeValue, item.CodingSchemeDesignator


def frames(ds: Dataset) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float64], int]]:
    """Pixels, LPS mm `(Y, X, 3)` and segment number of each frame of a SEG, by PS3.3 C.7.6.2.1.1."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    row_mm, column_mm = (float(value) for value in shared.PixelMeasuresSequence[0].PixelSpacing)
    j, i = np.meshgrid(np.arange(ds.Rows), np.arange(ds.Columns), indexing="ij")
    in_plane = row * column_mm * i[..., None] + column * row_mm * j[..., None]
    pixels = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    for frame, item in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
        groups = item if "SegmentIdentificationSequence" in item else shared
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        yield frame.astype(bool), position + in_plane, number


def children(item: Dataset, code: str) -> list[Dataset]:
    """Content items directly below `item` with this concept name."""
    return [child for child in item.ContentSequence if child.ConceptNameCodeSequence[0].CodeValue == code]


def value(item: Dataset, code: str) -> Any:
    """Value of the one child with this concept name: text, UID, code or number."""
    (child,) = children(item, code)
    if child.ValueType == "CODE":
        return child.ConceptCodeSequence[0].CodeValue
    if child.ValueType == "NUM":
        return float(child.MeasuredValueSequence[0].NumericValue)
    return child.UID if child.ValueType == "UIDREF" else child.TextValue


def groups(report: Dataset) -> dict[str, Dataset]:
    """Measurement groups by tracking identifier."""
    (measurements,) = children(report, "126010")
    return {value(group, "112039"): group for group in children(measurements, "125007")}


def group_of(report: Dataset, level: str) -> Dataset:
    return groups(report)[level]


def template(group: Dataset) -> str:
    return str(group.ContentTemplateSequence[0].TemplateIdentifier)


FRACTURE, PRESENT, ABSENT, UNDETERMINED = "72704001", "52101004", "272519000", "373068000"


def check_conformance(path: Path) -> None:
    """No error by dicom3tools' dciodvfy; dcmtk's dsrdump reads a report to its end."""
    tools = {name: shutil.which(name) for name in ("dciodvfy", "dsrdump")}
    missing = [name for name, found in tools.items() if found is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: dicom3tools, dcmtk)")
    checked = subprocess.run([str(tools["dciodvfy"]), str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in checked.stderr.splitlines() if line.startswith("Error")]
    assert not errors
    if path.name.endswith(".sr.dcm"):
        dumped = subprocess.run([str(tools["dsrdump"]), "-Ec", str(path)], capture_output=True, check=False)
        assert dumped.returncode == 0, dumped.stderr
        assert dumped.stdout.count(b'"Measurement Group"') >= 8
