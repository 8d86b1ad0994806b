"""How a neck is looked at: with a network that reads the level from the brightness, so that only the looking counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from model.bundle import SegmentSettings
from model.geometry import Grid
from model.networks import VertebraUNet
from model.segment import find_vertebrae, one_chain
from model.volume import Volume

SETTINGS = SegmentSettings(channels=(4, 8, 16), spacing_mm=3.0)


class Reader(VertebraUNet):
    """Vertebra C`n` is what has 280 + 40 n HU. Remembers what it was shown, HU `(Z, Y, X)`.

    num_looks: how often it sees anything.
    """

    def __init__(self, num_looks: int = 9) -> None:
        nn.Module.__init__(self)
        self.shown: list[Tensor] = []
        self.num_looks = num_looks

    stride = 4  # type: ignore[assignment]

    def forward(self, x: Tensor) -> list[Tensor]:
        hu = x[:, 0] * 400 + 200
        self.shown.append(hu[0])
        if len(self.shown) > self.num_looks:
            hu = torch.zeros_like(hu)
        return [torch.stack([(hu - 280).clamp(-5, 5), (hu - 280) / 40], dim=1)]


def seen_as(level: np.ndarray, inside: np.ndarray) -> tuple[Volume, np.ndarray]:
    """Bone where `inside`, as bright as `Reader` reads this level, in voxels of 1.5 mm; and the labels."""
    labels = np.where(inside, level, 0).astype(np.uint8)
    voxels_hu = np.where(inside, 280 + 40 * level, 0).astype(np.int16)
    grid = Grid.axial(shape=labels.shape, spacing_mm=(1.5, 1.5, 1.5))
    return Volume(study_instance_uid="1", series_instance_uid="2", voxels_hu=voxels_hu, grid=grid, slices=()), labels


def neck(lean_deg: float) -> tuple[Volume, np.ndarray]:
    """A column of eight blocks, C1 on top, that leans forward; and its labels, with T1."""
    z, y, x = np.indices((140, 140, 60)).astype(np.float32) * np.float32(1.5)
    sine, cosine = np.sin(np.deg2rad(lean_deg)), np.cos(np.deg2rad(lean_deg))
    up = (z - 105) * cosine - (y - 105) * sine
    front = (z - 105) * sine + (y - 105) * cosine
    level = np.floor((72 - up) / 18 + 1)
    inside = (level >= 1) & (level <= 8) & (np.abs(front) < 12) & (np.abs(x - 45) < 12)
    return seen_as(level, inside)


@pytest.mark.parametrize(
    ("lean_deg", "axis", "most_deg"),
    [(0.0, 1, 25), (15.0, 1, 25), (45.0, 1, 25), (-40.0, 1, 25), (7.0, 2, 10), (20.0, 2, 10), (-30.0, 2, 10)],
)
def test_a_neck_that_leans_is_stood_upright_for_the_network_and_labelled_where_it_lies(
    lean_deg: float, axis: int, most_deg: float
) -> None:
    """Forward and back along axis 1, to a side along axis 2."""
    volume, truth = neck(lean_deg)
    if axis == 2:
        voxels_hu, truth = (np.ascontiguousarray(np.swapaxes(array, 1, 2)) for array in (volume.voxels_hu, truth))
        volume = replace(volume, voxels_hu=voxels_hu, grid=Grid.axial(shape=truth.shape, spacing_mm=(1.5, 1.5, 1.5)))
    reader = Reader()

    labels, vertebrae = find_vertebrae(volume, reader, SETTINGS, torch.device("cpu"))

    assert len(reader.shown) == (2 if abs(lean_deg) > most_deg else 1)
    bone = torch.nonzero(reader.shown[-1] > 290).float()
    ends = [bone[bone[:, 0] >= bone[:, 0].quantile(0.8)], bone[bone[:, 0] <= bone[:, 0].quantile(0.2)]]
    apart = ends[0].mean(dim=0) - ends[1].mean(dim=0)
    off_deg = np.rad2deg(np.arctan2(abs(float(apart[axis])), float(apart[0])))
    assert off_deg < (5 if abs(lean_deg) > most_deg else abs(lean_deg) + 5)
    cervical = (truth > 0) & (truth < 8)
    assert (labels[cervical] == truth[cervical]).mean() > 0.8
    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4, 5, 6, 7]
    for vertebra in vertebrae:
        centre = volume.grid.to_lps_mm(np.argwhere(truth == vertebra.label).mean(axis=0))
        assert np.linalg.norm(vertebra.centroid_lps_mm - centre) < 3, "in the patient as scanned, not as turned"


@pytest.mark.parametrize("twist_deg", [0.0, 9.0, 30.0, -42.0])
def test_a_patient_turned_about_the_long_axis_is_looked_at_facing_forward(twist_deg: float) -> None:
    """Blocks with a spinous process, eight of them, turned where they stand."""
    z, y, x = np.indices((100, 60, 60)).astype(np.float32) * np.float32(1.5)
    turn = np.deg2rad(twist_deg)
    left = (x - 45) * np.cos(turn) + (y - 45) * np.sin(turn)
    back = (y - 45) * np.cos(turn) - (x - 45) * np.sin(turn)
    level = np.floor((147 - z) / 18 + 1)
    body, process = (np.abs(left) < 20) & (np.abs(back + 10) < 12), (np.abs(left) < 7) & (np.abs(back - 14) < 14)
    inside = (level >= 1) & (level <= 8) & (body | process)
    volume, truth = seen_as(level, inside)
    reader = Reader()

    labels, _ = find_vertebrae(volume, reader, SETTINGS, torch.device("cpu"))

    assert len(reader.shown) == (2 if abs(twist_deg) > 15 else 1)
    _, back_at, left_at = torch.nonzero(reader.shown[-1] > 290).float().unbind(dim=1)
    behind = back_at > back_at.quantile(0.9)
    off_mm = 3 * (left_at[behind].mean() - left_at[~behind].mean())
    assert abs(off_mm) < (2 if abs(twist_deg) > 15 else 6), "the spinous process lies behind the body"
    inner = ndimage.binary_erosion(
        (truth > 0) & (truth < 8), iterations=2
    )  # at the border HU, and so the level, fall off
    assert (labels[inner] == truth[inner]).mean() > 0.9


@pytest.mark.parametrize("pose_deg", [(50, -25, 30), (55, 30, -25)])
def test_how_far_a_neck_is_turned_is_told_though_it_leans_and_is_tilted(pose_deg: tuple[int, int, int]) -> None:
    volume, _ = posed_neck(pose_deg)
    reader = Reader()

    find_vertebrae(volume, reader, SETTINGS, torch.device("cpu"))

    assert len(reader.shown) == 3, "as scanned, facing forward, upright"
    _, back_at, left_at = torch.nonzero(reader.shown[-1] > 290).float().unbind(dim=1)
    behind = back_at > back_at.quantile(0.9)
    off_mm = 3 * (left_at[behind].mean() - left_at[~behind].mean())
    assert abs(off_mm) < 2, "the spinous process lies behind the body"


def posed_neck(pose_deg: tuple[int, int, int]) -> tuple[Volume, np.ndarray]:
    """Blocks with a spinous process that lean forward, are tilted to a side, then turned about the long axis."""
    z, y, x = np.indices((140, 140, 140)).reshape(3, -1) * 1.5 - 105
    pose = Rotation.from_euler("xyz", pose_deg, degrees=True)
    left, back, up = (axis.reshape(140, 140, 140) for axis in pose.inv().apply(np.stack([x, y, z], axis=1)).T)
    level = np.floor((72 - up) / 18 + 1)
    body, process = (np.abs(left) < 20) & (np.abs(back + 10) < 12), (np.abs(left) < 7) & (np.abs(back - 14) < 14)
    return seen_as(level, (level >= 1) & (level <= 8) & (body | process))


class FrontReader(Reader):
    """Half as sure of a neck whose spinous processes do not lie behind."""

    def forward(self, x: Tensor) -> list[Tensor]:
        scores = super().forward(x)[0]
        back_at = torch.nonzero(self.shown[-1] > 290)[:, 1].float()
        if back_at.quantile(0.99) - back_at.mean() < back_at.mean() - back_at.quantile(0.01):
            scores[:, 0] /= 2
        return [scores]


@pytest.mark.parametrize("twist_deg", [70, 100, -130])
def test_a_patient_who_lies_on_the_side_is_looked_at_facing_forward_not_backward(twist_deg: int) -> None:
    volume, truth = posed_neck((0, 0, twist_deg))

    labels, vertebrae = find_vertebrae(volume, FrontReader(), SETTINGS, torch.device("cpu"))

    assert abs(vertebrae[0].twist_deg - twist_deg) < 6
    cervical = (truth > 0) & (truth < 8)
    assert (labels[cervical] == truth[cervical]).mean() > 0.75


def test_where_facing_forward_shows_less_the_patient_is_taken_as_scanned() -> None:
    volume, truth = posed_neck((40, 15, 40))

    labels, vertebrae = find_vertebrae(volume, Reader(num_looks=1), SETTINGS, torch.device("cpu"))

    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4, 5, 6, 7]
    assert {vertebra.twist_deg for vertebra in vertebrae} == {0.0}
    cervical = (truth > 0) & (truth < 8)
    assert (labels[cervical] == truth[cervical]).mean() > 0.8


def test_what_is_not_seen_upright_stays_as_it_was_seen_first() -> None:
    volume, truth = neck(45.0)
    reader = Reader(num_looks=1)

    labels, vertebrae = find_vertebrae(volume, reader, SETTINGS, torch.device("cpu"))

    assert len(reader.shown) == 2
    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4, 5, 6, 7]
    cervical = (truth > 0) & (truth < 8)
    assert (labels[cervical] == truth[cervical]).mean() > 0.8


class UprightReader(Reader):
    """Half of what does not stand upright it counts wrong: of the first look C4 and below, of the second the rest."""

    def forward(self, x: Tensor) -> list[Tensor]:
        logit, level = super().forward(x)[0][0]
        is_lower = level > 3.5
        wrong = is_lower if len(self.shown) == 1 else ~is_lower
        wrong[..., : wrong.shape[-2] // 2, :] = False
        return [torch.stack([logit, torch.where(wrong, level + 1, level)])[None]]


def test_a_head_held_upright_on_a_neck_that_leans_is_taken_as_scanned_and_the_rest_as_turned() -> None:
    z, y, x = np.indices((140, 140, 60)).astype(np.float32) * np.float32(1.5)
    sine, cosine = np.sin(np.deg2rad(50)), np.cos(np.deg2rad(50))
    down = np.where(z > 105, 105 - z, (105 - z) * cosine + (y - 75) * sine)  # mm below the end of C3
    front = np.where(z > 105, y - 75, (z - 105) * sine + (y - 75) * cosine)
    level = np.floor(down / 18 + 4)
    inside = (level >= 1) & (level <= 8) & (np.abs(front) < 12) & (np.abs(x - 45) < 12)
    volume, truth = seen_as(level, inside)

    labels, vertebrae = find_vertebrae(volume, UprightReader(), SETTINGS, torch.device("cpu"))

    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4, 5, 6, 7]
    for label in (1, 2, 5, 6, 7):
        assert (labels[truth == label] == label).mean() > 0.7, label


@pytest.mark.parametrize(("width", "is_kept"), [(4, True), (2, False)])
def test_a_vertebra_in_two_large_pieces_keeps_both_and_a_small_one_is_erased(width: int, is_kept: bool) -> None:
    """C1 as halves of a ring, over C2 and C3; of the first half's 8 voxels the second has `width`."""
    scores = torch.full((2, 30, 12, 20), -5.0)
    for number, z in ((1, 20), (2, 12), (3, 4)):
        for part in [slice(2, 10), slice(12, 12 + width)] if number == 1 else [slice(2, 12)]:
            scores[0, z : z + 6, 2:10, part], scores[1, z : z + 6, 2:10, part] = 5.0, number
    grid = Grid.axial(shape=(30, 12, 20), spacing_mm=(3.0, 3.0, 3.0))

    chained, found = one_chain(scores, grid)

    assert [bool(found[z, 5, x]) for z, x in ((6, 5), (14, 5), (22, 5), (22, 13))] == [True, True, True, is_kept]
    assert bool(chained[0, 22, 5, 13] > 0) == is_kept


