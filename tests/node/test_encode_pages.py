"""The drawn pages: what lies where in them, which way they are marked, and what they say."""

from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pydicom
import pypdfium2
import pytest
from matplotlib.backends.backend_pdf import PdfPages
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from model import (
    LEVELS,
    Analysis,
    Finding,
    Findings,
    Grid,
    LevelFinding,
    PatientFinding,
    SliceWeight,
    Volume,
    read_series,
)
from model.phantom import Anatomy, Fracture, Phantom, default_grid, render, write_series
from node.encode.canvas import PAGE_PIXELS, plain_settings
from node.encode.colours import LEVEL_RGB
from node.encode.pages import draw_pages
from node.encode.panels import windowed
from node.encode.views import Marks, Spine, coronal_sheet, sagittal_sheet, slice_view
from tests.factories import hu_at
from tests.node.analysed_series import MODEL, SINGLE_FRAME, analysis_of, level_at, middle, series

# Where `pages.py` puts its two large pictures: top left corner, rows and columns.
NECK_CORNER, NECK = (16, 144), (590, 436)
KEY_SLICE_CORNER, KEY_SLICE, KEY_SLICE_PIXEL_MM = (16, 128), (572, 600), 0.16


@pytest.mark.parametrize(
    ("row", "column", "left_right_top_bottom"),
    [
        ((1, 0, 0), (0, 1, 0), "R L A P"),  # axial, supine, seen from the feet
        ((-1, 0, 0), (0, 1, 0), "L R A P"),  # seen from the head
        ((1, 0, 0), (0, -1, 0), "R L P A"),  # stored upside down
        ((-1, 0, 0), (0, -1, 0), "L R P A"),  # prone
        ((0, 1, 0), (0, 0, -1), "A P H F"),  # sagittal, from the left
        ((0, -1, 0), (0, 0, -1), "P A H F"),  # sagittal, from the right
        ((1, 0, 0), (0, 0, -1), "R L H F"),  # coronal
        ((0, 1, 0), (1, 0, 0), "A P R L"),  # axial, on its side
        ((0.966, 0.259, 0), (-0.259, 0.966, 0), "RA LP AL PR"),  # head turned 15 degrees
        ((0.996, 0.087, 0), (-0.087, 0.996, 0), "R L A P"),  # 5 degrees: not worth a word
        ((1, 0, 0), (0, 0.866, -0.5), "R L AH PF"),  # 30 degrees of tilt
        ((0.577, 0.577, 0.577), (0.707, -0.707, 0), "RAF LPH RP LA"),  # doubly oblique
    ],
)
def test_orientation_marks_follow_the_direction_cosines(
    row: tuple[float, ...], column: tuple[float, ...], left_right_top_bottom: str
) -> None:
    marks = Marks.of(row, column)

    assert f"{marks.left} {marks.right} {marks.top} {marks.bottom}" == left_right_top_bottom


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("axial", "R L A P"),
        ("flipped in plane", "L R A P"),
        ("feet first prone", "R L P A"),
        ("oblique", "RA LP AFL PHR"),
    ],
)
def test_a_slice_is_shown_as_it_is_stored(kind: str, expected: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    plane, pixel_mm, shape = 5, 0.25, (40, 60)
    centre = middle(volume)

    view = slice_view(volume, analysis_of(volume), plane, centre_lps_mm=centre, shape=shape, pixel_mm=pixel_mm)

    marks = view.marks
    assert f"{marks.left} {marks.right} {marks.top} {marks.bottom}" == expected
    # The place of each pixel, from the header of the Instance alone.
    ds = pydicom.dcmread(volume.slices[plane].path)
    row, column = np.reshape(ds.ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(row, column)
    on_plane = centre + normal * (normal @ (np.array(ds.ImagePositionPatient, float) - centre))
    i, j = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    points = on_plane + pixel_mm * (i[..., None] * column + j[..., None] * row)
    away_from_air = points[..., 0] > -2.5
    assert np.abs(view.hu - hu_at(points))[away_from_air].max() < 2
    assert (view.labels == level_at(points, centre)).mean() > 0.8
    assert view.plane == plane


@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced, frames out of order"])
def test_sheets_show_the_patient_from_the_left_and_from_the_front(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    x, y, z = centre = middle(volume)
    spine = Spine(z_mm=z + np.array([-2.0, 2.0]), x_mm=x + np.array([1.0, 3.0]), y_mm=y + np.array([-1.0, 2.0]))
    shape, pixel_mm = (16, 24), 0.25
    down, across = (pixel_mm * (np.arange(n) - (n - 1) / 2) for n in shape)
    heights = z - down[:, None] + 0 * across
    bent = np.stack([np.interp(heights, spine.z_mm, a) for a in (spine.x_mm, spine.y_mm)])

    analysis = analysis_of(volume)
    side = sagittal_sheet(volume, analysis, spine, centre_lps_mm=centre, shape=shape, pixel_mm=pixel_mm)
    front = coronal_sheet(volume, analysis, spine, centre_lps_mm=centre, shape=shape, pixel_mm=pixel_mm)

    for view, points in (
        (side, np.stack([bent[0], y + across + 0 * heights, heights], axis=-1)),
        (front, np.stack([x + across + 0 * heights, bent[1], heights], axis=-1)),
    ):
        away_from_air = points[..., 0] > -2.5
        assert np.abs(view.hu - hu_at(points))[away_from_air].max() < 2
        assert (view.labels == level_at(points, centre)).mean() > 0.75
    assert side.marks == Marks(left="A", right="P", top="H", bottom="F")
    assert front.marks == Marks(left="R", right="L", top="H", bottom="F")


def drawn(volume: Volume, analysis: Analysis, num_pages: int | None = None) -> list[NDArray[np.uint8]]:
    with plain_settings():
        return [canvas.pixels() for canvas in islice(draw_pages(analysis, volume, "Node 1"), num_pages)]


TURNS = {
    "oblique": Rotation.from_euler("xyz", [18, -9, 12], degrees=True).as_matrix(),
    "rows to the right": np.diag([-1.0, 1.0, -1.0]),
    "prone": np.diag([-1.0, -1.0, 1.0]),
}


@pytest.fixture(scope="module", params=list(TURNS))
def phantom(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Volume, Analysis]:
    """A fractured neck scanned in some direction, with its truth for an analysis: asymmetric all over."""
    anatomy = Anatomy.random(2, (Fracture(level="C5", kind="body", width_mm=2.0),))
    upright = default_grid(anatomy, (2.0, 1.0, 1.0), (80, 150, 130))
    middle_index = (np.array(upright.shape) - 1) / 2
    affine = upright.affine.copy()
    # The grid's axes are turned: its rows, columns and slices then run along other directions of the same patient.
    affine[:3, :3] = TURNS[request.param] @ affine[:3, :3]
    affine[:3, 3] = upright.to_lps_mm(middle_index) - affine[:3, :3] @ middle_index
    truth = render(anatomy, Grid(shape=upright.shape, affine=affine), noise_hu=0)
    volume = read_series(write_series(truth, tmp_path_factory.mktemp("ct")))
    if volume.grid.affine[2, 0] * affine[2, 0] < 0:  # read foot to head, whichever way it was written
        truth = replace(truth, vertebrae=truth.vertebrae[::-1], fractures=truth.fractures[::-1])
    return volume, analysis_of_phantom(volume, truth)


def analysis_of_phantom(volume: Volume, truth: Phantom) -> Analysis:
    vertebrae = np.where(truth.vertebrae > len(LEVELS), 0, truth.vertebrae)
    levels = {}
    for label, name in enumerate(LEVELS, start=1):
        x, y, z = volume.grid.to_lps_mm(np.argwhere(vertebrae == label).mean(axis=0))
        planes = np.flatnonzero((truth.fractures == label).any(axis=(1, 2)))
        broken = len(planes) > 0
        most = int(planes[len(planes) // 2]) if broken else round(float(volume.grid.to_index(np.array([x, y, z]))[0]))
        levels[name] = LevelFinding(
            in_field_of_view=True,
            probability=0.9 if broken else 0.1,
            finding=Finding.PRESENT if broken else Finding.ABSENT,
            centroid_lps_mm=(float(x), float(y), float(z)),
            volume_mm3=1.0,
            attention=(SliceWeight(sop_instance_uid=volume.slices[most].sop_instance_uid, weight=1.0),),
        )
    findings = Findings(
        study_instance_uid=volume.study_instance_uid,
        series_instance_uid=volume.series_instance_uid,
        model=MODEL,
        patient_overall=PatientFinding(probability=0.9, finding=Finding.PRESENT),
        levels=levels,
    )
    saliency = np.where(truth.fractures > 0, 255, 0).astype(np.uint8)
    return Analysis(findings=findings, vertebrae=vertebrae, fractures=truth.fractures, saliency=saliency)


def check_outlines(
    picture: NDArray[np.uint8],
    points_lps_mm: NDArray[np.float64],
    mask: NDArray[np.uint8],
    volume: Volume,
    names: tuple[str, ...],
) -> None:
    """Pixels in a level's colour lie within a voxel of the edge of that level, and there are such pixels."""
    index = np.rint(volume.grid.to_index(points_lps_mm)).astype(int)
    limits = np.array(volume.grid.shape) - 1
    inside = ((index >= 0) & (index <= limits)).all(axis=-1)
    voxels = tuple(np.moveaxis(np.clip(index, 0, limits), -1, 0))
    for name in names:
        of_level = mask == LEVELS.index(name) + 1
        edge = ndimage.binary_dilation(of_level, np.ones((3, 3, 3))) & ~ndimage.binary_erosion(of_level)
        is_line = (np.abs(picture.astype(int) - LEVEL_RGB[name]).max(axis=-1) < 8) & inside
        assert is_line.sum() > 60, name
        # The frame of the level's name has its colour too.
        assert edge[voxels][is_line].mean() > 0.6, name


def check_gray(picture: NDArray[np.uint8], points_lps_mm: NDArray[np.float64], volume: Volume) -> None:
    """The patient's gray values are under the lines, neither mirrored nor turned."""
    index = np.moveaxis(volume.grid.to_index(points_lps_mm), -1, 0)
    hu = ndimage.map_coordinates(volume.voxels_hu.astype(np.float32), index, order=1, cval=-1024)
    same = np.abs(picture[..., 0].astype(int) - windowed(hu).astype(int)) < 4
    assert same.mean() > 0.8


def plane_points(
    centre_lps_mm: NDArray[np.float64],
    right: NDArray[np.float64],
    down: NDArray[np.float64],
    shape: tuple[int, int],
    pixel_mm: float,
) -> NDArray[np.float64]:
    """LPS mm `(rows, columns, 3)` of the pixels of a picture around a point."""
    i, j = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    points: NDArray[np.float64] = centre_lps_mm + pixel_mm * (i[..., None] * down + j[..., None] * right)
    return points


def test_outlines_lie_on_the_vertebrae_seen_from_the_left(phantom: tuple[Volume, Analysis]) -> None:
    volume, analysis = phantom
    (page,) = drawn(volume, analysis, 1)
    assert page.shape == (PAGE_PIXELS, PAGE_PIXELS, 3)
    (x, y), (rows, columns) = NECK_CORNER, NECK
    picture = page[y : y + rows, x : x + columns]
    found = np.array([level.centroid_lps_mm for level in analysis.findings.levels.values()])
    found = found[np.argsort(found[:, 2])]
    pixel_mm = max((np.ptp(found[:, 2]) + 60) / rows, (np.ptp(found[:, 1]) + 75) / columns, 0.2)
    centre = (found.min(axis=0) + found.max(axis=0)) / 2
    points = plane_points(centre, np.array([0, 1, 0]), np.array([0, 0, -1]), NECK, pixel_mm)
    points[..., 0] = np.interp(points[..., 2], found[:, 2], found[:, 0])

    check_gray(picture, points, volume)
    check_outlines(picture, points, analysis.vertebrae, volume, LEVELS)

    # The same by another program, from the PDF.
    buffer = BytesIO()
    with plain_settings(), PdfPages(buffer) as file:
        file.savefig(next(draw_pages(analysis, volume, "Node 1")).figure)
    (sheet,) = pypdfium2.PdfDocument(buffer.getvalue())
    rendered = sheet.render(scale=PAGE_PIXELS / sheet.get_width()).to_numpy()[..., ::-1]
    check_gray(rendered[y : y + rows, x : x + columns], points, volume)


def test_outlines_lie_on_the_vertebra_in_its_key_slice(phantom: tuple[Volume, Analysis]) -> None:
    volume, analysis = phantom
    _, page = drawn(volume, analysis, 2)
    (x, y), (rows, columns) = KEY_SLICE_CORNER, KEY_SLICE
    picture = page[y : y + rows, x : x + columns]
    level = analysis.findings.levels["C5"]
    (most,) = level.attention
    (source,) = (s for s in volume.slices if s.sop_instance_uid == most.sop_instance_uid)
    ds = pydicom.dcmread(source.path)
    right, down = np.reshape(ds.ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(right, down)
    centre = np.array(level.centroid_lps_mm)
    centre = centre + normal * (normal @ (np.array(ds.ImagePositionPatient, float) - centre))
    points = plane_points(centre, right, down, KEY_SLICE, KEY_SLICE_PIXEL_MM)

    check_gray(picture, points, volume)
    check_outlines(picture, points, analysis.vertebrae, volume, ("C5",))


def test_a_page_for_each_suspected_level_between_overview_and_all_levels(tmp_path: Path) -> None:
    volume = series(tmp_path)

    assert len(drawn(volume, analysis_of(volume, fractured=()))) == 2
    assert len(drawn(volume, analysis_of(volume, fractured=("C2", "C5")))) == 4
    assert len(drawn(volume, analysis_of(volume, seen=()))) == 1


def test_every_page_bears_the_banner(tmp_path: Path) -> None:
    volume = series(tmp_path)
    pages = drawn(volume, analysis_of(volume))

    banners = [page[:44, :600] for page in pages]
    assert all(np.array_equal(banner, banners[0]) for banner in banners)
    assert tuple(banners[0][2, 2]) == (255, 176, 0)
    assert (banners[0] < 60).all(axis=-1).sum() > 1000  # black letters
