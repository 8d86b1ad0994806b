"""Whatever way a neck is scanned, the masks fall on the same place in the patient.

One asymmetric phantom is acquired in several orientations, goes through DICOM files, the model and DICOM SEG, and is
read back with pydicom only.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.spatial.transform import Rotation

from model import LEVELS, Grid, SeriesRules, load_pipeline
from model.phantom import Anatomy, default_grid, render, write_series
from node.analyse import analyse_series
from node.encode import NodeIdentity

SPACING_MM = (1.5, 1.0, 1.0)


def turned(grid: Grid, linear: NDArray[np.float64]) -> Grid:
    """The grid with its axes mapped by a 3 x 3 LPS matrix about its centre."""
    centre = grid.to_lps_mm((np.asarray(grid.shape) - 1) / 2)
    affine = np.eye(4)
    affine[:3, :3] = linear @ grid.affine[:3, :3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.asarray(grid.shape) - 1) / 2)
    return Grid(shape=grid.shape, affine=affine)


def tilted(grid: Grid, degrees: float) -> Grid:
    """The grid sheared as by a tilted gantry: slices stay parallel, each is shifted along its columns."""
    affine = grid.affine.copy()
    shift_mm = np.tan(np.radians(degrees)) * grid.spacing_mm[0]
    affine[:3, 0] += shift_mm * affine[:3, 1] / grid.spacing_mm[1]
    affine[:3, 3] -= shift_mm * affine[:3, 1] / grid.spacing_mm[1] * (grid.shape[0] - 1) / 2
    return Grid(shape=grid.shape, affine=affine)


ACQUISITIONS = {
    "axial": lambda grid: grid,
    "head to foot": lambda grid: turned(grid, np.diag([1.0, 1.0, -1.0])),
    "prone": lambda grid: turned(grid, np.diag([-1.0, -1.0, 1.0])),
    "feet first": lambda grid: turned(grid, np.diag([-1.0, 1.0, -1.0])),
    "mirrored columns": lambda grid: turned(grid, np.diag([-1.0, 1.0, 1.0])),
    "oblique": lambda grid: turned(grid, Rotation.from_euler("xyz", [18, -9, 12], degrees=True).as_matrix()),
    "tilted gantry": lambda grid: tilted(grid, 15.0),
}


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy.random(4)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_masks_fall_on_the_vertebrae_however_it_was_scanned(name: str, anatomy, pipeline, tmp_path: Path) -> None:
    grid = ACQUISITIONS[name](default_grid(anatomy, SPACING_MM))
    phantom = render(anatomy, grid)
    paths = write_series(phantom, tmp_path / "series")
    results = analyse_series(paths, tmp_path / "out", pipeline, SeriesRules(), NodeIdentity())

    found_labels, found_grid = read_seg(results.folder / "vertebrae.seg.dcm")
    # Sampled at fixed places in the patient, both through their own geometry only.
    points = _points_around(anatomy)
    truth = _at(phantom.vertebrae, grid, points)
    found = _at(found_labels, found_grid, points)
    mirrored = _at(phantom.vertebrae, grid, points * [-1, 1, 1])
    for label, level in enumerate(LEVELS, start=1):
        assert dice(found == label, truth == label) > 0.75, level
    # The phantom is asymmetric, so a mirror error would show.
    assert dice(found > 0, mirrored > 0) < dice(found > 0, truth > 0) - 0.1


def read_seg(path: Path) -> tuple[NDArray[np.uint8], Grid]:
    """Labels 1..7 of a SEG and where they lie, from its own pixels and per-frame positions (PS3.3 C.7.6.16.2.3)."""
    ds = dcmread(path)
    shared = ds.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    spacing_mm = [float(value) for value in shared.PixelMeasuresSequence[0].PixelSpacing]
    levels = {item.SegmentNumber: LEVELS.index(item.SegmentLabel) + 1 for item in ds.SegmentSequence}
    frames = ds.PerFrameFunctionalGroupsSequence
    positions = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], float)
    _, first, plane = np.unique((positions @ np.cross(row, column)).round(2), return_index=True, return_inverse=True)
    labels = np.zeros((len(first), ds.Rows, ds.Columns), np.uint8)
    for z, frame, pixels in zip(plane, frames, ds.pixel_array, strict=True):
        labels[z][pixels > 0] = levels[frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
    affine = np.eye(4)
    affine[:3, 0] = (positions[first[-1]] - positions[first[0]]) / (len(first) - 1)
    affine[:3, 1], affine[:3, 2] = column * spacing_mm[0], row * spacing_mm[1]
    affine[:3, 3] = positions[first[0]]
    return labels, Grid(shape=labels.shape, affine=affine)


def _points_around(anatomy: Anatomy) -> NDArray[np.float64]:
    grid = default_grid(anatomy, (2.0, 1.5, 1.5))
    z, y, x = np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")
    points = grid.to_lps_mm(np.stack([z, y, x], -1).reshape(-1, 3))
    centres = np.array([place.centre_lps_mm for place in anatomy.places.values()])
    near = np.abs(points[:, None, :2] - centres[None, :, :2]).max(-1).min(-1) < 45
    return points[near]


def _at(labels: NDArray[np.uint8], grid: Grid, points_lps_mm: NDArray[np.float64]) -> NDArray[np.uint8]:
    return _pick(labels, np.rint(grid.to_index(points_lps_mm)).astype(int))


def _pick(array: NDArray[np.generic], indices: NDArray[np.int_]) -> NDArray[np.uint8]:
    """Values at voxel indices, 0 outside."""
    inside = ((indices >= 0) & (indices < array.shape)).all(-1)
    values = np.zeros(len(indices), np.uint8)
    values[inside] = array[tuple(indices[inside].T)]
    return values