def test_a_blob_larger_than_any_vertebra_of_the_chain_does_not_take_its_place() -> None:
    """C1..C3 above each other, and far to the side a blob that is called C6."""
    scores = torch.full((2, 30, 12, 60), -5.0)
    for number, z in ((1, 20), (2, 12), (3, 4)):
        scores[0, z : z + 6, 2:10, 2:12], scores[1, z : z + 6, 2:10, 2:12] = 5.0, number
    scores[0, 2:28, :, 40:], scores[1, 2:28, :, 40:] = 5.0, 6.0

    _, found = one_chain(scores, Grid.axial(shape=(30, 12, 60), spacing_mm=(3.0, 3.0, 3.0)))

    assert [bool(found[z, 5, x]) for z, x in ((6, 5), (14, 5), (22, 5), (10, 50))] == [True, True, True, False]


@pytest.mark.parametrize(("side_mm", "is_found"), [(30, True), (42, False)])
def test_what_is_larger_than_any_cervical_vertebra_is_not_called_one(side_mm: int, is_found: bool) -> None:
    """A block of 27 cm³, and one of 74, below C1..C3."""
    z, y, x = np.indices((80, 60, 60)).astype(float)
    level = np.where(z < 44, 4, np.floor((80 - z) / 12 + 1))
    side = np.where(z < 44, side_mm, 15) / 3
    inside = (
        (np.abs(y - 29.5) < side)
        & (np.abs(x - 29.5) < side)
        & (z > 44 - 2 * side)
        & (np.abs(z % 12 - 6) < 4 + (z < 44) * 9)
    )
    volume, _ = seen_as(level, inside)

    labels, vertebrae = find_vertebrae(volume, Reader(), SETTINGS, torch.device("cpu"))

    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4][: 3 + is_found]
    assert (labels == 4).any() == is_found


@pytest.mark.parametrize(("levels", "drawn"), [((1, 2), [1, 2]), ((3, 4), []), ((4, 5, 6), [4, 5, 6])])
def test_one_or_two_vertebrae_without_c1_may_be_any_and_are_not_drawn(
    levels: tuple[int, ...], drawn: list[int]
) -> None:
    volume, labels = neck(0.0)
    voxels_hu = np.where(np.isin(labels, levels), volume.voxels_hu, 0).astype(np.int16)

    found, vertebrae = find_vertebrae(replace(volume, voxels_hu=voxels_hu), Reader(), SETTINGS, torch.device("cpu"))

    assert [vertebra.label for vertebra in vertebrae] == drawn
    assert sorted(np.unique(found[found > 0])) == drawn


@pytest.mark.parametrize("continued_mm", [0.0, 60.0])
def test_slices_that_end_in_the_neck_are_shown_as_going_on_if_the_network_needs_it(continued_mm: float) -> None:
    volume, labels = neck(0.0)
    first = int(np.argwhere(labels == 5).mean(axis=0)[0])
    part = Volume(
        study_instance_uid="1",
        series_instance_uid="2",
        voxels_hu=volume.voxels_hu[first:],
        grid=volume.grid.part(np.array([first, 0, 0]), volume.voxels_hu[first:].shape),
        slices=(),
    )
    reader = Reader()

    found, vertebrae = find_vertebrae(part, reader, replace(SETTINGS, continued_mm=continued_mm), torch.device("cpu"))

    assert [vertebra.label for vertebra in vertebrae] == [1, 2, 3, 4, 5]
    assert vertebrae[-1].is_cut
    assert (found == labels[first:])[found > 0].mean() > 0.95
    assert len(reader.shown) == (2 if continued_mm else 1)
    if continued_mm:
        plain, longer = reader.shown
        assert longer.shape[0] - plain.shape[0] == pytest.approx(continued_mm / 3, abs=4)


def test_the_end_of_tilted_slices_is_found_along_the_slice_not_at_its_corner() -> None:
    """Tilted by 20 degrees, the last slice lies 38 mm higher at the spine than at its first row."""
    volume, labels = neck(0.0)
    first = int(np.argwhere(labels == 5).mean(axis=0)[0])
    affine = volume.grid.part(np.array([first, 0, 0]), volume.voxels_hu[first:].shape).affine.copy()
    affine[2, 1] = np.tan(np.deg2rad(20)) * affine[1, 1]
    grid = Grid(shape=volume.voxels_hu[first:].shape, affine=affine)
    reader = Reader()

    find_vertebrae(
        replace(volume, voxels_hu=volume.voxels_hu[first:], grid=grid),
        reader,
        replace(SETTINGS, continued_mm=60.0),
        torch.device("cpu"),
    )

    assert reader.shown[1].shape[0] > reader.shown[0].shape[0] + 12


def test_slices_that_show_thoracic_vertebrae_are_not_continued() -> None:
    volume, _ = neck(0.0)
    reader = Reader()

    find_vertebrae(volume, reader, replace(SETTINGS, continued_mm=60.0), torch.device("cpu"))

    assert len(reader.shown) == 1
